package kernel

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// DialConntrack returns the table of connections of ns, nil for the calling thread's namespace. Unlike that of OpenConntrack it follows whatever is tracked
// later. It is safe for concurrent use.
func DialConntrack(ns *NS) (*Conntrack, error) {
	c, err := DialNetfilter(ns)
	if err != nil {
		return nil, err
	}
	return &Conntrack{c}, nil
}

// Find returns the IPv4 connection of a protocol (IPPROTO_*) that from began and to answers, as the one who answers sees both: behind every translation.
// One that to began from that port is another. It asks the kernel for this entry alone, some microseconds.
func (t *Conntrack) Find(protocol uint8, from, to netip.AddrPort) (f Flow, found bool, err error) {
	if t == nil || !from.Addr().Is4() || !to.Addr().Is4() {
		return Flow{}, false, nil
	}
	var b Batch
	b.answer(protocol, from, to)
	err = t.c.Get(&b, func(m Message) error {
		if x, ok := parseFlow(m.Body); ok && x.Protocol == protocol && x.Server == to && answered(m.Body) == from {
			f, found = x, true
			f.original, f.id, f.zone = nil, nil, nil // which lie in what was received
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return Flow{}, false, nil
	}
	if err != nil {
		return Flow{}, false, fmt.Errorf("look for connection %v to %v: %w", from, to, err)
	}
	return f, found, nil
}

// answer appends the question for the connection whose answers go from to to from.
func (b *Batch) answer(protocol uint8, from, to netip.AddrPort) {
	b.Add(ctGet, 0, ctHeader)
	b.Nest(ctaTupleReply|unix.NLA_F_NESTED, func() {
		b.Nest(ctaTupleIP|unix.NLA_F_NESTED, func() {
			b.Attr(ctaIPv4Src, to.Addr().AsSlice())
			b.Attr(ctaIPv4Dst, from.Addr().AsSlice())
		})
		b.Nest(ctaTupleProto|unix.NLA_F_NESTED, func() {
			b.Uint8(ctaProtoNum, protocol)
			b.Uint16BE(ctaSrcPort, to.Port())
			b.Uint16BE(ctaDst, from.Port())
		})
	})
}

// answered returns to whom the answers of a connection go. The kernel finds a connection by either direction: this tells which.
func answered(body []byte) netip.AddrPort {
	for t, v := range Attrs(body[min(len(ctHeader), len(body)):]) {
		if t == ctaTupleReply {
			_, to, _ := parseTuple(v)
			return to
		}
	}
	return netip.AddrPort{}
}
