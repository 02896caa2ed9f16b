package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_conntrack.h; x/sys/unix has no names for them.
const (
	ctGet, ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1, unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	ctaTupleOrig, ctaTupleReply, ctaID, ctaZone, ctaFilter = 1, 2, 12, 18, 25

	ctaTupleIP                 = 1
	ctaIPv4Src                 = 1
	ctaFilterOrig, ctaFilterRe = 1, 2
	ctaFilterSrc               = 1 // bit
)

// Conntrack is the table of connections of one namespace. A nil Conntrack is an empty table.
type Conntrack struct{ c *Conn }

// OpenConntrack returns the table of the calling thread's namespace, nil when nothing at all is tracked there: then it has cost
// one read of a counter.
func OpenConntrack() (*Conntrack, error) {
	n, err := Sysctl("net/netfilter/nf_conntrack_count")
	if n == "0" || errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nothing tracked, or no conntrack in this kernel yet
	}
	c, err := DialNetfilter(nil)
	if err != nil {
		return nil, err
	}
	return &Conntrack{c}, nil
}

// Close closes the socket.
func (t *Conntrack) Close() error {
	if t == nil {
		return nil
	}
	return t.c.Close()
}

// Flush makes the kernel forget every connection that the address a began or answers, also as the target of a port map. It
// costs two walks of the table: some 0.4 ms, and several milliseconds on kernels before 6.11.
func (t *Conntrack) Flush(a netip.Addr) error {
	if t == nil || !a.Is4() {
		return nil
	}
	for _, tuple := range []uint16{ctaTupleOrig, ctaTupleReply} {
		if err := t.c.flushSource(a, tuple); err != nil {
			return fmt.Errorf("forget connections of %v: %w", a, err)
		}
	}
	return nil
}

