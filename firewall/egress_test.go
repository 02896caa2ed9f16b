package firewall_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

func addr(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// anyRules are rules that touch and overlap each other in few addresses and ports.
func anyRules(r *rand.Rand, n int) []secgroup.Rule {
	edges := []uint32{0, 1, 2, 9, 10, 11, 100, 0x0a000000, 0x0a0000ff, 0xfffffffe, 0xffffffff}
	span := func() secgroup.Range {
		a, b := edges[r.IntN(len(edges))], edges[r.IntN(len(edges))]
		return secgroup.Range{First: addr(min(a, b)), Last: addr(max(a, b))}
	}
	var out []secgroup.Rule
	for range n {
		x := secgroup.Rule{Protocol: []secgroup.Protocol{secgroup.All, secgroup.ICMP, secgroup.TCP, secgroup.TCP, secgroup.UDP, 132}[r.IntN(6)],
			Destinations: []secgroup.Range{span()}, Log: r.IntN(3) == 0}
		for r.IntN(3) == 0 {
			x.Destinations = append(x.Destinations, span())
		}
		switch x.Protocol {
		case secgroup.TCP, secgroup.UDP:
			for len(x.Ports) == 0 || r.IntN(3) == 0 {
				a, b := somePort(r), somePort(r)
				x.Ports = append(x.Ports, policy.Ports{First: min(a, b), Last: max(a, b)})
			}
		case secgroup.ICMP:
			x.Type, x.Code = []int16{secgroup.Any, 0, 3, 8, 255}[r.IntN(5)], []int16{secgroup.Any, 0, 1, 255}[r.IntN(4)]
		}
		out = append(out, x)
	}
	return out
}

func somePort(r *rand.Rand) uint16 {
	return []uint16{1, 2, 3, 79, 80, 81, 443, 65534, 65535}[r.IntN(9)]
}

func anyPacket(r *rand.Rand) secgroup.Packet {
	to := []uint32{0, 1, 3, 9, 10, 11, 12, 100, 101, 0x0a000000, 0x0a000080, 0xfffffffd, 0xffffffff}
	p := secgroup.Packet{Protocol: []secgroup.Protocol{secgroup.ICMP, secgroup.TCP, secgroup.UDP, 132, 47}[r.IntN(5)], Destination: addr(to[r.IntN(len(to))])}
	switch p.Protocol {
	case secgroup.TCP, secgroup.UDP:
		p.Port = somePort(r)
	case secgroup.ICMP:
		p.Type, p.Code = []uint8{0, 3, 8, 77, 255}[r.IntN(5)], []uint8{0, 1, 2, 255}[r.IntN(4)]
	}
	return p
}

// TestListsSayWhatTheirRulesSay compares lists with their rules, one after the other, and looks for spans that have something in common.
func TestListsSayWhatTheirRulesSay(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		rules := anyRules(r, r.IntN(9))
		l, problems := firewall.NewList(rules)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		for range 500 {
			p := anyPacket(r)
			want := secgroup.Match(rules, p)
			allowed, log := l.Allows(p)
			if allowed != (want != nil) || allowed && log != want.Log {
				t.Fatalf("seed %d: %+v: %v, logged %v, expected %+v\nrules %+v\nspans %+v", seed, p, allowed, log, want, rules, l.Spans())
			}
		}
		spans := l.Spans()
		for i, a := range spans {
			if a.First.Compare(a.Last) > 0 || a.From > a.To || a.Protocol == secgroup.ICMP && a.From>>8 != a.To>>8 && (a.From&255 != 0 || a.To&255 != 255) {
				t.Fatalf("seed %d: span %+v", seed, a)
			}
			for _, b := range spans[:i] {
				if a.Protocol == b.Protocol && a.First.Compare(b.Last) <= 0 && b.First.Compare(a.Last) <= 0 && a.From <= b.To && b.From <= a.To {
					t.Fatalf("seed %d: %+v and %+v have something in common", seed, a, b)
				}
			}
		}
	}
}

