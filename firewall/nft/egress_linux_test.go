package nft_test

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

// to is a rule for some addresses: "10.0.0.0/8", or from one to another.
func to(protocol secgroup.Protocol, first, last string, ports ...uint16) secgroup.Rule {
	r := secgroup.Rule{Protocol: protocol, Destinations: []secgroup.Range{{First: netip.MustParseAddr(first), Last: netip.MustParseAddr(last)}}}
	for i := 0; i+1 < len(ports); i += 2 {
		r.Ports = append(r.Ports, policy.Ports{First: ports[i], Last: ports[i+1]})
	}
	return r
}

func message(typ, code int16, first, last string) secgroup.Rule {
	r := to(secgroup.ICMP, first, last)
	r.Type, r.Code = typ, code
	return r
}

func toLog(r secgroup.Rule) secgroup.Rule { r.Log = true; return r }

func list(t testing.TB, rules ...secgroup.Rule) *firewall.List {
	t.Helper()
	l, problems := firewall.NewList(rules)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return l
}

// restrict gives the endpoints of an example something to reach, of every kind.
func restrict(t testing.TB, in *firewall.Input) {
	deny := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("10.0.0.5/32")})
	shared := list(t, to(secgroup.TCP, "10.0.0.0", "10.0.0.255", 443, 443, 8000, 8100), to(secgroup.UDP, "0.0.0.0", "255.255.255.255", 53, 53),
		message(8, 0, "10.0.0.0", "10.255.255.255"), message(3, secgroup.Any, "10.0.0.0", "10.255.255.255"), message(secgroup.Any, secgroup.Any, "11.0.0.1", "11.0.0.3"))
	own := list(t, to(secgroup.All, "10.1.0.0", "10.1.255.255"), to(132, "10.2.0.0", "10.2.0.9"), toLog(to(secgroup.TCP, "10.3.0.1", "10.3.0.1", 1, 65535)),
		toLog(message(8, 0, "10.3.0.1", "10.3.0.1")), toLog(to(47, "10.3.0.1", "10.3.0.1")))
	for i := range in.Endpoints {
		switch i {
		case 0:
			in.Endpoints[i].Egress = &firewall.Egress{Deny: deny, Lists: []*firewall.List{own, shared}}
		case 1:
			in.Endpoints[i].Egress = &firewall.Egress{Lists: []*firewall.List{shared}}
		case 2:
			in.Endpoints[i].Egress = &firewall.Egress{Deny: deny, Open: true}
		}
	}
	in.Limit = firewall.Limit{Rate: 100, Burst: 1000, Log: true}
}

// TestAnEarlierTableLearnsToRestrict: a table that was made by a version without any of this becomes what it should be, however many endpoints are restricted at once.
func TestAnEarlierTableLearnsToRestrict(t *testing.T) {
	h := newHost(t)
	in := example()
	restrict(t, &in)
	table := h.open(nft.Options{Unowned: true})
	set(t, table, compile(t, in))
	table.Close()
	// What an earlier version did not have, without what refers to it.
	var less strings.Builder
	less.WriteString("flush chain inet silk-policy to-outside\nflush map inet silk-policy outside\n")
	for _, kind := range []string{"flush", "delete"} {
		for line := range strings.Lines(h.sh("nft list chains inet | grep -oE '(reach|egress|refuse-(no-rule|denied|rate|invalid))[^ ]*' | sort -r")) {
			less.WriteString(kind + " chain inet silk-policy " + line)
		}
	}
	less.WriteString("delete map inet silk-policy outside\n")
	h.sh("cat > /tmp/silk-less.$$ <<'END'\n" + less.String() + "END\nnft -f /tmp/silk-less.$$; rm /tmp/silk-less.$$")
	table = h.open(nft.Options{Unowned: true})
	set(t, table, compile(t, in))
	holds(t, table, compile(t, in))
}

// someEgress is what endpoints of a random state may reach: few of them differ.
func someEgress(t testing.TB, r *rand.Rand) func() *firewall.Egress {
	deny := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("169.254.0.0/16")})
	var all []*firewall.Egress
	for range 6 {
		e := &firewall.Egress{}
		if r.IntN(2) == 0 {
			e.Deny = deny
		}
		for range r.IntN(3) {
			e.Lists = append(e.Lists, list(t, someRules(r, r.IntN(40))...))
		}
		e.Open = r.IntN(6) == 0
		all = append(all, e)
	}
	all = append(all, nil, nil)
	return func() *firewall.Egress { return all[r.IntN(len(all))] }
}

func someRules(r *rand.Rand, n int) (out []secgroup.Rule) {
	for range n {
		base := [4]byte{byte(1 + r.IntN(3)), 0, 0, byte(r.IntN(256))}
		end := base
		end[3] += byte(r.IntN(256 - int(base[3])))
		x := secgroup.Rule{Protocol: []secgroup.Protocol{secgroup.All, secgroup.ICMP, secgroup.TCP, secgroup.TCP, secgroup.UDP, 132}[r.IntN(6)],
			Destinations: []secgroup.Range{{First: netip.AddrFrom4(base), Last: netip.AddrFrom4(end)}}, Log: r.IntN(4) == 0}
		switch x.Protocol {
		case secgroup.TCP, secgroup.UDP:
			first := uint16(1 + r.IntN(60000))
			x.Ports = []policy.Ports{{First: first, Last: first + uint16(r.IntN(3)*r.IntN(500))}}
		case secgroup.ICMP:
			x.Type, x.Code = int16(r.IntN(257)-1), int16(r.IntN(257)-1)
		}
		out = append(out, x)
	}
	return out
}
