package firewall_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"github.com/google/go-cmp/cmp"
)

var network = netip.MustParsePrefix("10.255.0.0/16")

func at(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 30, last}) }

func end(last byte, group identity.Group) firewall.Endpoint {
	return firewall.Endpoint{Device: fmt.Sprintf("s-010255030%03d", last), Address: at(last), Group: group}
}

func rule(from, to identity.Group, fromTag, toTag identity.Tag, p policy.Protocol, ports policy.Ports) policy.Rule {
	return policy.Rule{Policy: policy.Policy{Source: from, Destination: to, Protocol: p, Ports: ports}, SourceTag: fromTag, DestinationTag: toTag}
}

func one(port uint16) policy.Ports { return policy.Ports{First: port, Last: port} }

func TestCompile(t *testing.T) {
	in := firewall.Input{
		Network: netip.MustParsePrefix("10.255.9.9/16"), VTEP: "silk-vtep", Router: 9,
		Endpoints: []firewall.Endpoint{end(3, "api"), end(2, "web"), end(4, "api"), end(5, ""), end(6, "alone")},
		Rules: []policy.Rule{
			rule("web", "api", 1, 2, policy.TCP, policy.Ports{First: 8080, Last: 8090}),
			rule("web", "api", 1, 2, policy.TCP, policy.Ports{First: 8090, Last: 8100}), // overlaps
			rule("web", "api", 1, 2, policy.TCP, one(8095)),                             // inside
			rule("web", "api", 1, 2, policy.TCP, one(8101)),                             // beside
			rule("web", "api", 1, 2, policy.UDP, one(53)),
			rule("api", "api", 2, 2, policy.TCP, one(7000)),
			rule("api", "api", 2, 2, policy.TCP, one(7000)),
			rule("web", "far", 1, 3, policy.TCP, one(443)),
			rule("far", "farther", 3, 4, policy.TCP, one(443)),
		},
		Services: []firewall.Service{{Protocol: policy.TCP, Address: netip.MustParseAddr("10.0.16.15"), Port: 80}},
		DNS:      []netip.Addr{netip.MustParseAddr("169.254.0.2"), netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("fe80::1")},
	}
	in.Endpoints[0].Ingress = []uint16{8080, 0, 8080}
	want := firewall.Ruleset{
		Network: network, VTEP: "silk-vtep", Router: 9,
		Sources: []firewall.Source{{at(2), "s-010255030002", 1}, {at(3), "s-010255030003", 2}, {at(4), "s-010255030004", 2},
			{at(5), "s-010255030005", 0}, {at(6), "s-010255030006", 0}},
		Destinations: []firewall.Destination{{at(2), 0}, {at(3), 2}, {at(4), 2}, {at(5), 0}, {at(6), 0}},
		Groups: []firewall.Group{{2, []firewall.Allow{{1, policy.TCP, policy.Ports{First: 8080, Last: 8100}}, {1, policy.TCP, one(8101)},
			{1, policy.UDP, one(53)}, {2, policy.TCP, one(7000)}}}},
		Ingress: []firewall.Ingress{{at(3), 8080}},
		Services: []firewall.Service{{policy.TCP, netip.MustParseAddr("10.0.16.15"), 80}, {policy.TCP, netip.MustParseAddr("169.254.0.2"), 53},
			{policy.UDP, netip.MustParseAddr("169.254.0.2"), 53}},
		Outside: []firewall.Outside{{Address: at(2)}, {Address: at(3)}, {Address: at(4)}, {Address: at(5)}, {Address: at(6)}},
	}
	equal := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	prefix := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	for range 20 {
		got, problems := firewall.Compile(in)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		if d := cmp.Diff(want, got, equal, prefix); d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
		rand.Shuffle(len(in.Rules), func(i, j int) { in.Rules[i], in.Rules[j] = in.Rules[j], in.Rules[i] })
		rand.Shuffle(len(in.Endpoints), func(i, j int) { in.Endpoints[i], in.Endpoints[j] = in.Endpoints[j], in.Endpoints[i] })
	}
	if rs, _ := firewall.Compile(in); rs.Policies() != 4 {
		t.Errorf("%d allowances", rs.Policies())
	}
}

