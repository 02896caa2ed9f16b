package nft_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// deployed is what the deployed agent and wrapper plugin write on a host, with iptables: marks and allowances in one chain at the top of
// FORWARD, a chain for each container below it.
func deployed(h *firewalltest.Host, marks map[int]string, allowed []string) string {
	var s strings.Builder
	s.WriteString("iptables-nft -N vpa--1\niptables-nft -A FORWARD -j vpa--1\n")
	for n := 1; n <= 3; n++ {
		if mark := marks[n]; mark != "" {
			fmt.Fprintf(&s, "iptables-nft -A vpa--1 -s %v/32 -j MARK --set-xmark 0x%s/0xffffffff\n", h.Address(n), mark)
		}
		fmt.Fprintf(&s, `iptables-nft -N overlay--%[1]d; iptables-nft -A FORWARD -j overlay--%[1]d
			iptables-nft -A overlay--%[1]d -s %[2]v/32 -o silk-vtep -m mark ! --mark 0x0 -j ACCEPT
			iptables-nft -A overlay--%[1]d -d %[2]v/32 -m state --state RELATED,ESTABLISHED -j ACCEPT
			iptables-nft -A overlay--%[1]d -d %[2]v/32 -m mark --mark 0xffff0000 -j ACCEPT
			iptables-nft -A overlay--%[1]d -d %[2]v/32 -j REJECT --reject-with icmp-port-unreachable
			`, n, h.Address(n))
	}
	for _, a := range allowed {
		fmt.Fprintf(&s, "iptables-nft -A vpa--1 %s -j ACCEPT\n", a)
	}
	return s.String()
}

// TestBesideADeployedHost: tags mean the same to this host and to one of the deployed kind, in both directions.
func TestBesideADeployedHost(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 53, 60))
	other := f.w.Hosts[1]
	if err := f.tables[1].Close(); err != nil {
		t.Fatal(err)
	}
	if err := nft.Remove(other.NS); err != nil {
		t.Fatal(err)
	}
	other.Shell(other.NS, deployed(other, map[int]string{1: "0001", 2: "0002"}, []string{
		fmt.Sprintf("-d %v/32 -p tcp -m tcp --dport 80:80 -m mark --mark 0x0001", other.Address(2)),
		fmt.Sprintf("-d %v/32 -p udp -m udp --dport 53:60 -m mark --mark 0x0001", other.Address(2)),
	}))
	// What follows needs no counters of the other host.
	f.tables[1] = f.tables[0]
	for _, x := range []struct {
		proto policy.Protocol
		port  uint16
	}{{policy.TCP, 80}, {policy.UDP, 55}} {
		p := f.packet(1, 1, 2, x.proto, x.port)
		f.arrives(0, 1, p, false)
		f.arrives(1, 0, f.answer(p, 1, 2), true)
		back := firewalltest.Packet{Device: other.Device(1), Source: other.Address(1), Destination: f.w.Hosts[0].Address(2), Protocol: x.proto,
			SourcePort: p.SourcePort, Port: x.port}
		f.arrives(1, 0, back, false)
		f.arrives(0, 1, firewalltest.Packet{Device: f.w.Hosts[0].Device(2), Source: back.Destination, Destination: back.Source, Protocol: x.proto,
			SourcePort: back.Port, Port: back.SourcePort}, true)
		for _, wrong := range []firewalltest.Packet{
			{Device: other.Device(1), Source: other.Address(1), Destination: f.w.Hosts[0].Address(2), Protocol: x.proto, SourcePort: p.SourcePort, Port: x.port + 10},
			{Device: other.Device(2), Source: other.Address(2), Destination: f.w.Hosts[0].Address(2), Protocol: x.proto, SourcePort: p.SourcePort, Port: x.port},
		} {
			f.isRefused(1, 0, nft.NoPolicy, wrong, false)
		}
		refusedThere(t, f, f.packet(1, 1, 2, x.proto, x.port+10))
		refusedThere(t, f, f.packet(2, 1, 2, x.proto, x.port))
	}
	untagged := firewalltest.Packet{Device: other.Device(3), Source: other.Address(3), Destination: f.w.Hosts[0].Address(2), Protocol: policy.TCP, SourcePort: 9999, Port: 80}
	other.Shell(other.NS, fmt.Sprintf("iptables-nft -I FORWARD -s %v -j ACCEPT", other.Address(3)))
	f.isRefused(1, 0, nft.NoTag, untagged, false)
}

// refusedThere sends a packet from host 0 that the deployed host must refuse: one that is allowed, sent after it, arrives alone.
func refusedThere(t *testing.T, f *fleet, p firewalltest.Packet) {
	t.Helper()
	if err := f.w.Hosts[0].Send(p, false); err != nil {
		t.Fatal(err)
	}
	heard := false
	good := f.packet(1, 1, 2, policy.TCP, 80)
	if err := f.w.Hosts[0].Send(good, false); err != nil {
		t.Fatal(err)
	}
	testkit.Within(t, 2*time.Second, func() string {
		wrong := "the allowed packet did not arrive"
		f.w.Hosts[1].Hear(func(got firewalltest.Packet) {
			got.Device = p.Device
			heard = heard || got == p
			if got.Device = good.Device; got == good {
				wrong = ""
			}
		})
		return wrong
	})
	if heard {
		t.Errorf("%+v arrived", p)
	}
}
