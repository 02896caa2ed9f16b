package nft_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/nat"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

// mapped is a fleet whose ports 8080 of host 0 lead to port 80 of container 2 there.
func mapped(t *testing.T) *fleet {
	f := newFleet(t, nft.Options{})
	for i, h := range f.w.Hosts {
		local := netip.PrefixFrom(h.Address(0), 24)
		if err := nat.Set(context.Background(), h.NS, nat.Config{Local: []netip.Prefix{local}, NoMasquerade: []netip.Prefix{firewalltest.Network}, VTEP: firewalltest.VTEP}); err != nil {
			t.Fatal(i, err)
		}
	}
	h := f.w.Hosts[0]
	var maps []nat.PortMap
	for _, p := range []uint8{nat.TCP, nat.UDP, nat.SCTP} {
		maps = append(maps, nat.PortMap{Host: netip.AddrPortFrom(netip.Addr{}, 8080), Protocol: p, To: netip.AddrPortFrom(h.Address(2), 80)})
	}
	maps = append(maps, nat.PortMap{Host: netip.MustParseAddrPort("192.168.0.1:8081"), Protocol: nat.UDP, To: netip.AddrPortFrom(h.Address(2), 81)})
	if err := h.NS.Do(func() error {
		return nat.MapPorts(context.Background(), maps, func(netip.Addr) (bool, error) { return true, nil })
	}); err != nil {
		t.Fatal(err)
	}
	h.Shell(h.NS, "sysctl -qw net.ipv4.conf."+h.Device(2)+".route_localnet=1")
	return f
}

// leadsTo has send send something and fails the test unless container number to of host 0 gets a packet with that source for that port.
func (f *fleet) leadsTo(what string, send func() error, to int, source string, proto policy.Protocol, port uint16) {
	f.t.Helper()
	if err := send(); err != nil {
		f.t.Fatalf("%s: %v", what, err)
	}
	h := f.w.Hosts[0]
	var seen []string
	testkit.Within(f.t, 2*time.Second, func() string {
		wrong := fmt.Sprintf("%s: nothing from %s for %v:%d; refused: %v; seen: %v", what, source, proto, port, f.refused(), seen)
		h.HearIP(func(device string, p []byte) {
			got := fmt.Sprintf("%s %v>%v %d:%d", device, netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[9], binary.BigEndian.Uint16(p[22:]))
			if want := fmt.Sprintf("%s %s>%v %d:%d", h.Device(to), source, h.Address(to), proto, port); got == want {
				wrong = ""
			} else if p[9] != unix.IPPROTO_ICMP {
				seen = append(seen, got)
			}
		})
		return wrong
	})
}

// from returns what dials to from a host, without waiting for an answer.
func (f *fleet) from(host int, network, to string) func() error {
	return func() error {
		return f.w.Hosts[host].NS.Do(func() error {
			c, err := (&net.Dialer{Timeout: 20 * time.Millisecond}).Dial(network, to)
			if err == nil {
				defer c.Close()
				_, err = c.Write([]byte("x"))
			} else if network == "tcp4" {
				err = nil // nobody answers here
			}
			return err
		})
	}
}

// contained returns what sends a packet from a container to an address.
func (f *fleet) contained(host, from int, proto policy.Protocol, to string) (firewalltest.Packet, func() error) {
	f.port++
	at, h := netip.MustParseAddrPort(to), f.w.Hosts[host]
	p := firewalltest.Packet{Device: h.Device(from), Source: h.Address(from), Destination: at.Addr(), Protocol: proto, SourcePort: f.port, Port: at.Port()}
	return p, func() error { return h.Send(p, false) }
}

