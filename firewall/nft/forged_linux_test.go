package nft_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

// hears reports whether a packet arrives at a container of a host before another one does that was sent after it and is let through.
func (f *fleet) hears(host, container int, packet []byte) bool {
	f.t.Helper()
	return f.hearsOf(host, container, func(b []byte) bool { // the time to live and the checksum change underway
		return len(b) == len(packet) && b[9] == packet[9] && slices.Equal(b[12:], packet[12:])
	})
}

// hearsOf reports whether a packet that is says so of arrives before the probe.
func (f *fleet) hearsOf(host, container int, is func([]byte) bool) bool {
	f.t.Helper()
	heard, done := false, false
	h := f.w.Hosts[host]
	testkit.Within(f.t, 2*time.Second, func() string {
		h.HearIP(func(device string, b []byte) {
			if device == h.Device(container) {
				heard, done = heard || is(b), done || b[9] == unix.IPPROTO_UDP && len(b) == 32
			}
		})
		if !done {
			return "what is allowed did not arrive either"
		}
		return ""
	})
	return heard
}

// probe makes container 1 of host 0 send what is allowed to container 2 of a host, so that what it had sent before has arrived, or never will.
func (f *fleet) probe(host int) {
	f.t.Helper()
	if err := f.w.Hosts[0].Send(f.packet(1, host, 2, policy.UDP, 80), false); err != nil {
		f.t.Fatal(err)
	}
}

// TestForgedErrors: an ICMP error is let through for the connection that it is about. A container that is not the other end of it must not be
// able to end or to slow down connections of others that way.
func TestForgedErrors(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.UDP, 80, 80), rule(2, 2, policy.UDP, 70, 70))
	// Containers 2 of both hosts talk to each other. Container 1 of host 0 may talk to both, on another port.
	a, b := f.w.Hosts[0].Address(2), f.w.Hosts[1].Address(2)
	talk := f.packet(2, 1, 2, policy.UDP, 70)
	f.arrives(0, 1, talk, false)
	f.arrives(1, 0, f.answer(talk, 1, 2), true)
	local := firewalltest.Packet{Device: f.w.Hosts[1].Device(2), Source: b, Destination: a, Protocol: policy.UDP, SourcePort: 70, Port: talk.SourcePort}
	thief := f.w.Hosts[0].Address(1)
	for name, x := range map[string]struct {
		host  int
		about firewalltest.Packet
	}{
		"to the client, on its host":        {0, talk},
		"to the server, on another host":    {1, local},
		"of a connection that nobody knows": {1, firewalltest.Packet{Source: b, Destination: thief.Next(), Protocol: policy.TCP, SourcePort: 1, Port: 2}},
	} {
		for _, kind := range [][2]byte{{3, 3}, {3, 4}, {11, 0}, {12, 0}, {5, 1}} {
			to := x.about.Source
			packet := firewalltest.Complaint(thief, to, kind[0], kind[1], x.about)
			if err := f.w.Hosts[0].SendIP(f.w.Hosts[0].Device(1), packet); err != nil {
				t.Fatal(err)
			}
			f.probe(x.host)
			if f.hears(x.host, 2, packet) {
				t.Errorf("%s: a stranger's ICMP error %d/%d arrived", name, kind[0], kind[1])
			}
		}
	}
	// The other end says so itself.
	for _, x := range []struct {
		from, host int
		packet     []byte
	}{
		{1, 0, firewalltest.Complaint(b, a, 3, 3, talk)},
		{0, 1, firewalltest.Complaint(a, b, 3, 3, local)},
	} {
		if err := f.w.Hosts[x.from].SendIP(f.w.Hosts[x.from].Device(2), x.packet); err != nil {
			t.Fatal(err)
		}
		testkit.Within(t, 2*time.Second, func() string {
			wrong := "the error of the connection's other end did not arrive"
			f.w.Hosts[x.host].HearIP(func(_ string, got []byte) {
				if got[9] == unix.IPPROTO_ICMP && slices.Equal(got[12:], x.packet[12:]) {
					wrong = ""
				}
			})
			return wrong
		})
	}
}

// TestForgedErrorsToTheHost: likewise for connections of the host itself.
func TestForgedErrorsToTheHost(t *testing.T) {
	f := newFleet(t, nft.Options{})
	h := f.w.Hosts[0]
	h.Shell(h.NS, "ip addr add 10.0.16.15/32 dev lo; ip addr add 10.0.16.16/32 dev lo; conntrack -I -p udp -s 10.0.16.15 -d 10.0.16.16 --sport 40000 --dport 53 -t 600")
	f.set()
	host, thief := netip.MustParseAddr("10.0.16.15"), h.Address(1)
	forged := firewalltest.Complaint(thief, host, 3, 3, firewalltest.Packet{
		Source: host, Destination: netip.MustParseAddr("10.0.16.16"), Protocol: policy.UDP, SourcePort: 40000, Port: 53})
	before := f.refused()
	if err := h.SendIP(h.Device(1), forged); err != nil {
		t.Fatal(err)
	}
	testkit.Within(t, 2*time.Second, func() string {
		if now := f.refused(); now[0][nft.UnknownSource] == before[0][nft.UnknownSource] {
			return "a container's ICMP error about a connection of the host was not refused"
		}
		return ""
	})
}

