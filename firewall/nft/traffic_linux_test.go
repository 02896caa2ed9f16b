package nft_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// fleet is two hosts with containers, each host with a table.
type fleet struct {
	t      *testing.T
	w      *firewalltest.World
	tables [2]*nft.Table
	in     [2]firewall.Input
	port   uint16
}

// newFleet makes containers 1 to 3 on each host: number 1 is of group 1, number 2 of group 2, number 3 of none.
func newFleet(t *testing.T, o nft.Options) *fleet {
	t.Helper()
	f := &fleet{t: t, w: firewalltest.NewWorld(t, 4), port: 20000}
	for i, h := range f.w.Hosts {
		table, err := nft.Open(h.NS, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { table.Close() })
		f.tables[i] = table
		f.in[i] = firewall.Input{Network: firewalltest.Network, VTEP: firewalltest.VTEP}
		for n := range 3 {
			e := firewall.Endpoint{Device: h.Device(n + 1), Address: h.Address(n + 1), Group: group(identity.Tag((n + 1) % 3))}
			f.in[i].Endpoints = append(f.in[i].Endpoints, e)
		}
	}
	return f
}

// set has both hosts enforce rules.
func (f *fleet) set(rules ...policy.Rule) {
	f.t.Helper()
	for i := range f.tables {
		f.in[i].Rules = rules
		set(f.t, f.tables[i], compile(f.t, f.in[i]))
	}
}

// packet is a new one from container number from of host 0.
func (f *fleet) packet(from, host, to int, proto policy.Protocol, port uint16) firewalltest.Packet {
	f.port++
	h := f.w.Hosts[0]
	return firewalltest.Packet{Device: h.Device(from), Source: h.Address(from), Destination: f.w.Hosts[host].Address(to),
		Protocol: proto, SourcePort: f.port, Port: port}
}

// answer turns a packet from host 0 round.
func (f *fleet) answer(p firewalltest.Packet, host, from int) firewalltest.Packet {
	return firewalltest.Packet{Device: f.w.Hosts[host].Device(from), Source: p.Destination, Destination: p.Source, Protocol: p.Protocol,
		SourcePort: p.Port, Port: p.SourcePort}
}

// arrives sends a packet from one host and fails the test unless the other gets it.
func (f *fleet) arrives(from, to int, p firewalltest.Packet, answer bool) {
	f.t.Helper()
	if err := f.w.Hosts[from].Send(p, answer); err != nil {
		f.t.Fatal(err)
	}
	testkit.Within(f.t, 2*time.Second, func() string {
		wrong := fmt.Sprintf("%+v did not arrive; refused: %v", p, f.refused())
		f.w.Hosts[to].Hear(func(got firewalltest.Packet) {
			if got.Device = p.Device; got == p {
				wrong = ""
			}
		})
		return wrong
	})
}

// refused returns the counters of both hosts.
func (f *fleet) refused() [2]map[nft.Reason]uint64 {
	f.t.Helper()
	var out [2]map[nft.Reason]uint64
	for i, table := range f.tables {
		s, err := table.Stats(context.Background())
		if err != nil {
			f.t.Fatal(err)
		}
		out[i] = s.Refused
	}
	return out
}

// isRefused sends a packet from one host and fails the test unless a host refuses it for that reason.
func (f *fleet) isRefused(from, by int, reason nft.Reason, p firewalltest.Packet, answer bool) {
	f.t.Helper()
	before := f.refused()
	if err := f.w.Hosts[from].Send(p, answer); err != nil {
		f.t.Fatal(err)
	}
	testkit.Within(f.t, 2*time.Second, func() string {
		if now := f.refused(); now[by][reason] == before[by][reason] {
			return fmt.Sprintf("%+v was not refused by host %d for %s: %v, before %v", p, by, reason, now, before)
		}
		return ""
	})
}

