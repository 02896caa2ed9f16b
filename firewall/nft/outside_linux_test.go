package nft_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

// door is a host with containers 1 to 3 and an outside.
type door struct {
	*fleet
	h       *firewalltest.Host
	o       *firewalltest.Outside
	number  uint32
	arrived map[uint32]bool
}

func newDoor(t *testing.T) *door {
	f := newFleet(t, nft.Options{})
	return &door{fleet: f, h: f.w.Hosts[0], o: firewalltest.NewOutside(f.w.Hosts[0]), arrived: map[uint32]bool{}}
}

// reach gives container 1 something to reach.
func (d *door) reach(e *firewall.Egress) {
	d.t.Helper()
	d.in[0].Endpoints[0].Egress = e
	set(d.t, d.tables[0], compile(d.t, d.in[0]))
}

func packetTo(protocol secgroup.Protocol, to string, port uint16) secgroup.Packet {
	return secgroup.Packet{Protocol: protocol, Destination: netip.MustParseAddr(to), Port: port}
}

// send makes container n send the first packet of a connection.
func (d *door) send(n int, p secgroup.Packet) uint32 {
	d.t.Helper()
	d.number++
	d.sendIP(n, firewalltest.Opening(d.h.Address(n), p, d.number))
	return d.number
}

func (d *door) sendIP(n int, packet []byte) {
	d.t.Helper()
	if err := d.h.SendIP(d.h.Device(n), packet); err != nil {
		d.t.Fatal(err)
	}
}

func (d *door) hear() {
	d.o.Hear(func(b []byte) { d.arrived[firewalltest.Number(b)] = true })
}

func (d *door) passes(number uint32) {
	d.t.Helper()
	testkit.Within(d.t, 20*time.Second, func() string {
		if d.hear(); !d.arrived[number] {
			return fmt.Sprintf("packet %d does not arrive: %v", number, d.refused()[0])
		}
		return ""
	})
}

// count returns how many packets were refused for a reason so far.
func (d *door) count(r nft.Reason) uint64 { d.t.Helper(); return d.refused()[0][r] }

// stopped fails the test unless the packets that send sends are refused for a reason.
func (d *door) stopped(r nft.Reason, send func() uint32) {
	d.t.Helper()
	before := d.count(r)
	number := send()
	testkit.Within(d.t, 20*time.Second, func() string {
		if d.count(r) == before {
			return fmt.Sprintf("packet %d was not refused for %s: %v", number, r, d.refused()[0])
		}
		return ""
	})
	if d.hear(); d.arrived[number] {
		d.t.Errorf("packet %d was refused, and arrived", number)
	}
}

func TestWhatIsRefusedToTheOutside(t *testing.T) {
	d := newDoor(t)
	deny := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("169.254.0.0/16")})
	everything := list(t, to(secgroup.All, "0.0.0.0", "255.255.255.255"))
	d.reach(&firewall.Egress{Deny: deny, Lists: []*firewall.List{list(t, to(secgroup.TCP, "0.0.0.0", "255.255.255.255", 80, 80))}})
	first := func(n int, p secgroup.Packet) func() uint32 { return func() uint32 { return d.send(n, p) } }
	tcp, udp := packetTo(secgroup.TCP, "198.51.100.1", 80), packetTo(secgroup.UDP, "198.51.100.1", 80)
	d.passes(d.send(1, tcp))
	d.passes(d.send(2, udp)) // restricted is only who is
	d.stopped(nft.NoRule, first(1, udp))
	d.stopped(nft.NoRule, first(1, packetTo(secgroup.TCP, "198.51.100.1", 81)))
	d.stopped(nft.DeniedNetwork, first(1, packetTo(secgroup.TCP, "169.254.169.254", 80)))
	d.passes(d.send(2, packetTo(secgroup.TCP, "169.254.169.254", 80)))
	d.reach(&firewall.Egress{Deny: deny, Lists: []*firewall.List{everything}})
	d.passes(d.send(1, udp))
	d.stopped(nft.VXLAN, first(1, packetTo(secgroup.UDP, "198.51.100.1", 4789)))
	d.stopped(nft.DeniedNetwork, first(1, packetTo(132, "169.254.169.254", 0)))
	d.reach(&firewall.Egress{Lists: []*firewall.List{everything}})
	d.h.Shell(d.h.NS, "ip route add 10.255.77.0/24 via 203.0.113.2 dev out") // as for a peer whose route is gone
	d.stopped(nft.UnknownDestination, first(1, packetTo(secgroup.TCP, "10.255.77.1", 80)))
	// A reset that is part of no connection.
	d.stopped(nft.Invalid, func() uint32 {
		d.number++
		b := firewalltest.Opening(d.h.Address(1), packetTo(secgroup.TCP, "198.51.100.9", 80), d.number)
		b[20+13] = 4
		binary.BigEndian.PutUint16(b[20+16:], binary.BigEndian.Uint16(b[20+16:])-2)
		d.sendIP(1, b)
		return d.number
	})
	d.reach(&firewall.Egress{})
	d.stopped(nft.NoRule, first(1, tcp))
	d.reach(nil)
	d.passes(d.send(1, udp))
}

