package overlay

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"golang.org/x/sys/unix"
)

// listeners hear of every change to what the overlay may consist of.
type listeners struct{ rt, nf *kernel.Listener }

func listen(ns *kernel.NS) (*listeners, error) {
	rt, err := kernel.Listen(ns, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_NEIGH)
	if err != nil {
		return nil, err
	}
	nf, err := kernel.Listen(ns, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		rt.Close()
		return nil, err
	}
	return &listeners{rt, nf}, nil
}

func (l *listeners) close() error { return errors.Join(l.rt.Close(), l.nf.Close()) }

// poll reads what has been heard and reports whether any of it concerns v and is not explained. A nil v concerns nothing,
// a nil explained explains nothing.
func (l *listeners) poll(v *view, explained func(nf bool, m kernel.Message) bool) (changed bool) {
	each := func(nf bool) func(kernel.Message) {
		return func(m kernel.Message) {
			if !changed && v != nil && v.concerns(nf, m) && (explained == nil || !explained(nf, m)) {
				changed = true
			}
		}
	}
	errRT, errNF := l.rt.Poll(each(false)), l.nf.Poll(each(true))
	return changed || errRT != nil || errNF != nil
}

// Watch calls changed once when it listens and again for every burst of changes to what Set looks after, whoever made
// them (Set included: a following Set then finds nothing to do, cheaply). It returns nil when ctx ends. changed must
// not block. What concerns Set is known from the last Set: before the first there is nothing to be woken for.
func (f *Fabric) Watch(ctx context.Context, changed func()) error {
	l, err := listen(f.ns)
	if err != nil {
		return err
	}
	f.ears.add(l)
	defer f.ears.remove(l)
	stop := context.AfterFunc(ctx, func() { l.close() })
	errs := make([]error, 2)
	var wg sync.WaitGroup
	wg.Go(func() { errs[0] = f.wait(l.rt, false, changed); l.close() })
	wg.Go(func() { errs[1] = f.wait(l.nf, true, changed); l.close() })
	changed()
	wg.Wait()
	stop()
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(errs...)
}

// settled is how long after a notification the others who listen have it too. The kernel gives it to one after the other, of all namespaces, and a Set
// that comes in between, because Watch was told first, has not heard of it yet.
const settled = 200 * time.Millisecond

// wait calls changed until the listener is closed: at once, and again when Set must have heard what it was about.
func (f *Fabric) wait(l *kernel.Listener, nf bool, changed func()) error {
	again := time.AfterFunc(settled, changed)
	again.Stop()
	defer again.Stop()
	for {
		concerned := false
		err := l.Wait(func(m kernel.Message) {
			v := f.view.Load()
			concerned = concerned || v != nil && v.concerns(nf, m)
		})
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !errors.Is(err, kernel.ErrLost):
			return err
		case err != nil || concerned:
			changed()
			again.Reset(settled)
		}
	}
}

// concerns reports whether a notification is about something that Set looks after.
func (v *view) concerns(nf bool, m kernel.Message) bool {
	if nf {
		return concernsGuard(m)
	}
	switch m.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l, name, ok := parseLink(m.Body)
		return ok && (l.index == v.index || l.index == v.lower || name == v.device || name == v.lowerBy)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		index, a, ok := parseAddr(m.Body)
		return ok && (index == v.index || a.prefix.Addr() == v.underlay)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		r, oif, _ := parseRoute(m.Body)
		return v.index != 0 && oif == v.index || r.proto == Protocol || v.leadsToPeer(r) // who replaces one of ours is told of, and what was replaced is not
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if index, _, ok := parseEntry(m.Body); ok {
			return index == v.index
		}
		// The kernel itself makes and drops neighbours that somebody asks for: containers must not be able to wake us.
		index, n, ok := parseNeigh(m.Body)
		if !ok || index != v.index {
			return false
		}
		_, peer := slices.BinarySearchFunc(v.peers, n, func(l lease.Lease, n neigh) int { return l.Base().Compare(n.addr) })
		return n.permanent || peer
	}
	return false
}

// leadsToPeer reports whether a route is for the subnet of a peer, whoever made it.
func (v *view) leadsToPeer(r route) bool {
	at, found := slices.BinarySearchFunc(v.peers, r.dst, func(l lease.Lease, dst netip.Prefix) int { return l.Base().Compare(dst.Addr()) })
	return found && v.peers[at].Subnet == r.dst
}

// concernsGuard reports whether an nftables notification is about the table itself or about what is ours in it.
func concernsGuard(m kernel.Message) bool {
	if m.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Body) < nfgenSize || m.Body[0] != unix.NFPROTO_INET {
		return false
	}
	nameAttr := uint16(2)
	switch m.Type & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		nameAttr = 0
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		nameAttr = unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE, unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
	default:
		return false
	}
	var table, name string
	for t, v := range nfAttrs(m.Body) {
		switch t {
		case 1:
			table = kernel.Text(v)
		case nameAttr:
			name = kernel.Text(v)
		}
	}
	return table == Table && (nameAttr == 0 || strings.HasPrefix(name, guardPrefix))
}