// TestListsThatSayTheSameAreOne: the ID does not depend on how rules are written.
func TestListsThatSayTheSameAreOne(t *testing.T) {
	tcp := func(first, last uint32, ports ...uint16) secgroup.Rule {
		x := secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: addr(first), Last: addr(last)}}}
		for i := 0; i < len(ports); i += 2 {
			x.Ports = append(x.Ports, policy.Ports{First: ports[i], Last: ports[i+1]})
		}
		return x
	}
	id := func(rules ...secgroup.Rule) string {
		l, problems := firewall.NewList(rules)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return l.ID()
	}
	want := id(tcp(10, 20, 80, 90))
	for name, got := range map[string]string{
		"twice": id(tcp(10, 20, 80, 90), tcp(10, 20, 80, 90)), "in addresses": id(tcp(10, 15, 80, 90), tcp(16, 20, 80, 90)),
		"in ports": id(tcp(10, 20, 85, 90, 80, 84)), "overlapping": id(tcp(12, 20, 80, 90), tcp(10, 14, 80, 90)),
	} {
		if got != want {
			t.Errorf("%s: another list", name)
		}
	}
	logged := tcp(10, 20, 80, 90)
	logged.Log = true
	for name, got := range map[string]string{"more ports": id(tcp(10, 20, 80, 91)), "logged": id(logged), "nothing": id(), "logged first": id(logged, tcp(10, 20, 80, 90))} {
		if got == want {
			t.Errorf("%s: the same list", name)
		}
	}
	if id(tcp(10, 20, 80, 90), logged) != want {
		t.Error("a rule that is never asked makes another list")
	}
}

// TestAListIsBounded: what cannot be held is left out, named, and closed; what can be is in force.
func TestAListIsBounded(t *testing.T) {
	v6 := netip.MustParseAddr("fd00::1")
	first := secgroup.Rule{Protocol: secgroup.UDP, Destinations: []secgroup.Range{{First: v6, Last: v6}, {First: addr(1), Last: addr(1)}}, Ports: []policy.Ports{{First: 53, Last: 53}}}
	for name, rules := range map[string][]secgroup.Rule{
		"crossing":       crossing(600),
		"nested":         nested(9000),
		"one with much":  {{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: addr(9), Last: addr(9)}}, Ports: slices.Repeat([]policy.Ports{{First: 9, Last: 9}}, firewall.MaxSpans+1)}},
		"many addresses": scattered(firewall.MaxSpans + 1),
	} {
		l, problems := firewall.NewList(append([]secgroup.Rule{first}, rules...))
		if len(problems) != 2 || !strings.Contains(problems[0].String(), "rule 1: ") || !errors.Is(problems[1].Err, fault.Exhausted) {
			t.Fatalf("%s: problems %v", name, problems)
		}
		var from, to int
		if _, err := fmt.Sscanf(problems[1].What, "rules %d to %d", &from, &to); err != nil || from < 2 || to != len(rules)+1 {
			t.Fatalf("%s: %v", name, problems[1])
		}
		whole := append([]secgroup.Rule{first}, rules...)
		kept, again := firewall.NewList(whole[:from-1])
		if kept.ID() != l.ID() || len(again) != 1 || len(l.Spans()) > firewall.MaxSpans {
			t.Errorf("%s: the list has %d spans, and is not the rules before rule %d", name, len(l.Spans()), from)
		}
		if ok, _ := l.Allows(secgroup.Packet{Protocol: secgroup.UDP, Destination: addr(1), Port: 53}); !ok {
			t.Errorf("%s: the first rule is not enforced", name)
		}
		t.Logf("%s: %d of %d rules, %d spans", name, from-1, to, len(l.Spans()))
	}
}

// crossing are n rules for all ports of some addresses, which are logged, and n for some ports of all addresses.
func crossing(n int) (out []secgroup.Rule) {
	for i := range n {
		a := addr(uint32(1000 + 2*i))
		out = append(out, secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: a, Last: a}}, Ports: []policy.Ports{{First: 1, Last: 65535}}, Log: true})
	}
	for i := range n {
		out = append(out, secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: addr(0), Last: addr(0xffffffff)}},
			Ports: []policy.Ports{{First: uint16(1 + 2*i), Last: uint16(1 + 2*i)}}})
	}
	return out
}

// nested are rules that are hard to look at, though little comes of them.
func nested(n int) (out []secgroup.Rule) {
	for i := range n {
		out = append(out, secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: addr(uint32(1000 + i)), Last: addr(uint32(100000 - i))}},
			Ports: []policy.Ports{{First: uint16(30000 - i%7), Last: uint16(30001 + i)}}})
	}
	return out
}

func scattered(n int) (out []secgroup.Rule) {
	for i := range n {
		a := addr(uint32(1000 + 2*i))
		out = append(out, secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: a, Last: a}}, Ports: []policy.Ports{{First: 1, Last: 2}}})
	}
	return out
}