func TestNothingPassesBeforeTheFirstSet(t *testing.T) {
	f := newFleet(t, nft.Options{})
	for host := range 2 {
		f.isRefused(0, 0, nft.UnknownSource, f.packet(1, host, 2, policy.TCP, 80), false)
	}
	f.isRefused(1, 1, nft.UnknownSource, f.answer(f.packet(1, 1, 2, policy.UDP, 80), 1, 2), false)
	// From outside, once the path is known to be there: the underlay of the other host routes to it.
	f.w.Hosts[1].Shell(f.w.Hosts[1].NS, "ip route add 10.255.1.2/32 via 192.168.0.1 src 192.168.0.2")
	if err := f.w.Hosts[1].NS.Do(func() error {
		c, err := net.Dial("udp4", "10.255.1.2:80")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	testkit.Within(t, 2*time.Second, func() string {
		if f.refused()[0][nft.FromOutside] == 0 {
			return fmt.Sprintf("a packet from outside was not refused: %v", f.refused())
		}
		return ""
	})
}

// TestReasons has one packet for each reason that it can be refused for, and says who refuses it.
func TestReasons(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.TCP, 80, 80))
	h := f.w.Hosts[0]
	h.Shell(h.NS, "ip addr add 10.0.16.15/32 dev lo")
	outside := f.packet(1, 0, 2, policy.UDP, 4789)
	outside.Destination = netip.MustParseAddr("192.168.0.2")
	dead := f.packet(1, 0, 99, policy.TCP, 80) // not routed to a container
	spoofed := f.packet(1, 1, 2, policy.TCP, 80)
	spoofed.Source = h.Address(2)
	toHost := f.packet(1, 0, 2, policy.TCP, 22)
	toHost.Destination = netip.MustParseAddr("10.0.16.15")
	spoofedToHost := toHost
	spoofedToHost.Source = h.Address(2)
	closed := f.packet(4, 0, 2, policy.TCP, 80)
	for _, x := range []struct {
		by     int
		reason nft.Reason
		packet firewalltest.Packet
	}{
		{0, nft.NoPolicy, f.packet(1, 0, 2, policy.TCP, 81)},
		{0, nft.NoPolicy, f.packet(1, 0, 2, policy.UDP, 80)},
		{0, nft.NoPolicy, f.packet(2, 0, 1, policy.TCP, 80)},
		{1, nft.NoPolicy, f.packet(1, 1, 2, policy.TCP, 81)},
		{1, nft.NoPolicy, f.packet(2, 1, 2, policy.TCP, 80)},
		{0, nft.NoPolicy, f.packet(1, 0, 3, policy.TCP, 80)},
		{0, nft.NoTag, f.packet(3, 0, 2, policy.TCP, 80)},
		{0, nft.NoTag, f.packet(3, 1, 2, policy.TCP, 80)},
		{0, nft.UnknownSource, spoofed},
		{0, nft.UnknownSource, spoofedToHost},
		{0, nft.UnknownSource, closed},
		{0, nft.UnknownDestination, f.packet(1, 0, 4, policy.TCP, 80)},
		{1, nft.UnknownDestination, f.packet(1, 1, 4, policy.TCP, 80)},
		{0, nft.HostService, toHost},
		{0, nft.VXLAN, outside},
	} {
		f.isRefused(0, x.by, x.reason, x.packet, false)
	}
	// Nobody is there: another host's kernel routes it back to the overlay or away, never to a container.
	if err := h.Send(dead, false); err != nil {
		t.Fatal(err)
	}
	for host := range 2 {
		f.arrives(0, host, f.packet(1, host, 2, policy.TCP, 80), false)
	}
}

// TestHostServices: containers reach what is listed of their host, from their own address.
func TestHostServices(t *testing.T) {
	f := newFleet(t, nft.Options{})
	h := f.w.Hosts[0]
	h.Shell(h.NS, "ip addr add 10.0.16.15/32 dev lo; ip addr add 169.254.0.2/32 dev lo")
	f.in[0].Services = []firewall.Service{{Protocol: policy.UDP, Address: netip.MustParseAddr("10.0.16.15"), Port: 1443}}
	f.in[0].DNS = []netip.Addr{netip.MustParseAddr("169.254.0.2"), netip.MustParseAddr("10.0.16.15")}
	f.set()
	for _, x := range []struct {
		to      string
		allowed bool
	}{{"10.0.16.15:1443", true}, {"169.254.0.2:53", true}, {"10.0.16.15:53", false}, {"169.254.0.2:1443", false}} {
		to := netip.MustParseAddrPort(x.to)
		var conn *net.UDPConn
		if err := h.NS.Do(func() (err error) { conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(to)); return err }); err != nil {
			t.Fatal(err)
		}
		p := f.packet(1, 0, 2, policy.UDP, to.Port())
		p.Destination = to.Addr()
		if !x.allowed {
			f.isRefused(0, 0, nft.HostService, p, false)
		} else {
			if err := h.Send(p, false); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			if _, err := conn.Read(make([]byte, 100)); err != nil {
				t.Errorf("%s: %v; refused: %v", x.to, err, f.refused()[0])
			}
		}
		conn.Close()
	}
}

