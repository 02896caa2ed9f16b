package firewall

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

const (
	outside    = "out" // what hosts reach by their default route
	manyRules  = 1000  // of one container
	containers = 250   // on a host
)

// leadOut gives the first host an outside with a server's address.
func (w *world) leadOut() error {
	err := shell(w.hosts[0], fmt.Sprintf(`ip link add out type veth peer name in netns %s
		ip addr add 203.0.113.1/24 dev out; ip link set out up; ip route add default via %v`, path(w.containers[outside]), addresses[outside]))
	if err != nil {
		return err
	}
	return shell(w.containers[outside], fmt.Sprintf("ip addr add %v/24 dev in; ip link set in up; ip route add default via 203.0.113.1", addresses[outside]))
}

// egressRules returns n rules for networks, ranges and ports that differ, the last of which lets out what is measured. Those of another seed have nothing in common.
func egressRules(n, seed int) []secgroup.Rule {
	out := make([]secgroup.Rule, 0, n)
	for i := range n - 1 {
		first := netip.AddrFrom4([4]byte{byte(20 + seed), byte(i >> 6), byte(i << 2), 3})
		last := netip.AddrFrom4([4]byte{byte(20 + seed), byte(i >> 6), byte(i<<2) + byte(i%4), 250})
		r := secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: first, Last: last}}, Ports: []policy.Ports{{First: 443, Last: 443}}}
		switch i % 4 {
		case 1:
			r.Ports = []policy.Ports{{First: uint16(8000 + i), Last: uint16(8100 + i)}}
		case 2:
			r.Protocol, r.Ports = secgroup.UDP, []policy.Ports{{First: 53, Last: 53}}
		}
		out = append(out, r)
	}
	to := addresses[outside]
	return append(out, secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: to, Last: to}}, Ports: []policy.Ports{{First: port, Last: port}}})
}

// egress measures what rules for the outside cost: connections through many of them, and a change that touches all containers of a host.
func egress(ctx context.Context, r *bench.Report) error {
	return errors.Join(egressRates(ctx, r), egressChange(ctx, r))
}

func egressRates(ctx context.Context, r *bench.Report) error {
	var vs []*variant
	defer func() {
		for _, v := range vs {
			v.close()
		}
	}()
	for _, n := range []int{0, 1, manyRules} {
		v := &variant{name: fmt.Sprint(n)}
		vs = append(vs, v)
		var err error
		if v.world, err = newWorld(ctx); err != nil {
			return err
		}
		ns := v.world.hosts[0]
		if err := shell(ns, "sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=5 net.netfilter.nf_conntrack_tcp_timeout_close=2"); err != nil {
			return err
		}
		t, err := nft.Open(ns, nft.Options{})
		if err != nil {
			return err
		}
		v.tables = append(v.tables, t)
		in := firewall.Input{Network: overlayNet, VTEP: vtep, Endpoints: []firewall.Endpoint{endpointOf("a1")}}
		if n > 0 {
			l, problems := firewall.NewList(egressRules(n, 0))
			if len(problems) > 0 {
				return fmt.Errorf("rules: %v", problems[0])
			}
			in.Endpoints[0].Egress = &firewall.Egress{Lists: []*firewall.List{l}}
		}
		rs, problems := firewall.Compile(in)
		if len(problems) > 0 {
			return fmt.Errorf("compile: %v", problems[0])
		}
		if _, err := t.Set(ctx, rs); err != nil {
			return err
		}
	}
	connections := measures[1]
	rates, err := connections.all(ctx, vs, "a1", outside)
	if err != nil {
		return err
	}
	judge(r, "firewall.egress.crr.1000_of_1", rates[fmt.Sprint(manyRules)], rates["1"], 0.95)
	judge(r, "firewall.egress.crr.1000_of_unrestricted", rates[fmt.Sprint(manyRules)], rates["0"], 0)
	return nil
}

// egressChange measures, for containers of which each has rules of its own, a change of a security group that all of them have: from the groups to the kernel.
// In the kernel all containers change in one transaction, the last.
func egressChange(ctx context.Context, r *bench.Report) error {
	ns, err := kernel.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	t, err := nft.Open(ns, nft.Options{})
	if err != nil {
		return err
	}
	defer t.Close()
	for _, x := range []struct {
		name   string
		shared bool
	}{{"shared", true}, {"own", false}} {
		var took []float64
		for i := range 7 {
			groups := groupsOf(i, x.shared)
			var c nft.Changes
			ms, err := bench.Millis(func() error {
				rs, err := reachesOf(groups)
				if err == nil {
					c, err = t.Set(ctx, rs)
				}
				return err
			})
			if err == nil && c.Sent == 0 {
				err = errEmpty
			}
			if err != nil {
				return err
			}
			if i > 0 { // the first makes all of it
				took = append(took, ms)
			}
		}
		r.AtMost("firewall.egress.change."+x.name, bench.Median(took), "ms", 1000)
		r.Add("firewall.egress.change."+x.name+".longest", max(took[0], took[1], took[2], took[3], took[4], took[5]), "ms", math.NaN())
	}
	return nil
}

// groupsOf returns the security groups of spaces, one for each container: one that all have, which is another in every version, and unless all have the same rules
// one for each.
func groupsOf(version int, shared bool) []secgroup.Group {
	common := secgroup.Group{GUID: "common", Rules: egressRules(manyRules/10, 1+version%2)}
	rest := secgroup.Group{GUID: "rest", Rules: egressRules(manyRules-manyRules/10, 3)}
	var all []secgroup.Group
	for i := range containers {
		space := fmt.Sprint(i)
		common.RunningSpaces = append(common.RunningSpaces, space)
		if shared {
			rest.RunningSpaces = append(rest.RunningSpaces, space)
			continue
		}
		own := secgroup.Group{GUID: space, Rules: append([]secgroup.Rule(nil), rest.Rules...), RunningSpaces: []string{space}}
		a := netip.AddrFrom4([4]byte{99, 0, 0, byte(i)})
		own.Rules[0] = secgroup.Rule{Destinations: []secgroup.Range{{First: a, Last: a}}}
		all = append(all, own)
	}
	return append(all, common, rest)
}

// reachesOf is what an agent makes of groups for its containers.
func reachesOf(groups []secgroup.Group) (firewall.Ruleset, error) {
	in := firewall.Input{Network: overlayNet, VTEP: vtep}
	for i := range containers {
		bound, _ := secgroup.Select(groups, secgroup.Container{Space: fmt.Sprint(i), Workload: secgroup.App}).Rules()
		l, problems := firewall.NewList(bound)
		if len(problems) > 0 {
			return firewall.Ruleset{}, fmt.Errorf("rules: %v", problems[0])
		}
		in.Endpoints = append(in.Endpoints, firewall.Endpoint{
			Device: fmt.Sprintf("s-010255030%03d", i), Address: netip.AddrFrom4([4]byte{10, 255, 30, byte(i)}), Egress: &firewall.Egress{Lists: []*firewall.List{l}}})
	}
	rs, problems := firewall.Compile(in)
	if len(problems) > 0 {
		return rs, fmt.Errorf("compile: %v", problems[0])
	}
	return rs, nil
}
