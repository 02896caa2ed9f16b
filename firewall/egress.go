package firewall

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"unsafe"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/secgroup"
)

// Egress is what an endpoint may reach outside the overlay: the first of its lists that allows a packet decides whether it is logged, and what none
// allows is refused. Connections that exist go on, whatever it says. It must not change once it is part of an input.
type Egress struct {
	Deny  *List   // asked first: what it has is refused. nil: nothing
	Lists []*List // in the order in which they are asked
	Open  bool    // all that is not denied is allowed, and lists are not asked
}

// Limit bounds how often an endpoint begins tcp connections to one port of one address outside the overlay.
type Limit struct {
	Rate, Burst int  // a second; 0: there is no limit
	Log         bool // what exceeds it
	Dry         bool // it is logged, and not refused
}

// List is rules of security groups in the form in which they are enforced: spans of which none has what another has. Lists that say the same have the same ID,
// however the rules were written, and containers with such lists share one. It does not change.
type List struct {
	id    string
	spans []Span
	logs  bool // some of them do
}

// Span is a range of addresses, and there of ports (tcp, udp), of types and codes of messages (icmp), or of protocols (all).
type Span struct {
	First, Last netip.Addr
	Protocol    secgroup.Protocol // TCP, UDP, ICMP, or All for the others
	From, To    uint16            // ports; for ICMP 256 times the type and the code; for All numbers of protocols
	Log         bool
}

// MaxSpans bounds a list: that many spans take the kernel some 30 ms.
const MaxSpans = 16384

// Kinds of spans: each is looked up in another way.
func (s Span) plane() int {
	switch s.Protocol {
	case secgroup.TCP, secgroup.UDP:
		return 2
	case secgroup.ICMP:
		return 1
	}
	return 0
}

