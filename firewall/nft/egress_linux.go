package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/secgroup"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What containers may reach outside the overlay, in words. A packet comes to to-outside when it is its sender's own and leaves neither through the VTEP
// nor to a container.
//
//	to-outside   no VXLAN; established; errors about its own connections; nothing that belongs in the overlay. Then by its address to what the
//	             container may reach, which is egress-pass if that is everything
//	reach-ID     no tcp that conntrack makes nothing of; denied networks; then each list in turn
//	egress-pass  the limit for its destination, and the log
//
// A list is in up to six sets, by what is asked of the packet and by whether it is logged. Sets and chains are called by digests of what they hold, and
// are never changed: a change makes new ones beforehand, and its transaction only lets elements of the map lead elsewhere.
const (
	chainPass   = "egress-pass"
	chainLogged = "egress-pass-logged"
	chainRate   = "egress-rate"

	setOutside = "outside" // address -> reach-ID

	reachPrefix = "reach-"
)

// The kinds of sets of what containers may reach.
var (
	kindPorts    = &setKind{"type ipv4_addr . inet_proto . inet_service; flags interval;", concat(typeIPv4, typeProtocol, typeService), []uint32{4, 1, 2}, interval, false}
	kindMessages = &setKind{"type ipv4_addr . icmp_type . icmp_code; flags interval;", concat(typeIPv4, typeICMPType, typeICMPCode), []uint32{4, 1, 1}, interval, false}
	kindOthers   = &setKind{"type ipv4_addr . inet_proto; flags interval;", concat(typeIPv4, typeProtocol), []uint32{4, 1}, interval, false}
	kindRates    = &setKind{"type ipv4_addr . ipv4_addr . inet_service; size 262144; flags dynamic,timeout;", concat(typeIPv4, typeIPv4, typeService), []uint32{4, 4, 2},
		unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT, false}
)

// interval are the flags of sets of ranges of several fields.
const interval = unix.NFT_SET_INTERVAL | flagConcat

// maxRates is for how many pairs of a container and a destination connections are counted: some 60 MiB.
const maxRates = 262144

func reachChain(id string) string { return reachPrefix + id }

// outsideRules are those of to-outside.
func (f frame) outsideRules() []rule {
	return []rule{
		// udp dport 4789 goto refuse-vxlan
		newRule(udpPort(vxlanPort), refuse(VXLAN)),
		// ct state established accept
		newRule(isEstablished(), accept()),
		// meta l4proto icmp ct state related goto errors
		newRule(relatedICMP(), goTo(chainErrors)),
		// ip daddr 10.255.0.0/16 goto refuse-unknown-destination
		newRule(daddrIn(f.network), refuse(UnknownDestination)),
		// ip saddr vmap @outside
		newRule(verdictBySender(setOutside)),
		// goto refuse-no-rule
		newRule(refuse(NoRule)),
	}
}

// egress returns the chains that are the same whatever the lists say.
func (f frame) egress() []chain {
	pass, told := f.limited(), f.limited()
	if f.log.egress {
		pass = append(pass, f.log.rules(flow.Accepted, flow.Egress, "", sender)...)
	}
	told = append(told, f.log.rules(flow.Accepted, flow.Egress, "", sender)...)
	out := []chain{
		// accept
		newChain(chainPass, noHook, append(pass, newRule(accept()))...),
		newChain(chainLogged, noHook, append(told, newRule(accept()))...),
	}
	if f.limit.Rate == 0 {
		return out
	}
	var exceeds []rule
	if f.limit.Dry {
		exceeds = f.log.rules(flow.Denied, flow.Rate, "dry-run", sender)
	} else {
		if f.limit.Log {
			exceeds = f.log.rules(flow.Denied, flow.Rate, string(RateLimited), sender)
		}
		// goto refuse-rate-limited
		exceeds = append(exceeds, newRule(refuse(RateLimited)))
	}
	return append(out, newChain(chainRate, noHook, exceeds...))
}

// limited are the rules that send what exceeds the limit elsewhere.
func (f frame) limited() []rule {
	if f.limit.Rate == 0 {
		return nil
	}
	// meta l4proto tcp ct state new update @rates-100-1000 { ip saddr . ip daddr . th dport timeout 10s limit rate over 100/second burst 1000 packets } jump egress-rate
	return []rule{newRule(protocol("tcp", unix.IPPROTO_TCP), newInConntrack(), f.exceeds(), jump(chainRate))}
}

func (f frame) ratesSet() string {
	return fmt.Sprintf("rates-%d-%d", f.limit.Rate, f.limit.Burst)
}

