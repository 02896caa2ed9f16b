package secgroup

import (
	"math/bits"
	"net/netip"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
)

// String returns "all", "icmp", "tcp" or "udp", or the number of anything else.
func (p Protocol) String() string {
	switch p {
	case All:
		return "all"
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return strconv.Itoa(int(p))
}

// ParseProtocol reads "all", "icmp", "tcp" or "udp". Anything else is fault.Invalid.
func ParseProtocol(s string) (Protocol, error) {
	for _, p := range []Protocol{All, ICMP, TCP, UDP} {
		if s == p.String() {
			return p, nil
		}
	}
	return 0, fault.Invalidf("protocol %.20q: expected tcp, udp, icmp or all, in lower case", s)
}

// String returns the range as ParseRange reads it: an address, a network, or "10.1.0.1-10.1.0.9".
func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	if p, ok := r.Prefix(); ok {
		return p.String()
	}
	return r.First.String() + "-" + r.Last.String()
}

// Prefix returns the network that the range is, if it is one.
func (r Range) Prefix() (netip.Prefix, bool) {
	a, b := r.First.AsSlice(), r.Last.AsSlice()
	if len(a) != len(b) || len(a) == 0 {
		return netip.Prefix{}, false
	}
	same := 0 // leading bits
	for i := range a {
		if d := a[i] ^ b[i]; d != 0 {
			same = 8*i + bits.LeadingZeros8(d)
			break
		}
		same = 8 * (i + 1)
	}
	p := netip.PrefixFrom(r.First, same)
	return p, p.Masked().Addr() == r.First && last(p) == r.Last
}

// last returns the highest address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		if n := p.Bits() - 8*i; n < 8 {
			b[i] |= 0xff >> max(n, 0)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// RangeOf returns the addresses of a network, the first and the last included.
func RangeOf(p netip.Prefix) Range { return Range{p.Masked().Addr(), last(p)} }

// ParseRange reads an address of IPv4, a network such as 10.0.0.0/8 without bits beyond its prefix, or a range such as 10.1.0.1-10.1.0.9.
// Anything else is fault.Invalid.
func ParseRange(s string) (Range, error) { return parseRange(s, true) }

const expected = "expected an IPv4 address, a network such as 10.0.0.0/8, or a range such as 10.1.0.1-10.1.0.9"

func parseRange(s string, strict bool) (Range, error) {
	if s == "" {
		return Range{}, fault.Invalidf("destination is empty: %s", expected)
	}
	if strict && strings.ContainsAny(s, " \t\r\n") {
		return Range{}, fault.Invalidf("destination %.60q has a space: leave it out, agents of earlier versions cannot read it", s)
	}
	if first, second, ok := strings.Cut(s, "-"); ok {
		return parseBounds(strings.TrimSpace(first), strings.TrimSpace(second))
	}
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		switch {
		case err != nil:
			return Range{}, fault.Invalidf("destination %.60q: %s", s, expected)
		case !p.Addr().Is4():
			return Range{}, notIPv4(s)
		case strict && p.Masked() != p:
			return Range{}, fault.Invalidf("destination %v has bits beyond its prefix: write %v for the network or %v for the address", p, p.Masked(), p.Addr())
		}
		return RangeOf(p), nil
	}
	return parseBounds(s, s)
}

func notIPv4(s string) error {
	return fault.Invalidf("destination %.60q is IPv6, which containers do not have: %s", s, expected)
}

// parseBounds reads a range from its ends.
func parseBounds(first, second string) (Range, error) {
	a, err := netip.ParseAddr(first)
	if err != nil {
		return Range{}, fault.Invalidf("destination %.60q: %s", first, expected)
	}
	b, err := netip.ParseAddr(second)
	switch {
	case err != nil:
		return Range{}, fault.Invalidf("destination %.60q: %s", second, expected)
	case !a.Is4():
		return Range{}, notIPv4(first)
	case !b.Is4():
		return Range{}, notIPv4(second)
	case b.Less(a):
		return Range{}, fault.Invalidf("destination %v-%v runs backwards: write %v-%v", a, b, b, a)
	}
	return Range{a, b}, nil
}

// parseDestinations reads a list that must not be empty.
func parseDestinations(list []string, strict bool) ([]Range, error) {
	if len(list) == 0 {
		return nil, fault.Invalidf("destinations are missing: expected at least one, 0.0.0.0/0 for everywhere")
	}
	all := make([]Range, 0, len(list))
	for _, s := range list {
		if !strict {
			s = strings.TrimSpace(s)
		}
		r, err := parseRange(s, strict)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

func parsePorts(list []string, strict bool) ([]policy.Ports, error) {
	all := make([]policy.Ports, 0, len(list))
	for _, s := range list {
		if !strict {
			first, second, isRange := strings.Cut(s, "-")
			if s = strings.TrimSpace(first); isRange {
				s += "-" + strings.TrimSpace(second)
			}
		}
		p, err := policy.ParsePorts(s)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}
