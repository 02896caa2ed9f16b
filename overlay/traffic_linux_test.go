package overlay_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// segment returns hosts whose eth0 are joined by a bridge in a namespace of its own, with the addresses 10.0.16.1, .2, ...
func segment(t *testing.T, n int) []*host {
	t.Helper()
	sw := &host{t: t, ns: netns.New(t)}
	sw.sh("ip link add br0 type bridge; ip link set br0 up")
	var hosts []*host
	for i := range n {
		h := &host{t: t, ns: netns.New(t)}
		h.sh(fmt.Sprintf(`sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 net.ipv4.ip_forward=1; ip link set lo up
			ip link add eth0 type veth peer name port%d; ip addr add 10.0.16.%d/24 dev eth0; ip link set eth0 up
			ip link set port%d netns /proc/%d/fd/%d`, i+1, i+1, i+1, pid(), sw.ns.FD()))
		sw.sh(fmt.Sprintf("ip link set port%d master br0 up", i+1))
		h.open()
		hosts = append(hosts, h)
	}
	return hosts
}

// member returns the configuration of host i (from 1) of n: it holds 10.255.i.0/24.
func member(i, n int) overlay.Config {
	c := example()
	c.Local = newLease(fmt.Sprintf("10.255.%d.0/24", i), fmt.Sprintf("10.0.16.%d", i))
	c.Underlay, c.Peers = c.Local.Underlay, nil
	for j := 1; j <= n; j++ {
		c.Peers = append(c.Peers, newLease(fmt.Sprintf("10.255.%d.0/24", j), fmt.Sprintf("10.0.16.%d", j)))
	}
	return c
}

// echo answers TCP connections to addr on the host with what they send.
func (h *host) echo(addr string) {
	h.t.Helper()
	var l net.Listener
	err := h.ns.Do(func() (err error) { l, err = net.Listen("tcp4", addr); return err })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// call sends words over TCP and wants them back.
func (h *host) call(addr, words string, within time.Duration) error {
	var c net.Conn
	err := h.ns.Do(func() (err error) { c, err = net.DialTimeout("tcp4", addr, within); return err })
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(within))
	if _, err := io.WriteString(c, words); err != nil {
		return err
	}
	b := make([]byte, len(words))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != words {
		return fmt.Errorf("got %q back: %w", b, err)
	}
	return nil
}