// exceeds is true of a packet that is one too many from its sender to its destination. Those that nothing was sent to for as long as it takes to have the whole burst
// again are forgotten. When the set is full further destinations are not limited: refusing them would let one container cut off the others.
func (f frame) exceeds() part {
	l := f.limit
	timeout := time.Duration((l.Burst+l.Rate-1)/l.Rate) * time.Second
	text := fmt.Sprintf("update @%s { ip saddr . ip daddr . th dport timeout %v limit rate over %d/second burst %d packets }", f.ratesSet(), timeout, l.Rate, l.Burst)
	return part{text, append(onlyIPv4(), network(offsetSaddr, reg1), network(offsetDaddr, word1), transport(offsetDport, word2),
		&expr.Dynset{SrcRegKey: reg1, SetName: f.ratesSet(), Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: timeout,
			Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(l.Rate), Unit: expr.LimitTimeSecond, Burst: uint32(l.Burst), Over: true}}})}
}

// egress adds to w what the endpoints may reach.
func (b *builder) egress(w *wish, rs *firewall.Ruleset, have map[string]*set) {
	outside := set{name: setOutside}
	for _, o := range rs.Outside {
		leads := chainPass
		if o.Reach != "" {
			leads = reachChain(o.Reach)
		}
		outside.elems = append(outside.elems, elem{string(o.Address.AsSlice()), leads})
	}
	slices.SortFunc(outside.elems, compareElem)
	w.sets = append(w.sets, outside)
	if b.frame.limit.Rate > 0 {
		w.sets = append(w.sets, set{name: b.frame.ratesSet()})
	}
	made := map[string][]string{} // by the ID of a list: the names of its sets
	for i := range rs.Reaches {
		r := &rs.Reaches[i]
		var names []string // for each list
		for _, l := range append([]*firewall.List{r.Deny}, r.Lists...) {
			if l == nil {
				continue
			}
			some, ok := made[l.ID()]
			if !ok {
				some = listSets(w, l, have)
				made[l.ID()] = some
			}
			names = append(names, some...)
		}
		key := reachChain(r.ID) + " " + strings.Join(names, " ")
		w.chains = append(w.chains, b.chain(key, func() chain { return reach(r, made) }))
	}
}

// setFull bounds a set, in networks of addresses. The kernel keeps a range of addresses as the networks that it consists of, of which it takes up to 62, and copies all that
// a set has for every 64 that are added to it: 12,000 take 30 ms, 2,000 less than 1 ms. What is in another set costs a packet one more lookup.
const setFull = 2048

// networks returns of how many networks the addresses of a span consist.
func networks(s firewall.Span) (n int) {
	first, last := s.First.As4(), s.Last.As4()
	a, end := uint64(binary.BigEndian.Uint32(first[:])), uint64(binary.BigEndian.Uint32(last[:]))
	for a <= end {
		size := uint64(1) << 32
		if a != 0 {
			size = a & -a
		}
		for size > end-a+1 {
			size /= 2
		}
		a += size
		n++
	}
	return n
}

// listSets adds the sets of a list to w, each with the spans of a kind, and returns their names.
func listSets(w *wish, l *firewall.List, have map[string]*set) (names []string) {
	spans := l.Spans()
	for len(spans) > 0 {
		prefix := spanPrefix(spans[0])
		n, cost := 1, networks(spans[0])
		for n < len(spans) && spanPrefix(spans[n]) == prefix && cost < setFull {
			cost += networks(spans[n])
			n++
		}
		some := spans[:n:n]
		name := nameSet(fmt.Sprintf("%s%s-%d", prefix, l.ID(), len(names)), have, func(s *set) bool { return firewall.SameSpans(s.spans, some) || slices.Equal(s.spans, some) })
		w.sets = append(w.sets, set{name: name, spans: some})
		names = append(names, name)
		spans = spans[n:]
	}
	return names
}

// What the names of sets of spans begin with. Where logged spans are, an l is put before.
const (
	prefixPorts    = "ports-"
	prefixMessages = "messages-"
	prefixOthers   = "others-"
)

func spanPrefix(s firewall.Span) string {
	prefix := prefixOthers
	switch s.Protocol {
	case secgroup.TCP, secgroup.UDP:
		prefix = prefixPorts
	case secgroup.ICMP:
		prefix = prefixMessages
	}
	if s.Log {
		return prefix + "l-"
	}
	return prefix
}

// reach returns the chain of what some containers may reach. A packet that matches a set of a list is in none of the others of that list, but for the set of other
// protocols, which is asked last.
func reach(r *firewall.Reach, made map[string][]string) chain {
	// meta l4proto tcp ct state invalid goto refuse-invalid
	rules := []rule{newRule(protocol("tcp", unix.IPPROTO_TCP), invalidInConntrack(), refuse(Invalid))}
	if r.Deny != nil {
		for _, name := range made[r.Deny.ID()] {
			// ip daddr . meta l4proto @others-0123456789abcdef01234567-0 goto refuse-denied-network
			rules = append(rules, newRule(otherIn(name), refuse(DeniedNetwork)))
		}
	}
	if r.Open {
		// goto egress-pass
		return newChain(reachChain(r.ID), noHook, append(rules, newRule(goTo(chainPass)))...)
	}
	for _, l := range r.Lists {
		for _, prefix := range []string{prefixPorts, prefixMessages, prefixOthers} {
			for _, name := range made[l.ID()] {
				if !strings.HasPrefix(name, prefix) {
					continue
				}
				to := chainPass
				if strings.HasPrefix(name, prefix+"l-") {
					to = chainLogged
				}
				rules = append(rules, newRule(spanIn(prefix, name), goTo(to)))
			}
		}
	}
	// goto refuse-no-rule
	return newChain(reachChain(r.ID), noHook, append(rules, newRule(refuse(NoRule)))...)
}

