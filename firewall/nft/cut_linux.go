package nft

import (
	"context"
	"math/bits"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

// How long, in milliseconds, an answer on an ended connection is refused. The other end's host still knows the connection, and would take such an answer
// for what it waits for, and what is said to that for an answer in turn: as long as that host's conntrack remembers it.
const (
	endedTCP = 5 * 24 * 3600 * 1000
	endedUDP = 3600 * 1000
)

// fewTags is how many tags are asked for one by one; beyond, all connections are listed once.
const fewTags = 8

// Cut ends established connections to this host's endpoints that the last Set's ruleset does not allow: those from groups with the given tags,
// or from all groups when none is given. It returns how many. Connections are judged by the tag that they were accepted with, and by address and port
// as the rules saw them, behind a translation of their destination. Those to addresses that are no endpoint's in the ruleset are let be. It takes some
// milliseconds, and some 10 more for each 100,000 connections that are tracked on the host, for each tag.
func (t *Table) Cut(ctx context.Context, tags ...identity.Tag) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rules == nil {
		return 0, fault.Unavailablef("end connections: no ruleset was set yet")
	}
	var table *kernel.Conntrack
	if err := t.ns.Do(func() (err error) { table, err = kernel.OpenConntrack(); return err }); err != nil || table == nil {
		return 0, err
	}
	defer table.Close()
	kernel.Settle()
	total := 0
	for range cutRounds {
		doomed, err := t.doomed(ctx, table, tags)
		if err == nil && len(doomed) > 0 {
			err = t.refuseAnswers(ctx, doomed)
		}
		if err == nil {
			err = table.Forget(doomed)
		}
		if err != nil {
			return total, err
		}
		if total += len(doomed); len(doomed) < cutAtOnce {
			return total, nil
		}
	}
	return total, fault.Unavailablef("end connections: after %d there are more", total)
}

// Connections are ended some at a time, so that it costs little memory and the first do not wait for the last.
const cutAtOnce, cutRounds = 16384, 256

// doomed returns connections that are to be ended, cutAtOnce at most.
func (t *Table) doomed(ctx context.Context, table *kernel.Conntrack, tags []identity.Tag) ([]kernel.Flow, error) {
	shift := bits.TrailingZeros32(t.connMask)
	judge := func(f kernel.Flow) bool {
		tag := identity.Tag(f.Mark & t.connMask >> shift)
		wanted := len(tags) == 0 || slices.Contains(tags, tag)
		return tag != 0 && wanted && t.isDestination(f.Server.Addr()) &&
			!t.rules.Allows(tag, f.Server.Addr(), policy.Protocol(f.Protocol), f.Server.Port())
	}
	if len(tags) == 0 || len(tags) > fewTags {
		return table.Flows(0, 0, judge, cutAtOnce)
	}
	var doomed []kernel.Flow
	for _, tag := range tags {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		some, err := table.Flows(uint32(tag)<<shift, t.connMask, judge, cutAtOnce-len(doomed))
		if err != nil {
			return nil, err
		}
		doomed = append(doomed, some...)
	}
	return doomed, nil
}

func (t *Table) isDestination(a netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(t.rules.Destinations, firewall.Destination{Address: a}, firewall.CompareDestination)
	return ok
}

// refuseAnswers puts the ends of connections, as their servers see them, among those that are ended. Nothing asks for those until there are any.
func (t *Table) refuseAnswers(ctx context.Context, flows []kernel.Flow) error {
	t.ends = true
	if _, err := t.converge(ctx, t.rules); err != nil {
		return err
	}
	e := encoder{table: Name}
	for some := range slices.Chunk(flows, elementsAtOnce/2) {
		request(&e.b, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, Name, setEnded)
		nest(&e.b, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
			for _, f := range some {
				timeout := uint64(endedTCP)
				if f.Protocol == unix.IPPROTO_UDP {
					timeout = endedUDP
				}
				nest(&e.b, unix.NFTA_LIST_ELEM, func() {
					e.value(unix.NFTA_SET_ELEM_KEY, endedKey(f))
					e.b.Attr(unix.NFTA_SET_ELEM_TIMEOUT, append(big32(uint32(timeout>>32)), big32(uint32(timeout))...))
				})
			}
		})
	}
	return t.nf.Transact(&e.b, 0)
}

func endedKey(f kernel.Flow) []byte {
	k := append(f.Server.Addr().AsSlice(), port32(f.Server.Port())...)
	k = append(append(k, f.From.Addr().AsSlice()...), port32(f.From.Port())...)
	return append(k, f.Protocol, 0, 0, 0)
}