// TestProblems: what is bad is left out and named, and all else is enforced.
func TestProblems(t *testing.T) {
	good := rule("web", "api", 1, 2, policy.TCP, one(8080))
	for name, x := range map[string]struct {
		change func(*firewall.Input)
		words  string
		allows bool // the good rule still
	}{
		"address of two":      {func(in *firewall.Input) { in.Endpoints = append(in.Endpoints, end(7, "web"), end(7, "api")) }, "2 endpoints have this address", true},
		"one of them is ours": {func(in *firewall.Input) { in.Endpoints = append(in.Endpoints, end(3, "web")) }, "2 endpoints have this address", false},
		"device of others": {func(in *firewall.Input) {
			in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: "eth0", Address: at(8)})
		}, "expected a name such as", true},
		"device that is a prefix": {func(in *firewall.Input) {
			in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: "s-*", Address: at(8)})
		}, "expected a name such as", true},
		"long device": {func(in *firewall.Input) {
			in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: "s-" + strings.Repeat("x", 14), Address: at(8)})
		}, "expected a name such as", true},
		"IPv6": {func(in *firewall.Input) {
			in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: "s-1", Address: netip.MustParseAddr("fd00::1")})
		}, "not IPv4", true},
		"no address": {func(in *firewall.Input) { in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: "s-1"}) }, "not IPv4", true},
		"bad group":  {func(in *firewall.Input) { in.Endpoints = append(in.Endpoints, end(8, "a\x00b")) }, "expected printable", true},
		"no tag":     {func(in *firewall.Input) { in.Rules = append(in.Rules, rule("x", "api", 0, 2, policy.TCP, one(1))) }, "expected 0001 to", true},
		"tag too high": {func(in *firewall.Input) {
			in.MaxTag = 100
			in.Rules = append(in.Rules, rule("x", "api", 101, 2, policy.TCP, one(1)))
		}, "expected 0001 to 0064", true},
		"router too": {func(in *firewall.Input) { in.MaxTag = 100; in.Router = 101 }, "above the highest", true},
		"two tags":   {func(in *firewall.Input) { in.Rules = append(in.Rules, rule("web", "api", 5, 2, policy.TCP, one(1))) }, "has two tags", false},
		"tag of two": {func(in *firewall.Input) { in.Rules = append(in.Rules, rule("x", "api", 1, 2, policy.TCP, one(1))) }, "belongs to two groups", false},
		"tag of another": {func(in *firewall.Input) {
			in.Rules = append(in.Rules, rule("x", "web", 5, 1, policy.TCP, one(1)), rule("y", "web", 5, 1, policy.TCP, one(1)))
		}, "belongs to two groups", true},
		"tag of router": {func(in *firewall.Input) { in.Router = 1 }, "overlay ingress", false},
		"ports": {func(in *firewall.Input) {
			in.Rules = append(in.Rules, rule("web", "api", 1, 2, policy.TCP, policy.Ports{First: 2, Last: 1}))
		}, "expected first <= last", true},
		"protocol": {func(in *firewall.Input) { in.Rules = append(in.Rules, rule("web", "api", 1, 2, 132, one(1))) }, "expected tcp or udp", true},
		"service":  {func(in *firewall.Input) { in.Services = []firewall.Service{{Protocol: policy.TCP, Address: at(1)}} }, "expected tcp or udp", true},
	} {
		in := firewall.Input{Network: network, VTEP: "silk-vtep", Endpoints: []firewall.Endpoint{end(2, "web"), end(3, "api")}, Rules: []policy.Rule{good}}
		x.change(&in)
		rs, problems := firewall.Compile(in)
		if len(problems) == 0 || !strings.Contains(problems[0].String(), x.words) {
			t.Errorf("%s: problems %v, expected %q", name, problems, x.words)
		}
		if rs.Allows(1, at(3), policy.TCP, 8080) != x.allows {
			t.Errorf("%s: the good rule is enforced: %v", name, !x.allows)
		}
		if rs.Allows(1, at(3), policy.TCP, 1) || rs.Allows(5, at(3), policy.TCP, 1) || rs.Allows(0, at(3), policy.TCP, 8080) {
			t.Errorf("%s: something bad is allowed", name)
		}
	}
}