// CompareSpan orders spans by how they are looked up, by whether they are logged, by protocol, addresses and ports.
func CompareSpan(a, b Span) int {
	if c := cmp.Or(cmp.Compare(a.plane(), b.plane()), compareBool(a.Log, b.Log), cmp.Compare(a.Protocol, b.Protocol)); c != 0 {
		return c
	}
	return cmp.Or(a.First.Compare(b.First), cmp.Compare(a.From, b.From), a.Last.Compare(b.Last), cmp.Compare(a.To, b.To))
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// SameSpans reports whether two lists of spans are one in memory. Lists with the same content may still be two.
func SameSpans(a, b []Span) bool {
	return len(a) == len(b) && unsafe.SliceData(a) == unsafe.SliceData(b)
}

// NewList returns what rules, in the order in which they are asked, come to. What of them cannot be enforced is left out and named: that
// opens nothing. When all of them would be more than MaxSpans spans, the last ones are left out.
func NewList(rules []secgroup.Rule) (*List, []Problem) {
	var problems []Problem
	for i, r := range rules {
		if slices.ContainsFunc(r.Destinations, func(d secgroup.Range) bool { return !good(d) }) {
			problems = append(problems, Problem{fmt.Sprintf("rule %d", i+1), fault.Invalidf("has addresses that are not IPv4, which is all that is enforced so far")})
		}
	}
	spans, ok := reduce(rules)
	if !ok {
		var n int
		n, spans = longest(rules)
		problems = append(problems, Problem{fmt.Sprintf("rules %d to %d", n+1, len(rules)),
			fault.Exhaustedf("overlap in so many ways that they are more than %d entries: expected fewer rules, or addresses and ports in fewer ranges", MaxSpans)})
	}
	return newList(spans), problems
}

// longest returns how many of the rules, from the first, can be enforced, and their spans.
func longest(rules []secgroup.Rule) (int, []Span) {
	n, beyond := 0, len(rules) // n are good, beyond are too many
	var spans []Span
	for n+1 < beyond {
		i := (n + beyond) / 2
		if some, ok := reduce(rules[:i]); ok {
			n, spans = i, some
		} else {
			beyond = i
		}
	}
	return n, spans
}

// NewDeny returns the list of all that goes to some networks. It is never logged, and never bounded: what is left out of it would be open.
func NewDeny(networks []netip.Prefix) *List {
	var rules []secgroup.Rule
	for _, p := range networks {
		if p.IsValid() && p.Addr().Is4() {
			rules = append(rules, secgroup.Rule{Destinations: []secgroup.Range{{First: p.Masked().Addr(), Last: last(p)}}})
		}
	}
	s := sweep{limit: math.MaxInt, most: math.MaxInt}
	s.run(secgroup.All, rects(rules, secgroup.All, math.MaxInt))
	return newList(s.out)
}

// last returns the highest address of an IPv4 network.
func last(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

func newList(spans []Span) *List {
	slices.SortFunc(spans, CompareSpan)
	said := make([]byte, 0, 38*len(spans))
	for _, s := range spans {
		first, last := s.First.As16(), s.Last.As16()
		log := byte(0)
		if s.Log {
			log = 1
		}
		said = append(append(append(said, first[:]...), last[:]...), byte(s.Protocol), log, byte(s.From>>8), byte(s.From), byte(s.To>>8), byte(s.To))
	}
	sum := sha256.Sum256(said)
	return &List{hex.EncodeToString(sum[:12]), slices.Clip(spans), slices.ContainsFunc(spans, func(s Span) bool { return s.Log })}
}

// ID names what the list says. It has 24 characters.
func (l *List) ID() string { return l.id }

// Spans returns the spans in order. They must not be changed.
func (l *List) Spans() []Span { return l.spans }

// Allows reports whether the list has a packet, and whether it is to be logged.
func (l *List) Allows(p secgroup.Packet) (allowed, log bool) {
	if l == nil {
		return false, false
	}
	protocol, at := p.Protocol, p.Port
	switch p.Protocol {
	case secgroup.TCP, secgroup.UDP:
	case secgroup.ICMP:
		at = uint16(p.Type)<<8 | uint16(p.Code)
	default:
		protocol, at = secgroup.All, uint16(p.Protocol)
	}
	for _, s := range l.spans {
		if s.has(protocol, at, p.Destination) {
			return true, s.Log
		}
	}
	for _, s := range l.spans { // a list of NewDeny has only those
		if s.has(secgroup.All, uint16(p.Protocol), p.Destination) {
			return true, s.Log
		}
	}
	return false, false
}

func (s Span) has(protocol secgroup.Protocol, at uint16, to netip.Addr) bool {
	return s.Protocol == protocol && s.From <= at && at <= s.To && s.First.Compare(to) <= 0 && to.Compare(s.Last) <= 0
}

// Outside says for an endpoint which Reach of the ruleset it has.
type Outside struct {
	Address netip.Addr
	Reach   string // its ID; "": everything
}

// Reach is what some endpoints may reach outside the overlay; see Egress. None is there twice.
type Reach struct {
	ID    string // of what it says, 24 characters
	Deny  *List
	Lists []*List
	Open  bool
}

// reach returns what an egress comes to. Lists that have nothing are left out.
func (e *Egress) reach() Reach {
	r := Reach{Open: e.Open}
	if e.Deny != nil && len(e.Deny.spans) > 0 {
		r.Deny = e.Deny
	}
	for _, l := range e.Lists {
		if !e.Open && l != nil && len(l.spans) > 0 {
			r.Lists = append(r.Lists, l)
		}
	}
	h := sha256.New()
	fmt.Fprintln(h, r.Open, r.Deny != nil)
	if r.Deny != nil {
		fmt.Fprintln(h, r.Deny.id)
	}
	for _, l := range r.Lists {
		fmt.Fprintln(h, l.id)
	}
	r.ID = hex.EncodeToString(h.Sum(nil)[:12])
	return r
}

// outside says what each endpoint may reach.
func (c *compiler) outside(here []Endpoint) {
	known := map[*Egress]string{}
	there := map[string]bool{}
	for _, e := range here {
		id, ok := known[e.Egress]
		if !ok && e.Egress != nil {
			r := e.Egress.reach()
			id = r.ID
			if r.Open && r.Deny == nil {
				id = "" // everything
			} else if !there[id] {
				there[id] = true
				c.out.Reaches = append(c.out.Reaches, r)
			}
			known[e.Egress] = id
		}
		c.out.Outside = append(c.out.Outside, Outside{e.Address, id})
	}
	slices.SortFunc(c.out.Reaches, func(a, b Reach) int { return cmp.Compare(a.ID, b.ID) })
}

// Logs reports whether packets to the outside are logged whatever Log says: because a rule says so, or the limit.
func (r *Ruleset) Logs() bool {
	return r.Limit.Rate > 0 && (r.Limit.Log || r.Limit.Dry) || slices.ContainsFunc(r.Reaches, func(x Reach) bool {
		return slices.ContainsFunc(x.Lists, func(l *List) bool { return l.logs })
	})
}

// AllowsOut reports whether a new connection of an endpoint to the outside of the overlay is allowed, and whether one that is allowed is logged. What is logged
// because all is does not count.
func (r *Ruleset) AllowsOut(from netip.Addr, p secgroup.Packet) (allowed, log bool) {
	i, ok := slices.BinarySearchFunc(r.Outside, from, func(o Outside, a netip.Addr) int { return o.Address.Compare(a) })
	if !ok {
		return false, false
	}
	if r.Outside[i].Reach == "" {
		return true, false
	}
	j, ok := slices.BinarySearchFunc(r.Reaches, r.Outside[i].Reach, func(x Reach, id string) int { return cmp.Compare(x.ID, id) })
	if !ok {
		return false, false
	}
	x := &r.Reaches[j]
	if denied, _ := x.Deny.Allows(p); denied || x.Open {
		return !denied, false
	}
	for _, l := range x.Lists {
		if allowed, log = l.Allows(p); allowed {
			return true, log
		}
	}
	return false, false
}