// TestOddPackets: a policy for udp 80 lets nothing else through that looks a little like it.
func TestOddPackets(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.UDP, 80, 80))
	h := f.w.Hosts[0]
	h.Shell(h.NS, "for f in /proc/sys/net/ipv4/conf/*/accept_source_route /proc/sys/net/ipv4/conf/*/mc_forwarding; do echo 1 > $f 2> /dev/null || true; done")
	from := h.Address(1)
	ports := []byte{0, 99, 0, 80, 0, 16, 0, 0, 's', 'i', 'l', 'k', 's', 'i', 'l', 'k'}
	for host := range 2 {
		to := f.w.Hosts[host].Address(2)
		packets := map[string][]byte{}
		for name, protocol := range map[string]byte{"sctp": 132, "udplite": 136, "dccp": 33, "esp": 50, "gre": 47, "ipip": 4, "igmp": 2, "icmp": 1, "nothing": 253, "tcp": 6} {
			packets[name] = firewalltest.IPv4(from, to, protocol, ports)
		}
		packets["echo"] = firewalltest.IPv4(from, to, 1, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})
		other := slices.Clone(ports)
		other[3] = 81
		packets["another port"] = firewalltest.IPv4(from, to, 17, other)
		loose := firewalltest.IPv4(from, h.Address(0), 17, append([]byte{131, 7, 4, to.As4()[0], to.As4()[1], to.As4()[2], to.As4()[3], 0}, ports...))
		loose[0] = 0x47 // with two words of options: go on to the container
		packets["source route"] = loose
		for name, packet := range packets {
			packet[10], packet[11] = 0, 0
			firewalltest.Checksum(packet)
			if err := h.SendIP(h.Device(1), packet); err != nil {
				t.Fatal(err)
			}
			f.probe(host)
			if f.hearsFrom(host, 2, packet[9]) {
				t.Errorf("to host %d: %s arrived", host, name)
			}
		}
		// The second fragment of what is refused, and what is allowed in two parts.
		for port, want := range map[byte]bool{80: true, 81: false} {
			whole := slices.Clone(ports)
			whole[3] = port
			for i, part := range [][]byte{whole[:8], whole[8:]} {
				packet := firewalltest.IPv4(from, to, 17, part)
				packet[4], packet[5], packet[6], packet[7] = port, byte(host), byte(0x20*(1-i)), byte(i)
				packet[10], packet[11] = 0, 0
				firewalltest.Checksum(packet)
				if err := h.SendIP(h.Device(1), packet); err != nil {
					t.Fatal(err)
				}
			}
			f.probe(host)
			if got := f.hearsOf(host, 2, func(b []byte) bool { return b[9] == 17 && len(b) != 32 }); got != want {
				t.Errorf("to host %d: port %d in two fragments arrived: %v", host, port, got)
			}
		}
	}
}

// hearsFrom reports whether anything of a protocol arrives at a container, other than the probe that was sent after it.
func (f *fleet) hearsFrom(host, container int, protocol byte) bool {
	f.t.Helper()
	return f.hearsOf(host, container, func(b []byte) bool { return b[9] == protocol && (protocol != 17 || len(b) != 32) })
}

// TestEchoesAreAnswered: where containers are open to each other, and to hosts, which may always ask.
func TestEchoesAreAnswered(t *testing.T) {
	f := newFleet(t, nft.Options{})
	for i := range f.in {
		f.in[i].Unrestricted = true
	}
	f.set(rule(1, 2, policy.UDP, 80, 80)) // so that they have tags
	for host := range 2 {
		from, to := f.w.Hosts[0].Address(1), f.w.Hosts[host].Address(2)
		for i, x := range []struct {
			by   int
			from string
			at   int
			text []byte
		}{
			{0, f.w.Hosts[0].Device(1), host, firewalltest.IPv4(from, to, 1, []byte{8, 0, 0xf7, 0xff - byte(host), 0, byte(host), 0, 0})},
			{host, f.w.Hosts[host].Device(2), 0, firewalltest.IPv4(to, from, 1, []byte{0, 0, 0xff, 0xff - byte(host), 0, byte(host), 0, 0})},
		} {
			if err := f.w.Hosts[x.by].SendIP(x.from, x.text); err != nil {
				t.Fatal(err)
			}
			testkit.Within(t, 2*time.Second, func() string {
				wrong := fmt.Sprintf("host %d: packet %d did not arrive; refused: %v", host, i, f.refused())
				f.w.Hosts[x.at].HearIP(func(_ string, b []byte) {
					if b[9] == 1 && slices.Equal(b[12:], x.text[12:]) {
						wrong = ""
					}
				})
				return wrong
			})
		}
	}
}