// TestAllowsAgreesWithTheRules compares with looking at every rule.
func TestAllowsAgreesWithTheRules(t *testing.T) {
	for range 300 {
		in := firewall.Input{Network: network, VTEP: "silk-vtep", Unrestricted: rand.IntN(20) == 0}
		for last := range byte(6) {
			if rand.IntN(4) > 0 {
				in.Endpoints = append(in.Endpoints, end(last, identity.Group(fmt.Sprint(rand.IntN(3)))))
			}
		}
		for range rand.IntN(30) {
			first := uint16(1 + rand.IntN(40))
			from, to := rand.IntN(4), rand.IntN(4)
			in.Rules = append(in.Rules, rule(identity.Group(fmt.Sprint(from)), identity.Group(fmt.Sprint(to)), identity.Tag(from+1), identity.Tag(to+1),
				[]policy.Protocol{policy.TCP, policy.UDP}[rand.IntN(2)], policy.Ports{First: first, Last: first + uint16(rand.IntN(3)*rand.IntN(10))}))
		}
		rs, problems := firewall.Compile(in)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		for range 300 {
			from, to, port := identity.Tag(rand.IntN(6)), at(byte(rand.IntN(7))), uint16(rand.IntN(60))
			proto := []policy.Protocol{policy.TCP, policy.UDP, 1}[rand.IntN(3)]
			i := slices.IndexFunc(in.Endpoints, func(e firewall.Endpoint) bool { return e.Address == to })
			want := i >= 0 && (in.Unrestricted || slices.ContainsFunc(in.Rules, func(r policy.Rule) bool {
				return r.SourceTag == from && r.Destination == in.Endpoints[i].Group && r.Protocol == proto && r.Ports.Contains(port)
			}))
			if got := rs.Allows(from, to, proto, port); got != want {
				t.Fatalf("%v to %v %v %d: %v, want %v\nrules %v\nruleset %+v", from, to, proto, port, got, want, in.Rules, rs)
			}
		}
	}
}

// FuzzCompile: whatever it is given, what comes out is well formed.
func FuzzCompile(f *testing.F) {
	f.Add("web", "api", uint16(1), uint16(2), uint8(6), uint16(80), uint16(90), "s-010255030002", []byte{10, 255, 30, 2})
	f.Add("", "a,b", uint16(0), uint16(0), uint8(1), uint16(9), uint16(1), "s-*", []byte{0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, from, to string, fromTag, toTag uint16, proto uint8, first, last uint16, device string, addr []byte) {
		a, _ := netip.AddrFromSlice(addr)
		in := firewall.Input{Network: network, VTEP: "silk-vtep",
			Endpoints: []firewall.Endpoint{{Device: device, Address: a, Group: identity.Group(to)}, end(9, identity.Group(to)), end(10, identity.Group(from))},
			Rules: []policy.Rule{rule(identity.Group(from), identity.Group(to), identity.Tag(fromTag), identity.Tag(toTag), policy.Protocol(proto), policy.Ports{First: first, Last: last}),
				rule("b", identity.Group(to), 7, identity.Tag(toTag), policy.TCP, one(80))}}
		rs, _ := firewall.Compile(in)
		for _, s := range rs.Sources {
			if !s.Address.Is4() || len(s.Device) > 15 || !strings.HasPrefix(s.Device, "s-") {
				t.Errorf("source %+v", s)
			}
		}
		for _, g := range rs.Groups {
			for i, x := range g.Allowed {
				if x.Source == 0 || g.Tag == 0 || x.Ports.First == 0 || x.Ports.Last < x.Ports.First || i > 0 && firewall.CompareAllow(g.Allowed[i-1], x) >= 0 {
					t.Errorf("group %v: %+v", g.Tag, g.Allowed)
				}
			}
		}
	})
}
