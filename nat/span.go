package nat

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
)

// span is a range of IPv4 addresses, both ends included. A list of spans is sorted, and no two touch: two lists that
// hold the same addresses are equal.
type span struct{ first, last uint32 }

// String returns the range as nft prints it.
func (s span) String() string {
	if s.first == s.last {
		return address(s.first).String()
	}
	return address(s.first).String() + "-" + address(s.last).String()
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func address(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// spansOf returns the addresses of the prefixes.
func spansOf(prefixes []netip.Prefix) []span {
	var list []span
	for _, p := range prefixes {
		first := number(p.Masked().Addr())
		list = append(list, span{first, first + uint32(uint64(1)<<(32-p.Bits())-1)})
	}
	return merge(list)
}

func merge(list []span) []span {
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var out []span
	for _, s := range list {
		if n := len(out); n > 0 && (out[n-1].last == ^uint32(0) || s.first <= out[n-1].last+1) {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// mark is one element of an interval set in the kernel: where a range begins, or the first address after it.
type mark struct {
	at  uint32
	end bool
}

// marksOf returns the elements that stand for the spans. A range up to the last address has no end.
func marksOf(spans []span) []mark {
	var list []mark
	for _, s := range spans {
		list = append(list, mark{s.first, false})
		if s.last != ^uint32(0) {
			list = append(list, mark{s.last + 1, true})
		}
	}
	return list
}

// spansOfMarks is the inverse of marksOf, for elements in any order. Elements that say nothing, such as the end before the
// first range that nft(8) adds, are passed over.
func spansOfMarks(marks []mark) []span {
	slices.SortFunc(marks, func(a, b mark) int {
		if c := cmp.Compare(a.at, b.at); c != 0 {
			return c
		}
		if a.end == b.end {
			return 0
		}
		if a.end { // one range ends where the next begins
			return -1
		}
		return 1
	})
	var list []span
	open := false
	for _, m := range marks {
		switch {
		case !m.end && !open:
			list, open = append(list, span{m.at, ^uint32(0)}), true
		case m.end && open:
			list[len(list)-1].last, open = m.at-1, false
		}
	}
	return merge(list)
}
