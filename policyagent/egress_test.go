package policyagent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

// TestReachesSayWhatTheGroupsSay compares what containers reach, and what of it is logged, with asking all rules of their groups one after the other,
// while groups come, go and change.
func TestReachesSayWhatTheGroupsSay(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		reaches := newReaches(DenyNetworks{Always: []string{"20.0.0.7/32"}, Staging: []string{"20.0.0.0/30"}})
		var records []secgroup.Record
		for version := range uint64(30) {
			records = changeGroups(r, records, seed%2 == 0)
			reaches.follow(records, version)
			for range 12 {
				c := secgroup.Container{Space: fmt.Sprint(r.IntN(4)), Workload: []string{secgroup.App, secgroup.Task, secgroup.Staging, "x", ""}[r.IntN(5)],
					Group: identity.Group([]string{"", "m0", "m1"}[r.IntN(3)])}
				checkReach(t, r, &reaches, records, c)
			}
		}
	}
}

func changeGroups(r *rand.Rand, records []secgroup.Record, logs bool) []secgroup.Record {
	out := append([]secgroup.Record(nil), records...)
	for range 1 + r.IntN(3) {
		if n := len(out); n > 0 && (n > 14 || r.IntN(3) == 0) {
			i := r.IntN(n)
			if r.IntN(2) == 0 {
				out[i].Rules = groupRules(r, logs)
				continue
			}
			out = append(out[:i:i], out[i+1:]...)
			continue
		}
		g := secgroup.Record{GUID: fmt.Sprint(r.Uint32()), Name: "n", Rules: groupRules(r, logs), RunningDefault: r.IntN(5) == 0, StagingDefault: r.IntN(6) == 0}
		for s := range 4 {
			if r.IntN(3) == 0 {
				g.RunningSpaces = append(g.RunningSpaces, fmt.Sprint(s))
			}
			if r.IntN(5) == 0 {
				g.StagingSpaces = append(g.StagingSpaces, fmt.Sprint(s))
			}
		}
		if r.IntN(4) == 0 {
			g.Members = []identity.Group{"m1"}
		}
		out = append(out, g)
	}
	return out
}

func groupRules(r *rand.Rand, logs bool) string {
	var rules []secgroup.Rule
	for range r.IntN(4) {
		a, b := r.IntN(12), r.IntN(12)
		port := uint16(80 + r.IntN(3))
		rules = append(rules, secgroup.Rule{Protocol: secgroup.TCP, Log: logs && r.IntN(2) == 0, Ports: []policy.Ports{{First: port, Last: port + uint16(r.IntN(2))}},
			Destinations: []secgroup.Range{{First: netip.AddrFrom4([4]byte{20, 0, 0, byte(min(a, b))}), Last: netip.AddrFrom4([4]byte{20, 0, 0, byte(max(a, b))})}}})
	}
	return secgroup.Format(rules)
}

func checkReach(t *testing.T, r *rand.Rand, reaches *reaches, records []secgroup.Record, c secgroup.Container) {
	t.Helper()
	var groups []secgroup.Group
	for _, x := range records {
		g, _ := x.Group()
		groups = append(groups, g)
	}
	bound, defaults := secgroup.Select(groups, c).Rules()
	rules := append(bound, defaults...)
	e := reaches.dynamic(c)
	if again := reaches.dynamic(c); again != e {
		t.Fatal("the same container has another egress")
	}
	in := firewall.Input{Network: netip.MustParsePrefix("10.255.0.0/16"), VTEP: "silk-vtep",
		Endpoints: []firewall.Endpoint{{Device: "s-010255030002", Address: netip.MustParseAddr("10.255.30.2"), Egress: e}}}
	rs, problems := firewall.Compile(in)
	if len(problems)+len(reaches.problems) > 0 {
		t.Fatal(problems, reaches.problems)
	}
	for range 40 {
		p := secgroup.Packet{Protocol: secgroup.TCP, Destination: netip.AddrFrom4([4]byte{20, 0, 0, byte(r.IntN(13))}), Port: uint16(79 + r.IntN(6))}
		want := secgroup.Match(rules, p)
		if p.Destination.As4()[3] == 7 || c.Workload == secgroup.Staging && p.Destination.As4()[3] < 4 {
			want = nil
		}
		allowed, log := rs.AllowsOut(in.Endpoints[0].Address, p)
		if allowed != (want != nil) || allowed && log != want.Log {
			t.Fatalf("%+v %+v: %v, logged %v, expected %+v of %+v", c, p, allowed, log, want, rules)
		}
	}
}