// TestHostsAreClosedToOtherHostsContainers: also when containers are open to each other, and those without a group too.
func TestHostsAreClosedToOtherHostsContainers(t *testing.T) {
	f := newFleet(t, nft.Options{})
	for _, open := range []bool{false, true} {
		for i := range f.in {
			f.in[i].Unrestricted = open
		}
		f.set(rule(1, 2, policy.TCP, 80, 80))
		for _, from := range []int{1, 3} {
			p := f.packet(from, 1, 0, policy.TCP, 22) // the other host's own address in the overlay
			if from == 3 && !open {
				f.isRefused(0, 0, nft.NoTag, p, false)
			} else {
				f.isRefused(0, 1, nft.HostService, p, false)
			}
		}
	}
	f.arrives(0, 1, f.packet(3, 1, 2, policy.TCP, 81), false)
}

// TestIngress: the router's tag reaches the ports that are open to it, and no others.
func TestIngress(t *testing.T) {
	f := newFleet(t, nft.Options{})
	for i := range f.in {
		f.in[i].Router = 0x99
		f.in[i].Endpoints[1].Ingress = []uint16{8080}
	}
	f.set()
	// Host 0 plays the router: what it sends itself bears the tag, as on a host of the deployed kind.
	h := f.w.Hosts[0]
	h.Shell(h.NS, `nft add table ip router; nft 'add chain ip router output { type route hook output priority -150; }'
		nft add rule ip router output oifname silk-vtep meta mark set 0x99`)
	connect := func(port int) func() error {
		return func() error {
			c, err := net.DialTimeout("tcp4", fmt.Sprintf("10.255.2.2:%d", port), 50*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		}
	}
	h.NS.Do(connect(8080)) // nobody answers: what counts is that it is not refused
	if r := f.refused()[1]; r[nft.NoPolicy]+r[nft.NoTag] != 0 {
		t.Errorf("ingress was refused: %v", r)
	}
	if err := h.NS.Do(connect(8081)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("connect to a port that is not open: %v", err)
	}
	if r := f.refused()[1]; r[nft.NoPolicy] == 0 {
		t.Errorf("ingress to a port that is not open was not refused: %v", r)
	}
}

// TestAnswersPassAndSurvive: what is established lives through changes elsewhere and through another writer of the table.
func TestAnswersPassAndSurvive(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 53, 60))
	type conn struct {
		host int
		p    firewalltest.Packet
	}
	var conns []conn
	for host := range 2 {
		for _, p := range []firewalltest.Packet{f.packet(1, host, 2, policy.TCP, 80), f.packet(1, host, 2, policy.UDP, 55)} {
			f.arrives(0, host, p, false)
			conns = append(conns, conn{host, p})
		}
	}
	alive := func() {
		t.Helper()
		for _, c := range conns {
			f.arrives(c.host, 0, f.answer(c.p, c.host, 2), true)
		}
	}
	alive()
	f.set(rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 53, 60), rule(2, 1, policy.TCP, 1, 65535))
	alive()
	for i := range f.tables {
		f.tables[i].Close()
		table, err := nft.Open(f.w.Hosts[i].NS, nft.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer table.Close()
		f.tables[i] = table
	}
	alive()
	f.set(rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 53, 60))
	alive()
	for i := range f.tables {
		if n, err := f.tables[i].Cut(context.Background()); n != 0 || err != nil {
			t.Errorf("cut %d of what is allowed: %v", n, err)
		}
	}
	alive()
}

