package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
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

// egressRules returns n rules of which the last lets out what is measured: of eight one is for a range of addresses, one for a single one, and the others for networks. Those
// of another seed have nothing in common.
func egressRules(n, seed int) []secgroup.Rule {
	out := make([]secgroup.Rule, 0, n)
	for i := range n - 1 {
		first := [4]byte{byte(20 + seed), byte(i >> 6), byte(i << 2), 0}
		last := [4]byte{byte(20 + seed), byte(i >> 6), byte(i<<2) + byte(i%2), 255}
		switch i % 8 {
		case 3:
			first[3], last[3] = 3, 250
		case 7:
			last = first
		}
		r := secgroup.Rule{Protocol: secgroup.TCP, Destinations: []secgroup.Range{{First: netip.AddrFrom4(first), Last: netip.AddrFrom4(last)}},
			Ports: []policy.Ports{{First: 443, Last: 443}}}
		switch i % 5 {
		case 1:
			r.Ports = []policy.Ports{{First: uint16(8000 + i), Last: uint16(8100 + i)}}
		case 2:
			r.Protocol, r.Ports = secgroup.UDP, []policy.Ports{{First: 53, Last: 53}}
		case 3:
			r.Ports = []policy.Ports{{First: 80, Last: 80}, {First: 8080, Last: 8090}}
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
