package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_conntrack.h.
const (
	ctaMark, ctaMarkMask            = 8, 21
	ctaTupleProto                   = 2
	ctaProtoNum, ctaSrcPort, ctaDst = 1, 2, 3
	ctaIPv4Dst                      = 2
)

// Flow is a tracked connection of IPv4. Translated or not, From is who began it and Server who answers it: the addresses that
// rules see between the translation of destinations and that of sources.
type Flow struct {
	Mark         uint32
	Protocol     uint8 // IPPROTO_*
	From, Server netip.AddrPort

	original, id, zone []byte // what names it
}

// Flows returns the IPv4 connections that want asks for, limit at most, among those whose mark has the given value under mask, and among all that have
// a mark when mask is 0. The kernel walks its table, some 10 ms for 100,000 connections, and hands out those that match, some 2 us each. A
// dump does not miss what was there before and after it; what comes meanwhile it may.
func (t *Conntrack) Flows(mark, mask uint32, want func(Flow) bool, limit int) ([]Flow, error) {
	if t == nil {
		return nil, nil
	}
	var flows []Flow
	var b Batch
	b.Add(ctGet, 0, ctHeader)
	if mask != 0 {
		b.Attr(ctaMark, binary.BigEndian.AppendUint32(nil, mark&mask))
		b.Attr(ctaMarkMask, binary.BigEndian.AppendUint32(nil, mask))
	}
	err := t.c.Dump(&b, func() { flows = flows[:0] }, func(m Message) error {
		if f, ok := parseFlow(m.Body); ok && len(flows) < limit && f.Mark&mask == mark&mask && (mask != 0 || f.Mark != 0) && want(f) {
			f.original, f.id, f.zone = bytes.Clone(f.original), bytes.Clone(f.id), bytes.Clone(f.zone)
			flows = append(flows, f)
		}
		return nil
	})
	if errors.Is(err, unix.EINVAL) {
		return nil, nil // no nf_conntrack_netlink: nothing is marked by connection either
	}
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return flows, nil
}

// Forget makes the kernel forget connections. Those that are gone already, or are others under the same name, are left alone.
func (t *Conntrack) Forget(flows []Flow) error {
	if t == nil || len(flows) == 0 {
		return nil
	}
	var b Batch
	for _, f := range flows {
		b.Add(ctDelete, 0, ctHeader)
		b.Attr(ctaTupleOrig|unix.NLA_F_NESTED, f.original)
		b.Attr(ctaID, f.id)
		if f.zone != nil {
			b.Attr(ctaZone, f.zone)
		}
	}
	refused, err := t.c.Do(&b)
	for _, r := range refused {
		if !errors.Is(r, unix.ENOENT) {
			err = errors.Join(err, r)
			break
		}
	}
	if err != nil {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

// parseFlow reads a dumped connection, which lies in body. It is not ok for one that is not of IPv4 or has no id.
func parseFlow(body []byte) (f Flow, ok bool) {
	if len(body) < len(ctHeader) || body[0] != unix.AF_INET {
		return Flow{}, false
	}
	for t, v := range Attrs(body[len(ctHeader):]) {
		switch t {
		case ctaTupleOrig:
			var proto uint8
			f.From, _, proto = parseTuple(v)
			f.Protocol = proto
			f.original = v
		case ctaTupleReply:
			f.Server, _, _ = parseTuple(v)
		case ctaMark:
			if len(v) == 4 {
				f.Mark = binary.BigEndian.Uint32(v)
			}
		case ctaID:
			f.id = v
		case ctaZone:
			f.zone = v
		}
	}
	return f, f.original != nil && f.id != nil && f.From.IsValid() && f.Server.IsValid()
}

// parseTuple reads one direction: its source, its destination and its protocol.
func parseTuple(b []byte) (src, dst netip.AddrPort, proto uint8) {
	var from, to netip.Addr
	var sport, dport uint16
	for t, v := range Attrs(b) {
		switch t {
		case ctaTupleIP:
			for t, v := range Attrs(v) {
				switch a, _ := netip.AddrFromSlice(v); t {
				case ctaIPv4Src:
					from = a
				case ctaIPv4Dst:
					to = a
				}
			}
		case ctaTupleProto:
			for t, v := range Attrs(v) {
				switch {
				case t == ctaProtoNum && len(v) == 1:
					proto = v[0]
				case t == ctaSrcPort && len(v) == 2:
					sport = binary.BigEndian.Uint16(v)
				case t == ctaDst && len(v) == 2:
					dport = binary.BigEndian.Uint16(v)
				}
			}
		}
	}
	return netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport), proto
}

// Settle waits until every packet that was underway when it was called has passed: what is decided by rules that are gone has its
// connection by then. It takes some milliseconds. Kernels that cannot wait do not.
func Settle() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL waits for a grace period of RCU, under which the kernel handles each packet
	unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}