// TestCut: a policy that is gone takes its connections with it, in both directions, and no others.
func TestCut(t *testing.T) {
	for _, mask := range []uint32{0, 0xffff0000, 0x00ffff00} {
		f := newFleet(t, nft.Options{ConnMask: mask})
		both := []policy.Rule{rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 50, 60), rule(1, 2, policy.UDP, 70, 70), rule(1, 2, policy.TCP, 443, 443)}
		f.set(both...)
		for host := range 2 {
			doomed := []firewalltest.Packet{f.packet(1, host, 2, policy.TCP, 80), f.packet(1, host, 2, policy.UDP, 55)}
			kept := []firewalltest.Packet{f.packet(1, host, 2, policy.TCP, 443), f.packet(1, host, 2, policy.UDP, 70), f.packet(1, host, 2, policy.UDP, 51)}
			for _, p := range append(doomed, kept...) {
				f.arrives(0, host, p, false)
				f.arrives(host, 0, f.answer(p, host, 2), true)
			}
			f.set(rule(1, 2, policy.UDP, 50, 52), rule(1, 2, policy.UDP, 70, 70), rule(1, 2, policy.TCP, 443, 443))
			if n, err := f.tables[host].Cut(context.Background(), 7); n != 0 || err != nil {
				t.Errorf("cut %d connections of another group: %v", n, err)
			}
			if n, err := f.tables[host].Cut(context.Background(), 1, 2); n != len(doomed) || err != nil {
				t.Errorf("host %d, mask %08x: cut %d connections, %v; expected %d", host, mask, n, err, len(doomed))
			}
			for _, p := range doomed {
				// The server speaks first: the client's host still waits for it.
				reason := nft.Ended
				if host == 0 {
					reason = nft.NoPolicy
				}
				f.isRefused(host, host, reason, f.answer(p, host, 2), false)
				f.isRefused(0, host, nft.NoPolicy, p, false)
			}
			for _, p := range kept {
				f.arrives(host, 0, f.answer(p, host, 2), true)
			}
			f.set(both...)
			for _, p := range doomed {
				f.arrives(0, host, p, false)
				f.arrives(host, 0, f.answer(p, host, 2), true)
			}
		}
	}
}

// TestCutOfMany: also more connections than are ended at a time, and what is remembered of them costs the next look little.
func TestCutOfMany(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.UDP, 1, 65535))
	h := f.w.Hosts[0]
	const many = 40_000
	for port := range many {
		p := firewalltest.Packet{Device: h.Device(1), Source: h.Address(1), Destination: h.Address(2), Protocol: policy.UDP, SourcePort: 9, Port: uint16(port + 1)}
		if err := h.Send(p, false); err != nil {
			t.Fatal(err)
		}
		if port%1000 == 0 {
			h.HearIP(func(string, []byte) {})
		}
	}
	f.arrives(0, 0, f.packet(1, 0, 2, policy.UDP, 80), false) // and what came before it
	f.set()
	if n, err := f.tables[0].Cut(t.Context(), 1); n != many+1 || err != nil {
		t.Errorf("cut %d connections of %d, %v", n, many+1, err)
	}
	if n, err := f.tables[0].Cut(t.Context()); n != 0 || err != nil {
		t.Errorf("a second time %d, %v", n, err)
	}
	f.tables[0].Forget()
	f.set()
	if lines, err := f.tables[0].Plan(t.Context(), compile(t, f.in[0])); len(lines) > 0 || err != nil {
		t.Errorf("after a look at everything there is to do: %v, %v", lines, err)
	}
	f.isRefused(0, 0, nft.NoTag, f.packet(1, 0, 2, policy.UDP, 80), false)
}

// TestOthersKeepTheirBits: marks of packets and connections that others use are left as they are.
func TestOthersKeepTheirBits(t *testing.T) {
	for _, x := range []struct{ mask, theirs, want uint32 }{{0, 0, 0x0001}, {0, 0x00500000, 0x00500001}, {0xffff0000, 0x0005, 0x00010005}} {
		f := newFleet(t, nft.Options{ConnMask: x.mask})
		f.set(rule(1, 2, policy.UDP, 80, 80))
		for _, h := range f.w.Hosts {
			h.Shell(h.NS, fmt.Sprintf(`nft add table ip other; nft 'add chain ip other pre { type filter hook prerouting priority -150; }'
				nft add rule ip other pre ct mark set 0x%x; nft add rule ip other pre meta mark set meta mark or 0x00300000
				nft add counter ip other seen; nft 'add chain ip other post { type filter hook postrouting priority 0; }'
				nft add rule ip other post ip daddr 10.255.0.0/16 meta mark and 0xffff0000 == 0x00300000 counter name seen`, x.theirs))
		}
		for host := range 2 {
			f.arrives(0, host, f.packet(1, host, 2, policy.UDP, 80), false)
			h := f.w.Hosts[host]
			if out := h.Shell(h.NS, "conntrack -L -p udp --dport 80"); !strings.Contains(out, fmt.Sprintf("mark=%d ", x.want)) {
				t.Errorf("mask %08x, theirs %08x: host %d tracks %s, expected mark %d", x.mask, x.theirs, host, out, x.want)
			}
			if out := h.Shell(h.NS, "nft list counter ip other seen"); strings.Contains(out, "packets 0 ") {
				t.Errorf("host %d: marks of others were lost: %s", host, out)
			}
		}
	}
}