// send sends one UDP packet.
func (h *host) send(from, to string, payload []byte) {
	h.t.Helper()
	err := h.ns.Do(func() error {
		c, err := net.DialUDP("udp4", source(from), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(payload)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
}

// source reads ADDRESS:PORT, of which the address may be missing.
func source(s string) *net.UDPAddr {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil
	}
	return net.UDPAddrFromAddrPort(ap)
}

// count returns the packets that a rule of table inet TABLE counted; words single the rule out.
func (h *host) count(table string, words string) int {
	h.t.Helper()
	for line := range strings.Lines(h.sh("nft list table inet " + table)) {
		if _, rest, ok := strings.Cut(line, "counter packets "); ok && strings.Contains(line, words) {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				h.t.Fatal(err)
			}
			return n
		}
	}
	h.t.Fatalf("no rule with %q counts in table %s", words, table)
	return 0
}

func TestHostsReachEachOther(t *testing.T) {
	hosts := segment(t, 3)
	for i, h := range hosts {
		h.sh(fmt.Sprintf("ip addr add 10.255.%d.7/32 dev lo", i+1)) // stands for a container
		h.set(member(i+1, 3))
		h.echo(fmt.Sprintf("10.255.%d.7:8080", i+1))
	}
	for i, h := range hosts {
		for j := range hosts {
			if i == j {
				continue
			}
			if err := h.call(fmt.Sprintf("10.255.%d.7:8080", j+1), strings.Repeat("silk ", 10_000), 3*time.Second); err != nil {
				t.Errorf("host %d to %d: %v", i+1, j+1, err)
			}
		}
	}
	// Not by chance: without the path there is no way.
	c := member(1, 3)
	c.Peers = slices.DeleteFunc(c.Peers, func(l lease.Lease) bool { return l.Underlay.String() == "10.0.16.2" })
	hosts[0].set(c)
	if err := hosts[0].call("10.255.2.7:8080", "x", 300*time.Millisecond); err == nil {
		t.Error("a host without a path was reached")
	}
	if err := hosts[0].call("10.255.3.7:8080", "x", 3*time.Second); err != nil {
		t.Errorf("another path was lost: %v", err)
	}
}

// TestConnectionSurvivesEverySet holds a connection over a path while peers come and go, while the guard is repaired and
// while another Fabric takes over.
func TestConnectionSurvivesEverySet(t *testing.T) {
	hosts := segment(t, 2)
	for i, h := range hosts {
		h.set(member(i+1, 2))
	}
	hosts[1].echo("10.255.2.0:8080")
	var c net.Conn
	err := hosts[0].ns.Do(func() (err error) { c, err = net.DialTimeout("tcp4", "10.255.2.0:8080", 3*time.Second); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 30 {
		switch i % 5 {
		case 1:
			hosts[0].try("nft flush chain inet silk overlay-output; ip neigh del 10.255.2.0 dev silk-vtep")
		case 2:
			hosts[1].try("nft delete table inet silk")
		case 3:
			hosts[0].open()
		}
		cfg := member(1, 2+i)
		hosts[0].set(cfg)
		hosts[1].set(member(2, 2+i))
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

func TestTagCrossesAndTheUnderlayDoesNotSeeIt(t *testing.T) {
	hosts := segment(t, 2)
	for i, h := range hosts {
		h.set(member(i+1, 2))
	}
	hosts[0].sh(`nft add table inet t; nft 'add chain inet t tag { type filter hook output priority -150; }'; nft add rule inet t tag oifname silk-vtep meta mark set 0xbeef002a
		nft 'add chain inet t wire { type filter hook postrouting priority 0; }'
		nft add rule inet t wire oifname eth0 udp dport 4789 meta mark 0xbeef0000 counter comment clean
		nft add rule inet t wire oifname eth0 udp dport 4789 'meta mark & 0xffff' != 0 counter comment tagged
		nft add rule inet t wire ct state new counter`)
	hosts[1].sh(`nft add table inet t; nft 'add chain inet t in { type filter hook prerouting priority 0; }'; nft add rule inet t in iifname silk-vtep ip protocol udp meta mark 0x2a counter comment tag
		nft add rule inet t in udp dport 4789 ct state untracked counter comment untracked; nft add rule inet t in udp dport 4789 ct state new counter comment tracked`)
	for range 3 {
		hosts[0].send(":0", "10.255.2.0:9", []byte("x"))
	}
	testkit.Within(t, 3*time.Second, func() string {
		if n := hosts[1].count("t", `"tag"`); n < 3 {
			return fmt.Sprintf("%d packets arrived with their tag", n)
		}
		return ""
	})
	for _, c := range []struct {
		h     *host
		words string
		want  int
	}{
		{hosts[1], `"tag"`, 3}, {hosts[0], `"clean"`, 3}, {hosts[0], `"tagged"`, 0},
		{hosts[1], `"untracked"`, 3}, {hosts[1], `"tracked"`, 0},
	} {
		if got := c.h.count("t", c.words); got != c.want {
			t.Errorf("packets %s: %d, want %d", c.words, got, c.want)
		}
	}
}

// TestPacketWithoutTagHasNone marks the outer packet on the receiving host, as a firewall there may.
func TestPacketWithoutTagHasNone(t *testing.T) {
	hosts := segment(t, 2)
	for i, h := range hosts {
		h.set(member(i+1, 2))
	}
	hosts[1].sh(`nft add table inet t; nft 'add chain inet t in { type filter hook prerouting priority -150; }'; nft add rule inet t in udp dport 4789 meta mark set 0x77
		nft add rule inet t in iifname silk-vtep ip protocol udp meta mark 0 counter comment none; nft add rule inet t in iifname silk-vtep meta mark != 0 counter comment some`)
	hosts[0].send(":0", "10.255.2.0:9", []byte("x"))
	testkit.Within(t, 3*time.Second, func() string {
		if n := hosts[1].count("t", `"none"`) + hosts[1].count("t", `"some"`); n == 0 {
			return "nothing arrived"
		}
		return ""
	})
	if n := hosts[1].count("t", `"some"`); n != 0 {
		t.Errorf("a packet without a tag got one from the outer packet's mark")
	}
}

// encapsulated returns what a VXLAN packet for VNI 1 with the tag carries: an IPv4 UDP packet from src to dst.
func encapsulated(dstMAC lease.MAC, tag uint16, src, dst string) []byte {
	p := []byte{0x88, 0, byte(tag >> 8), byte(tag), 0, 0, 1, 0}
	p = append(p, dstMAC[:]...)
	p = append(p, 2, 0, 0, 0, 0, 1, 8, 0)
	ip := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0}
	ip = append(append(ip, netip.MustParseAddr(src).AsSlice()...), netip.MustParseAddr(dst).AsSlice()...)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	return append(append(p, ip...), 0x10, 0, 0x10, 0, 0, 8, 0, 0)
}

// arrived makes h count what comes out of its VTEP before the guard sees it, and what gets past it.
func (h *host) countArrivals() {
	h.sh(`nft add table inet t; nft 'add chain inet t before { type filter hook prerouting priority -350; }'; nft add rule inet t before iifname silk-vtep counter comment before
		nft 'add chain inet t after { type filter hook prerouting priority -200; }'; nft add rule inet t after iifname silk-vtep counter comment after`)
}

func TestOnlyKnownPeersAreHeard(t *testing.T) {
	hosts := segment(t, 3)
	victim, stranger := hosts[1], hosts[2]
	victim.set(member(2, 2))
	victim.countArrivals()
	packet := encapsulated(lease.MACOf(member(2, 2).Local.Subnet), 5, "10.255.1.7", "10.255.2.0")
	stranger.send("10.0.16.3:0", "10.0.16.2:4789", packet)
	testkit.Within(t, 3*time.Second, func() string {
		if n := victim.count("silk", "udp dport 4789 counter"); n != 1 {
			return fmt.Sprintf("%d packets of a stranger were dropped", n)
		}
		return ""
	})
	if n := victim.count("t", `"before"`); n != 0 {
		t.Errorf("%d packets of a stranger were decapsulated", n)
	}
	victim.set(member(2, 3)) // no stranger any more
	stranger.send("10.0.16.3:0", "10.0.16.2:4789", packet)
	testkit.Within(t, 3*time.Second, func() string {
		if n := victim.count("t", `"after"`); n != 1 {
			return fmt.Sprintf("%d packets of a peer arrived", n)
		}
		return ""
	})
}

func TestOnlySourcesOfOthersLeaveTheVTEP(t *testing.T) {
	hosts := segment(t, 2)
	victim := hosts[1]
	victim.set(member(2, 2))
	victim.countArrivals()
	mac := member(2, 2).Local.MAC
	for i, src := range []string{"192.0.2.1", "10.255.2.9", "127.0.0.1", "10.0.16.1"} {
		hosts[0].send("10.0.16.1:0", "10.0.16.2:4789", encapsulated(mac, 5, src, "10.255.2.0"))
		testkit.Within(t, 3*time.Second, func() string {
			if n := victim.count("silk", `iifname "silk-vtep"`); n != i+1 {
				return fmt.Sprintf("source %s: %d dropped, want %d", src, n, i+1)
			}
			return ""
		})
	}
	// A packet in the packet: from a known peer's underlay address to the VXLAN port.
	if n := victim.count("t", `"after"`); n != 0 {
		t.Errorf("%d spoofed packets got through", n)
	}
	hosts[0].send("10.0.16.1:0", "10.0.16.2:4789", encapsulated(mac, 5, "10.255.1.9", "10.255.2.0"))
	testkit.Within(t, 3*time.Second, func() string {
		if n := victim.count("t", `"after"`); n != 1 {
			return fmt.Sprintf("%d honest packets got through", n)
		}
		return ""
	})
}

func TestContainerCannotInjectVXLAN(t *testing.T) {
	hosts := segment(t, 2)
	for i, h := range hosts {
		h.set(member(i+1, 2))
	}
	home, victim := hosts[0], hosts[1]
	victim.countArrivals()
	container := &host{t: t, ns: netns.New(t)}
	home.sh(fmt.Sprintf(`ip link add s-010255001007 type veth peer name c0; ip link set s-010255001007 up; ip addr add 169.254.0.1 peer 10.255.1.7/32 dev s-010255001007
		ip link set c0 netns /proc/%d/fd/%d; nft add table ip nat; nft 'add chain ip nat post { type nat hook postrouting priority 100; }'; nft add rule ip nat post oifname eth0 masquerade`, pid(), container.ns.FD()))
	container.sh("ip link set c0 up; ip addr add 10.255.1.7 peer 169.254.0.1/32 dev c0; ip route add default via 169.254.0.1")
	victim.echo("10.0.16.2:8080")
	if err := container.call("10.0.16.2:8080", "x", 3*time.Second); err != nil {
		t.Fatalf("the way is not open: %v", err)
	}
	packet := encapsulated(member(2, 2).Local.MAC, 5, "10.255.1.7", "10.255.2.0")
	for i, to := range []string{"10.0.16.2:4789", "10.0.16.1:4789", "10.255.2.0:4789", "10.255.1.0:4789", "169.254.0.1:4789"} {
		container.send("10.255.1.7:0", to, packet)
		testkit.Within(t, 3*time.Second, func() string {
			if n := home.count("silk", `"s-*"`); n != i+1 {
				return fmt.Sprintf("to %s: %d dropped, want %d", to, n, i+1)
			}
			return ""
		})
	}
	if n := victim.count("t", `"before"`); n != 0 {
		t.Errorf("%d packets were injected", n)
	}
	container.send("10.255.1.7:0", "10.255.2.0:4790", packet) // other ports are free
	testkit.Within(t, 3*time.Second, func() string {
		if n := victim.count("t", `"after"`); n != 1 {
			return fmt.Sprintf("%d packets to another port arrived", n)
		}
		return ""
	})
}
