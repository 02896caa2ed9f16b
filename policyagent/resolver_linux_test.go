package policyagent

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// resolver is the host's own address that containers ask names of.
const resolver = "169.254.0.2"

// serve answers on port 53 of an address of the host, tcp and udp, until the test ends.
func (w *world) serve(address string) {
	w.t.Helper()
	var l net.Listener
	var p net.PacketConn
	err := w.ns.Do(func() (err error) {
		if l, err = net.Listen("tcp4", address+":53"); err == nil {
			p, err = net.ListenPacket("udp4", address+":53")
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 512)
		for {
			n, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			p.WriteTo(b[:n], from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	w.t.Cleanup(func() { l.Close(); p.Close(); <-done })
}

// asks reports whether a network namespace gets an answer from port 53 of an address.
func asks(ns *kernel.NS, network, address string) bool {
	var c net.Conn
	if err := ns.Do(func() (err error) { c, err = net.DialTimeout(network, address+":53", time.Second); return err }); err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err == nil
}

// TestContainersAskTheHostsResolver: a link-local address that only a local route gives the host is reached by containers, past the overlay's guard and whatever the host's
// reverse path filter, and past the policy table if dns_servers has it.
func TestContainersAskTheHostsResolver(t *testing.T) {
	w := newWorld(t)
	w.onHost("ip link add eth0 type veth peer name wire && ip addr add 10.0.16.15/24 dev eth0 && ip link set eth0 up && ip link set wire up")
	fabric, err := overlay.Open(w.ns)
	if err != nil {
		t.Fatal(err)
	}
	defer fabric.Close()
	subnet := netip.MustParsePrefix("10.255.30.0/24")
	local := lease.Lease{Underlay: netip.MustParseAddr("10.0.16.15"), Subnet: subnet, MAC: lease.MACOf(subnet)}
	guarded := overlay.Config{Device: "silk-vtep", VNI: 1, Port: 4789, Underlay: local.Underlay, Network: netip.MustParsePrefix("10.255.0.0/16"), Local: local}
	if _, err := fabric.Set(t.Context(), guarded); err != nil {
		t.Fatal(err)
	}
	a, addr := w.attach("web"), netip.MustParseAddr(resolver)
	if err := kernel.HoldLocal(w.ns, addr, overlay.Protocol); err != nil {
		t.Fatal(err)
	}
	if _, err := fabric.Set(t.Context(), guarded); err != nil { // which leaves the address
		t.Fatal(err)
	}
	w.serve(resolver)
	check := func(when string, want bool) {
		t.Helper()
		for _, filter := range []int{0, 1, 2} {
			w.onHost(fmt.Sprintf("sysctl -qw net.ipv4.conf.all.rp_filter=%d", filter))
			for _, network := range []string{"udp4", "tcp4"} {
				if got := asks(a.ns, network, resolver); got != want {
					t.Errorf("%s, rp_filter %d: a container is answered by %s: %v, want %v", when, filter, network, got, want)
				}
				if !asks(w.ns, network, resolver) {
					t.Errorf("%s: the host itself is not answered by %s", when, network)
				}
			}
		}
	}
	check("without a policy table", true)
	store := w.policies()
	enforced := func(servers ...string) *running {
		t.Helper()
		r := w.start(store, func(c *Config) { c.DNSServers = servers })
		if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + a.key.Container); status != 200 {
			t.Fatalf("wait for %v: %d %s", a.key, status, text)
		}
		return r
	}
	enforced().stop()
	check("without dns_servers", false)
	enforced(resolver)
	check("with dns_servers", true)
	if asks(a.ns, "tcp4", "10.0.16.15") {
		t.Error("a container is answered by another address of the host")
	}
	if err := kernel.DropLocal(w.ns, addr, overlay.Protocol); err != nil {
		t.Fatal(err)
	}
	if asks(a.ns, "udp4", resolver) {
		t.Error("a container is answered by an address that was taken back")
	}
}
