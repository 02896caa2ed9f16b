// Package secgroup is the noun of what a container may reach outside the overlay: security groups, ordered lists of rules that
// allow; what no rule allows is denied.
//
// It holds the types, the parsers of their three written forms and what a rule means, all pure. It is not a store
// (policy/policysql), not an API (policy/policyhttp), and no rules in a kernel (firewall).
//
// Use: a Form parses rules; Select and Selection.Rules collect those of a container in the order in which they are asked; a Rule says
// whether it Matches a Packet.
package secgroup

import (
	"net/netip"

	"code.cloudfoundry.org/silk/policy"
)

// Protocol is what a rule speaks of, by its IANA number; 0 is all of them.
type Protocol uint8

// The protocols of rules.
const (
	All  Protocol = 0
	ICMP Protocol = 1
	TCP  Protocol = 6
	UDP  Protocol = 17
)

// Range is addresses of one family from First to Last, both included.
type Range struct{ First, Last netip.Addr }

// Contains reports whether an address lies in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// Any is the type or code of a rule that allows every one.
const Any = -1

// Rule allows new connections of a protocol to addresses, and there to ports (tcp, udp) or with messages of a type and code
// (icmp).
type Rule struct {
	Protocol     Protocol
	Destinations []Range        // at least one
	Ports        []policy.Ports // tcp and udp: at least one; else none
	Type, Code   int16          // icmp: 0 to 255, or Any; else 0
	Log          bool           // what the rule lets out is logged, whether or not all is
	Description  string
}

// Packet is the first of a connection, as far as rules speak of it.
type Packet struct {
	Protocol    Protocol // the IANA number, any of them
	Destination netip.Addr
	Port        uint16 // tcp, udp: the destination's
	Type, Code  uint8  // icmp
}

// Matches reports whether the rule allows a packet.
func (r Rule) Matches(p Packet) bool {
	if r.Protocol != All && r.Protocol != p.Protocol || !anyRange(r.Destinations, p.Destination) {
		return false
	}
	switch r.Protocol {
	case TCP, UDP:
		for _, ports := range r.Ports {
			if ports.Contains(p.Port) {
				return true
			}
		}
		return false
	case ICMP:
		return (r.Type == Any || r.Type == int16(p.Type)) && (r.Code == Any || r.Code == int16(p.Code))
	}
	return true
}

func anyRange(ranges []Range, a netip.Addr) bool {
	for _, r := range ranges {
		if r.Contains(a) {
			return true
		}
	}
	return false
}

// Match returns the first of a list of rules that allows a packet, nil if none does.
func Match(rules []Rule, p Packet) *Rule {
	for i := range rules {
		if rules[i].Matches(p) {
			return &rules[i]
		}
	}
	return nil
}