// TestFragmentsAreJudgedTogether: only the first of them says to which port they go.
func TestFragmentsAreJudgedTogether(t *testing.T) {
	d := newDoor(t)
	d.reach(&firewall.Egress{Lists: []*firewall.List{list(t, to(secgroup.UDP, "198.51.100.1", "198.51.100.1", 53, 53))}})
	fragments := func(port uint16) {
		d.number++
		udp := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, uint16(30000+d.number)), port)
		udp = append(binary.BigEndian.AppendUint16(udp, 2400), make([]byte, 2394)...)
		for i, part := range [][]byte{udp[:1200], udp[1200:]} {
			b := firewalltest.IPv4(d.h.Address(1), netip.MustParseAddr("198.51.100.1"), 17, part)
			binary.BigEndian.PutUint16(b[4:], uint16(d.number))
			binary.BigEndian.PutUint16(b[6:], [2]uint16{0x2000, 150}[i])
			b[10], b[11] = 0, 0
			firewalltest.Checksum(b)
			d.sendIP(1, b)
		}
	}
	seen := 0
	hear := func() { d.o.Hear(func(b []byte) { seen += len(b) }) }
	fragments(53)
	testkit.Within(t, 20*time.Second, func() string {
		if hear(); seen < 2400 {
			return fmt.Sprintf("%d bytes arrived", seen)
		}
		return ""
	})
	d.stopped(nft.NoRule, func() uint32 { fragments(54); return d.number })
	was := seen
	if hear(); seen != was {
		t.Errorf("%d bytes of what no rule allows arrived", seen-was)
	}
}

// TestConnectionsToOneDestinationAreLimited for each container and each destination, and only counted in a dry run.
func TestConnectionsToOneDestinationAreLimited(t *testing.T) {
	d := newDoor(t)
	const burst = 3
	d.in[0].Limit = firewall.Limit{Rate: 1, Burst: burst, Log: true}
	for round, e := range []*firewall.Egress{nil, {Lists: []*firewall.List{list(t, to(secgroup.All, "198.51.0.0", "198.51.255.255"))}}} {
		d.reach(e)
		for _, x := range []struct {
			from int
			to   string
			port uint16
		}{{1, "198.51.100.1", 80}, {1, "198.51.100.1", 81}, {1, "198.51.100.2", 80}, {2, "198.51.100.1", 80}} {
			p := packetTo(secgroup.TCP, x.to, x.port+10*uint16(round))
			for range burst {
				d.passes(d.send(x.from, p))
			}
			d.stopped(nft.RateLimited, func() uint32 { // at least one of many: on a slow machine the next second may begin meanwhile
				for range 10 * burst {
					d.send(x.from, p)
				}
				return 0
			})
		}
		for range 3 * burst {
			d.passes(d.send(1, packetTo(secgroup.UDP, "198.51.100.1", 80)))
		}
	}
	before := d.count(nft.RateLimited)
	d.in[0].Limit.Dry = true
	d.reach(nil)
	for range 3 * burst {
		d.passes(d.send(1, packetTo(secgroup.TCP, "198.51.100.1", 80)))
	}
	if d.count(nft.RateLimited) != before {
		t.Error("a dry run refuses")
	}
}