// spanIn looks a packet up among spans of a kind.
func spanIn(prefix, name string) part {
	switch prefix {
	case prefixPorts:
		// ip daddr . meta l4proto . th dport @ports-0123456789abcdef01234567-0
		return serviceIn(name)
	case prefixMessages:
		// ip daddr . icmp type . icmp code @messages-0123456789abcdef01234567-0
		return part{"ip daddr . icmp type . icmp code @" + name, append(append(onlyIPv4(), protocol("icmp", unix.IPPROTO_ICMP).exprs...),
			network(offsetDaddr, reg1), octetAt(0, word1), octetAt(1, word2), in(name))}
	}
	// ip daddr . meta l4proto @others-0123456789abcdef01234567-0
	return otherIn(name)
}

func otherIn(name string) part {
	return part{"ip daddr . meta l4proto @" + name, append(onlyIPv4(), network(offsetDaddr, reg1), meta(expr.MetaKeyL4PROTO, word1), in(name))}
}

// octetAt loads one byte of the transport header.
func octetAt(offset, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 1}
}

func verdictBySender(set string) part {
	return part{"ip saddr vmap @" + set, append(onlyIPv4(), network(offsetSaddr, reg1), verdicts(set))}
}

func newInConntrack() part { return part{"ct state new", ctState(expr.CmpOpNeq, stateNew)} }

func invalidInConntrack() part { return part{"ct state invalid", ctState(expr.CmpOpNeq, stateInvalid)} }

// spanKeys returns the keys of both ends of a span.
func spanKeys(s firewall.Span) (first, last []byte) {
	first, last = s.First.AsSlice(), s.Last.AsSlice()
	switch s.Protocol {
	case secgroup.TCP, secgroup.UDP:
		protocol := []byte{byte(s.Protocol), 0, 0, 0}
		return append(append(first, protocol...), port32(s.From)...), append(append(last, protocol...), port32(s.To)...)
	case secgroup.ICMP:
		return append(first, byte(s.From>>8), 0, 0, 0, byte(s.From), 0, 0, 0), append(last, byte(s.To>>8), 0, 0, 0, byte(s.To), 0, 0, 0)
	}
	return append(first, byte(s.From), 0, 0, 0), append(last, byte(s.To), 0, 0, 0)
}

// parseSpan is the inverse of spanKeys for an element of the set with this name.
func parseSpan(name string, first, last []byte) (s firewall.Span, ok bool) {
	k := kindOf(name)
	if len(first) != int(k.keyLen()) || len(last) != len(first) {
		return s, false
	}
	s.First, s.Last = netip.AddrFrom4([4]byte(first)), netip.AddrFrom4([4]byte(last))
	switch k {
	case kindPorts:
		s.Protocol = secgroup.Protocol(first[4])
		s.From, s.To = binary.BigEndian.Uint16(first[8:]), binary.BigEndian.Uint16(last[8:])
	case kindMessages:
		s.Protocol = secgroup.ICMP
		s.From, s.To = uint16(first[4])<<8|uint16(first[8]), uint16(last[4])<<8|uint16(last[8])
	case kindOthers:
		s.From, s.To = uint16(first[4]), uint16(last[4])
	}
	s.Log = loggedSet(name)
	a, b := spanKeys(s)
	return s, slices.Equal(a, first) && slices.Equal(b, last)
}

func loggedSet(name string) bool {
	_, rest, _ := strings.Cut(name, "-")
	return strings.HasPrefix(rest, "l-")
}

// spanText is a span as nft(8) writes it.
func spanText(s firewall.Span) string {
	addresses := s.First.String()
	if s.Last != s.First {
		addresses += "-" + s.Last.String()
	}
	rng := func(a, b uint16) string {
		if a == b {
			return fmt.Sprint(a)
		}
		return fmt.Sprintf("%d-%d", a, b)
	}
	switch s.Protocol {
	case secgroup.TCP, secgroup.UDP:
		return fmt.Sprintf("%s . %d . %s", addresses, s.Protocol, rng(s.From, s.To))
	case secgroup.ICMP:
		return fmt.Sprintf("%s . %s . %s", addresses, rng(s.From>>8, s.To>>8), rng(s.From&255, s.To&255))
	}
	return fmt.Sprintf("%s . %s", addresses, rng(s.From, s.To))
}