// FlushAll makes the kernel forget every connection that an address for which doomed says so began or answers. It reads the
// whole table: 5 ms, and some 100 ms when it is full.
func (t *Conntrack) FlushAll(doomed func(netip.Addr) bool) error {
	if t == nil {
		return nil
	}
	for _, tuple := range []uint16{ctaTupleOrig, ctaTupleReply} {
		if err := t.c.flushListed(netip.Addr{}, tuple, doomed); err != nil {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// FlushConntrack is Flush of the table of the calling thread's namespace.
func FlushConntrack(a netip.Addr) error {
	t, err := OpenConntrack()
	if err != nil {
		return err
	}
	defer t.Close()
	return t.Flush(a)
}

// ctHeader begins every conntrack request: a nfgenmsg for IPv4.
var ctHeader = []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}

// flushSource deletes the connections with source a in the tuple of one direction. Linux 6.11 deletes by filter. Earlier kernels
// do not know a filter there: they take the tuple for the whole key of one entry and refuse it, because it has no ports,
// so nothing is deleted by mistake; they are asked for the entries instead.
func (c *Conn) flushSource(a netip.Addr, tuple uint16) error {
	var b Batch
	b.Add(ctDelete, 0, ctHeader)
	b.sourceFilter(a, tuple)
	refused, err := c.Do(&b)
	if err != nil || len(refused) == 0 || errors.Is(refused[0], unix.ENOENT) {
		return err
	}
	if !errors.Is(refused[0], unix.EINVAL) && !errors.Is(refused[0], unix.EOPNOTSUPP) {
		return refused[0]
	}
	return c.flushListed(a, tuple, func(s netip.Addr) bool { return s == a })
}

// sourceFilter restricts a request to entries with source a in the tuple of one direction.
func (b *Batch) sourceFilter(a netip.Addr, tuple uint16) {
	b.Nest(tuple|unix.NLA_F_NESTED, func() {
		b.Nest(ctaTupleIP|unix.NLA_F_NESTED, func() { b.Attr(ctaIPv4Src, a.AsSlice()) })
	})
	b.Nest(ctaFilter|unix.NLA_F_NESTED, func() {
		orig, reply := uint32(ctaFilterSrc), uint32(0)
		if tuple == ctaTupleReply {
			orig, reply = 0, ctaFilterSrc
		}
		b.Uint32(ctaFilterOrig, orig)
		b.Uint32(ctaFilterRe, reply)
	})
}

// flushListed lists the entries and deletes each of those that chosen wants by what identifies it. If a is valid and the kernel
// can (5.8), it lists only that address's.
func (c *Conn) flushListed(a netip.Addr, tuple uint16, chosen func(netip.Addr) bool) error {
	var doomed Batch
	for _, filtered := range []bool{true, false} {
		if filtered && !a.IsValid() {
			continue
		}
		var b Batch
		b.Add(ctGet, 0, ctHeader)
		if filtered {
			b.sourceFilter(a, tuple)
		}
		err := c.Dump(&b, doomed.Reset, func(m Message) error {
			doomed.deleteEntry(m.Body, tuple, chosen)
			return nil
		})
		if err == nil {
			break
		}
		if !filtered && errors.Is(err, unix.EINVAL) {
			return nil // no nf_conntrack_netlink: this kernel cannot forget single connections
		}
		if !filtered || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	if doomed.Len() == 0 {
		return nil
	}
	refused, err := c.Do(&doomed)
	for _, r := range refused {
		if !errors.Is(r, unix.ENOENT) {
			return errors.Join(err, r)
		}
	}
	return err
}

// deleteEntry appends the request that deletes a dumped entry if chosen wants the source in its tuple.
func (b *Batch) deleteEntry(body []byte, tuple uint16, chosen func(netip.Addr) bool) {
	if len(body) < len(ctHeader) {
		return
	}
	var orig, id, zone []byte
	ours := false
	for t, v := range Attrs(body[len(ctHeader):]) {
		switch t {
		case ctaTupleOrig:
			orig = v
		case ctaID:
			id = v
		case ctaZone:
			zone = v
		}
		if t == tuple {
			s := tupleSource(v)
			ours = s.IsValid() && chosen(s)
		}
	}
	if !ours || orig == nil {
		return
	}
	b.Add(ctDelete, 0, ctHeader)
	b.Attr(ctaTupleOrig|unix.NLA_F_NESTED, orig)
	if id != nil {
		b.Attr(ctaID, id)
	}
	if zone != nil {
		b.Attr(ctaZone, zone)
	}
}

// tupleSource returns the source address of a tuple.
func tupleSource(tuple []byte) netip.Addr {
	for t, v := range Attrs(tuple) {
		if t != ctaTupleIP {
			continue
		}
		for t, v := range Attrs(v) {
			if t == ctaIPv4Src {
				a, _ := netip.AddrFromSlice(v)
				return a
			}
		}
	}
	return netip.Addr{}
}

// ForgetTo makes the kernel forget the connections of a protocol (IPPROTO_*) that began at the port of an address that chosen wants. It asks
// for those of that port, which kernels before 5.8 answer with all.
func (t *Conntrack) ForgetTo(protocol uint8, port uint16, chosen func(netip.Addr) (bool, error)) error {
	if t == nil {
		return nil
	}
	var flows []Flow
	for _, filtered := range []bool{true, false} {
		var b Batch
		b.Add(ctGet, 0, ctHeader)
		if filtered {
			b.portFilter(protocol, port)
		}
		var failed error
		err := t.c.Dump(&b, func() { flows, failed = nil, nil }, func(m Message) error {
			f, ok := parseFlow(m.Body)
			if !ok || f.Protocol != protocol {
				return nil
			}
			_, to, _ := parseTuple(f.original)
			if to.Port() != port {
				return nil
			}
			is, err := chosen(to.Addr())
			if failed = errors.Join(failed, err); is {
				f.original, f.id, f.zone = bytes.Clone(f.original), bytes.Clone(f.id), bytes.Clone(f.zone)
				flows = append(flows, f)
			}
			return nil
		})
		if filtered && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
			continue
		}
		if err := errors.Join(err, failed); err != nil {
			return fmt.Errorf("list connections to port %d: %w", port, err)
		}
		break
	}
	return t.Forget(flows)
}

// portFilter restricts a request to entries of a protocol that began at a port.
func (b *Batch) portFilter(protocol uint8, port uint16) {
	const flags = 1<<3 | 1<<5 // CTA_FILTER_F_CTA_PROTO_NUM, _PROTO_DST_PORT
	b.Nest(ctaTupleOrig|unix.NLA_F_NESTED, func() {
		b.Nest(ctaTupleProto|unix.NLA_F_NESTED, func() {
			b.Uint8(ctaProtoNum, protocol)
			b.Uint16BE(ctaDst, port)
		})
	})
	b.Nest(ctaFilter|unix.NLA_F_NESTED, func() {
		b.Uint32(ctaFilterOrig, flags)
		b.Uint32(ctaFilterRe, 0)
	})
}