// TestPortMaps: whoever comes from the underlay by a port map gets in, whoever is a container is judged as one, and everybody is seen as who he is.
func TestPortMaps(t *testing.T) {
	f := mapped(t)
	f.set(rule(1, 2, policy.TCP, 80, 80))
	f.leadsTo("underlay", f.from(1, "tcp4", "192.168.0.1:8080"), 2, "192.168.0.2", policy.TCP, 80)
	f.leadsTo("underlay", f.from(1, "udp4", "192.168.0.1:8080"), 2, "192.168.0.2", policy.UDP, 80)
	f.leadsTo("underlay, one address", f.from(1, "udp4", "192.168.0.1:8081"), 2, "192.168.0.2", policy.UDP, 81)
	f.leadsTo("underlay", f.sctp("192.168.0.1", 8080), 2, "192.168.0.2", unix.IPPROTO_SCTP, 80)
	f.leadsTo("the host", f.from(0, "tcp4", "192.168.0.1:8080"), 2, "192.168.0.1", policy.TCP, 80)
	f.leadsTo("the host's loopback", f.from(0, "tcp4", "127.0.0.1:8080"), 2, "169.254.0.1", policy.TCP, 80)
	_, send := f.contained(0, 1, policy.TCP, "192.168.0.1:8080")
	f.leadsTo("a container with a policy", send, 2, "10.255.1.1", policy.TCP, 80)
	_, send = f.contained(1, 2, policy.TCP, "192.168.0.1:8080")
	f.leadsTo("another host's container", send, 2, "192.168.0.2", policy.TCP, 80)
	for _, x := range []struct {
		from   int
		proto  policy.Protocol
		reason nft.Reason
	}{{1, policy.UDP, nft.NoPolicy}, {2, policy.TCP, nft.NoPolicy}, {3, policy.TCP, nft.NoTag}} {
		p, _ := f.contained(0, x.from, x.proto, "192.168.0.1:8080")
		f.isRefused(0, 0, x.reason, p, false)
	}
	f.set(rule(1, 2, policy.TCP, 80, 80), rule(2, 2, policy.TCP, 80, 80))
	_, send = f.contained(0, 2, policy.TCP, "192.168.0.1:8080")
	f.leadsTo("a container itself", send, 2, "169.254.0.1", policy.TCP, 80)
}

// TestPortMapsLeadNowhereElse: the overlay's own addresses have no ports, a container does not get at the host's loopback, and what is not mapped
// is refused as before.
func TestPortMapsLeadNowhereElse(t *testing.T) {
	f := mapped(t)
	f.set(rule(1, 2, policy.TCP, 80, 80))
	p, _ := f.contained(1, 1, policy.TCP, "10.255.1.0:8080")
	f.isRefused(1, 0, nft.HostService, p, false)
	p, _ = f.contained(0, 1, policy.TCP, "10.255.1.0:8080")
	f.isRefused(0, 0, nft.HostService, p, false)
	p, _ = f.contained(0, 1, policy.TCP, "192.168.0.1:8082")
	f.isRefused(0, 0, nft.HostService, p, false)
	h := f.w.Hosts[0]
	before := dropped(f)
	p, send := f.contained(0, 2, policy.UDP, "127.0.0.1:8080")
	p.Port = 9
	for _, send := range []func() error{send, func() error { return h.Send(p, false) }} {
		if err := send(); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Within(t, 2*time.Second, func() string {
		if now := dropped(f); now != before+2 {
			return fmt.Sprintf("%d packets to the host's loopback dropped, want %d", now, before+2)
		}
		return ""
	})
	f.w.Hosts[1].Shell(f.w.Hosts[1].NS, "ip route add 10.255.1.2/32 via 192.168.0.1 src 192.168.0.2")
	was := f.refused()[0][nft.FromOutside]
	if err := f.from(1, "udp4", "10.255.1.2:80")(); err != nil {
		t.Fatal(err)
	}
	testkit.Within(t, 2*time.Second, func() string {
		if f.refused()[0][nft.FromOutside] == was {
			return "a packet to a container's own address was not refused"
		}
		return ""
	})
}

// dropped returns how many packets the guard of the loopback has dropped on host 0.
func dropped(f *fleet) int {
	f.t.Helper()
	out, n := f.w.Hosts[0].Shell(f.w.Hosts[0].NS, "nft list chain inet silk nat-loopback | sed -n 's/.*counter packets \\([0-9]*\\).*/\\1/p'"), -1
	if _, err := fmt.Sscan(out, &n); err != nil {
		f.t.Fatalf("%q: %v", out, err)
	}
	return n
}

// sctp returns what sends the first chunk of an association (RFC 9260 section 3.3.2) from host 1. The kernel has no sockets for it.
func (f *fleet) sctp(to string, port uint16) func() error {
	b := []byte{0x30, 0x39, byte(port >> 8), byte(port), 0, 0, 0, 0, 0, 0, 0, 0,
		1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9}
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return func() error {
		return f.w.Hosts[1].NS.Do(func() error {
			c, err := net.Dial("ip4:132", to)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(b)
			return err
		})
	}
}