// TestErrorsToTheOutsideAreAboutOnesOwn: the kernel takes an ICMP error for part of the connection that it quotes, whoever sends it.
func TestErrorsToTheOutsideAreAboutOnesOwn(t *testing.T) {
	d := newDoor(t)
	for i := range d.in[0].Endpoints {
		d.in[0].Endpoints[i].Egress = &firewall.Egress{Lists: []*firewall.List{list(t, to(secgroup.All, "0.0.0.0", "255.255.255.255"))}}
	}
	set(t, d.tables[0], compile(t, d.in[0]))
	d.passes(d.send(1, packetTo(secgroup.UDP, "198.51.100.1", 80)))
	server, client := netip.MustParseAddr("198.51.100.1"), d.h.Address(1)
	about := firewalltest.Packet{Source: server, Destination: client, Protocol: policy.UDP, SourcePort: 80, Port: uint16(20000 + d.number%40000)}
	d.stopped(nft.UnknownSource, func() uint32 {
		d.sendIP(2, firewalltest.Complaint(d.h.Address(2), server, 3, 3, about))
		return 0
	})
	errors := 0
	d.sendIP(1, firewalltest.Complaint(client, server, 3, 3, about))
	testkit.Within(t, 20*time.Second, func() string {
		d.o.Hear(func(b []byte) {
			if b[9] == 1 {
				errors++
			}
		})
		if errors != 1 {
			return fmt.Sprintf("%d errors arrived, expected the container's own", errors)
		}
		return ""
	})
}

// TestNoMomentOpenOrCutOutside floods from a container while its rules change, and the writer of the table with it: what all of them allow always
// arrives, and what none allows never does.
func TestNoMomentOpenOrCutOutside(t *testing.T) {
	d := newDoor(t)
	steps := 300
	if testing.Short() {
		steps = 60
	}
	deny := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("198.51.100.5/32")})
	always := to(secgroup.UDP, "198.51.100.1", "198.51.100.1", 80, 80)
	states := make(chan firewall.Ruleset, steps)
	for range steps {
		e := &firewall.Egress{Deny: deny}
		rules := []secgroup.Rule{always}
		for range rand.IntN(3) * rand.IntN(60) {
			first := uint16(100 + rand.IntN(60000))
			rules = append(rules, to(secgroup.UDP, "198.51.100.1", fmt.Sprintf("198.51.100.%d", 1+rand.IntN(200)), first, first+uint16(rand.IntN(2000))))
		}
		if rand.IntN(3) == 0 {
			e.Lists = append(e.Lists, list(t, to(secgroup.TCP, "0.0.0.0", "255.255.255.255", 1, 65535)))
		}
		e.Lists = append(e.Lists, list(t, rules...))
		in := d.in[0]
		in.Endpoints = append([]firewall.Endpoint(nil), in.Endpoints...)
		in.Endpoints[0].Egress = e
		if rand.IntN(4) == 0 {
			in.Limit = firewall.Limit{Rate: 1e6, Burst: 1e6}
		}
		states <- compile(t, in)
	}
	close(states)
	set(t, d.tables[0], <-states)
	done := walk(t, d.tables[0], d.h.NS, states)
	good, bad := map[uint32]bool{}, map[uint32]bool{}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		good[d.send(1, packetTo(secgroup.UDP, "198.51.100.1", 80))] = true
		for _, p := range []secgroup.Packet{packetTo(secgroup.UDP, "198.51.100.1", 81), packetTo(secgroup.UDP, "198.51.100.5", 80), packetTo(132, "198.51.100.1", 0)} {
			bad[d.send(1, p)] = true
		}
		d.hear()
	}
	testkit.Within(t, 20*time.Second, func() string {
		d.hear()
		for n := range good {
			if !d.arrived[n] {
				return "cut off for a moment"
			}
		}
		return ""
	})
	for n := range bad {
		if d.arrived[n] {
			t.Errorf("packet %d passed", n)
		}
	}
	t.Logf("%d allowed packets, %d others", len(good), len(bad))
}