func TestWhoReachesWhat(t *testing.T) {
	list := func(rules ...secgroup.Rule) *firewall.List { l, _ := firewall.NewList(rules); return l }
	all := []secgroup.Range{{First: addr(0), Last: addr(0xffffffff)}}
	web := secgroup.Rule{Protocol: secgroup.TCP, Destinations: all, Ports: []policy.Ports{{First: 80, Last: 80}}}
	logged := web
	logged.Log = true
	dns := secgroup.Rule{Protocol: secgroup.UDP, Destinations: all, Ports: []policy.Ports{{First: 53, Last: 53}}}
	deny := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("169.254.7.0/24"), netip.MustParsePrefix("fd00::/8")})
	in := firewall.Input{Network: network, VTEP: "silk-vtep", Endpoints: []firewall.Endpoint{end(2, ""), end(3, ""), end(4, ""), end(5, ""), end(6, ""), end(7, "")}}
	for i, e := range []*firewall.Egress{
		nil, {}, {Deny: deny, Open: true}, {Deny: deny, Lists: []*firewall.List{nil, list(), list(web), list(logged, dns)}},
		{Deny: deny, Lists: []*firewall.List{list(web, web), list(logged, dns)}}, {Deny: firewall.NewDeny(nil), Open: true},
	} {
		in.Endpoints[i].Egress = e
	}
	rs := compileAll(t, in)
	if len(rs.Reaches) != 3 || len(rs.Outside) != 6 || rs.Outside[3].Reach != rs.Outside[4].Reach || rs.Outside[0].Reach != "" || rs.Outside[5].Reach != "" {
		t.Errorf("%+v\n%+v", rs.Outside, rs.Reaches)
	}
	tcp := func(to string, port uint16) secgroup.Packet {
		return secgroup.Packet{Protocol: secgroup.TCP, Destination: netip.MustParseAddr(to), Port: port}
	}
	for _, x := range []struct {
		from    byte
		packet  secgroup.Packet
		allowed bool
		log     bool
	}{
		{2, tcp("1.1.1.1", 80), true, false}, {2, tcp("169.254.1.1", 80), true, false}, {3, tcp("1.1.1.1", 80), false, false},
		{4, tcp("1.1.1.1", 99), true, false}, {4, tcp("169.254.1.1", 80), false, false}, {5, tcp("1.1.1.1", 80), true, false},
		{5, tcp("169.254.255.255", 80), false, false}, {5, tcp("1.1.1.1", 81), false, false}, {7, tcp("169.254.1.1", 80), true, false},
		{5, secgroup.Packet{Protocol: secgroup.UDP, Destination: netip.MustParseAddr("9.9.9.9"), Port: 53}, true, false}, {9, tcp("1.1.1.1", 80), false, false},
	} {
		if allowed, log := rs.AllowsOut(at(x.from), x.packet); allowed != x.allowed || log != x.log {
			t.Errorf("from %d %+v: %v, logged %v", x.from, x.packet, allowed, log)
		}
	}
}

func compileAll(t *testing.T, in firewall.Input) firewall.Ruleset {
	t.Helper()
	rs, problems := firewall.Compile(in)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return rs
}

// TestDeniedNetworksAreNeverCutShort: a list of them is whole, however long.
func TestDeniedNetworksAreNeverCutShort(t *testing.T) {
	var networks []netip.Prefix
	for i := range uint32(firewall.MaxSpans + 100) {
		networks = append(networks, netip.PrefixFrom(addr(1000+2*i), 32))
	}
	l := firewall.NewDeny(networks)
	for _, i := range []int{0, firewall.MaxSpans, len(networks) - 1} {
		if denied, _ := l.Allows(secgroup.Packet{Protocol: 47, Destination: networks[i].Addr()}); !denied {
			t.Errorf("network %d is not denied", i)
		}
	}
}

// TestWhatIsLoggedAnyway: somebody has to listen when a rule or the limit asks for it.
func TestWhatIsLoggedAnyway(t *testing.T) {
	in := firewall.Input{Network: network, VTEP: "silk-vtep", Endpoints: []firewall.Endpoint{end(2, "")}}
	rule := secgroup.Rule{Destinations: []secgroup.Range{{First: addr(1), Last: addr(1)}}}
	for name, x := range map[string]struct {
		limit firewall.Limit
		log   bool
		want  bool
	}{
		"nothing": {}, "a rule": {log: true, want: true}, "a limit": {limit: firewall.Limit{Rate: 1, Burst: 1}},
		"a limit that logs": {limit: firewall.Limit{Rate: 1, Burst: 1, Log: true}, want: true}, "a dry run": {limit: firewall.Limit{Rate: 1, Burst: 1, Dry: true}, want: true},
	} {
		in.Limit, rule.Log = x.limit, x.log
		l, _ := firewall.NewList([]secgroup.Rule{rule})
		in.Endpoints[0].Egress = &firewall.Egress{Lists: []*firewall.List{l}}
		if rs := compileAll(t, in); rs.Logs() != x.want {
			t.Errorf("%s: logged %v", name, rs.Logs())
		}
	}
}
