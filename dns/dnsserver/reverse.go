package dnsserver

import (
	"bytes"
	"net/netip"
	"strconv"
)

// pointer is a name below in-addr.arpa or ip6.arpa in a range of ours.
type pointer struct {
	address netip.Addr // invalid for a name above those of addresses
	beyond  bool       // the name has more labels than an address: it is not there
	apex    int        // where its zone stands in the message
}

// tree is one of the two in which addresses are names (RFC 1035 section 3.5, RFC 3596 section 2.5).
type tree struct {
	suffix string
	base   int // of the numbers that are labels
	bits   int // in each of them
	labels int // of an address
}

var trees = [...]tree{{".in-addr.arpa", 10, 8, 4}, {".ip6.arpa", 16, 4, 32}}

// reverseOf reads such a name. A zone begins where a label does: of a range whose length is not a multiple of a label's bits, what is
// above the next longer one belongs elsewhere.
func (s *Server) reverseOf(name []byte) (p pointer, ours bool) {
	if len(s.cfg.Reverse) == 0 {
		return p, false
	}
	for _, t := range trees {
		rest, ok := bytes.CutSuffix(name, []byte(t.suffix))
		if !ok {
			continue
		}
		var v [16]byte
		n := 0
		at := len(rest) // where the labels that are read begin
		var begins [32]int
		for ; n < t.labels && at > 0; n++ {
			from := bytes.LastIndexByte(rest[:at], '.') + 1
			label := string(rest[from:at])
			u, err := strconv.ParseUint(label, t.base, t.bits)
			if err != nil || strconv.FormatUint(u, t.base) != label {
				break
			}
			v[n*t.bits/8] |= byte(u) << (8 - t.bits - n*t.bits%8)
			begins[n] = from
			at = max(from-1, 0)
		}
		return s.pointer(t, v, n, at > 0, begins)
	}
	return p, false
}

// pointer finds the range of n labels that have been read, which begin where begins says, the highest one first. more: there are others
// before them.
func (s *Server) pointer(t tree, v [16]byte, n int, more bool, begins [32]int) (p pointer, ours bool) {
	a := netip.AddrFrom16(v)
	if t.labels == 4 {
		a = netip.AddrFrom4([4]byte(v[:4]))
	}
	for _, r := range s.cfg.Reverse {
		depth := (r.Bits() + t.bits - 1) / t.bits
		if n < depth || r.Addr().Is4() != a.Is4() || !r.Contains(a) {
			continue
		}
		p = pointer{beyond: more, apex: headerSize + begins[depth-1]}
		if n == t.labels && !more {
			p.address = a
		}
		return p, true
	}
	return p, false
}

// reverse answers for a name that is made of an address.
func (w *worker) reverse(p pointer) rcode {
	there := !p.beyond
	var names int
	if p.address.IsValid() {
		for _, n := range w.s.cfg.Table.NamesOf(p.address) {
			if n[0] == '*' {
				continue
			}
			names++
			if w.q.typ == typePTR && !w.r.ptr(headerSize, n, w.s.ttl) {
				w.r.set(flagTC)
				break
			}
		}
		there = names > 0
	}
	switch {
	case !there && !w.s.cfg.Warm():
		return servFail
	case !there:
		w.r.soa(authority, p.apex, w.serial(), w.s.ttl)
		return nxDomain
	}
	w.common(p.apex)
	if w.r.n[answers] == 0 && !w.truncated() {
		w.r.soa(authority, p.apex, w.serial(), w.s.ttl)
	}
	return noError
}
