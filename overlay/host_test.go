package overlay_test

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// host is a network namespace that stands for a machine, with an underlay device eth0.
type host struct {
	t  testing.TB
	ns *kernel.NS
	f  *overlay.Fabric
}

// newHost returns a host whose eth0 has the address, its other end being in the same namespace.
func newHost(t testing.TB, underlay string) *host {
	t.Helper()
	h := &host{t: t, ns: netns.New(t)}
	h.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1; ip link set lo up; ip link add eth0 type veth peer name wire; ip addr add " + underlay + "/24 dev eth0; ip link set eth0 up; ip link set wire up; sysctl -qw net.ipv6.conf.default.disable_ipv6=0")
	h.open()
	return h
}

func (h *host) open() {
	h.t.Helper()
	f, err := overlay.Open(h.ns)
	if err != nil {
		h.t.Fatal(err)
	}
	h.f = f
	h.t.Cleanup(func() { f.Close() })
}

// try runs shell commands on the host.
func (h *host) try(script string) (string, error) { return netns.Try(h.t, h.ns, script) }

func (h *host) sh(script string) string {
	h.t.Helper()
	return netns.Shell(h.t, h.ns, script)
}

func newLease(subnet, underlay string) lease.Lease {
	p := netip.MustParsePrefix(subnet)
	return lease.Lease{Underlay: netip.MustParseAddr(underlay), Subnet: p, MAC: lease.MACOf(p)}
}

// example is the worked example of the contract, section 23.
func example() overlay.Config {
	return overlay.Config{
		Device: "silk-vtep", VNI: 1, Port: 4789,
		Underlay: netip.MustParseAddr("10.0.16.15"),
		Network:  netip.MustParsePrefix("10.255.0.0/16"),
		Local:    newLease("10.255.30.0/24", "10.0.16.15"),
		Peers:    []lease.Lease{newLease("10.255.0.12/32", "10.0.16.20"), newLease("10.255.2.0/24", "10.0.16.16")},
	}
}

// manyPeers returns n leases in 10.0.0.0/8, cut into blocks of /26.
func manyPeers(n int) []lease.Lease {
	ls := make([]lease.Lease, n)
	for i := range ls {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte((i + 4) >> 10), byte((i + 4) >> 2), byte((i + 4) << 6)}), 26)
		ls[i] = lease.Lease{Underlay: netip.AddrFrom4([4]byte{172, 16 + byte(i>>16), byte(i >> 8), byte(i)}), Subnet: p, MAC: lease.MACOf(p)}
	}
	return ls
}

// large is a configuration with n peers.
func large(n int) overlay.Config {
	c := example()
	c.Underlay = netip.MustParseAddr("192.168.16.15")
	c.Network = netip.MustParsePrefix("10.0.0.0/8")
	c.Local = newLease("10.255.30.0/24", "192.168.16.15")
	c.Peers = manyPeers(n)
	return c
}

func (h *host) set(c overlay.Config) overlay.Report {
	h.t.Helper()
	r, err := h.f.Set(context.Background(), c)
	if err != nil {
		h.t.Fatalf("set: %v (report %+v)", err, r)
	}
	return r
}

// plan returns what a second Fabric, which has seen nothing, would do.
func (h *host) plan(c overlay.Config) []string {
	h.t.Helper()
	lines, err := h.tryPlan(c)
	if err != nil {
		h.t.Fatal(err)
	}
	return lines
}

func (h *host) tryPlan(c overlay.Config) ([]string, error) {
	f, err := overlay.Open(h.ns)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines, _, err := f.Plan(context.Background(), c)
	return lines, err
}

// toDo returns what a Set would do now, or why that cannot be told, and "" if the kernel holds exactly what c asks for.
func (h *host) toDo(c overlay.Config) string {
	p, err := h.tryPlan(c)
	if err != nil {
		return err.Error()
	}
	return strings.Join(p, "\n")
}

// holds fails the test unless the kernel holds exactly what c asks for.
func (h *host) holds(c overlay.Config) {
	h.t.Helper()
	if p := h.plan(c); len(p) > 0 {
		h.t.Fatalf("after Set there is still to do:\n%s", strings.Join(p, "\n"))
	}
}

// dump returns what ip, bridge and nft say of the host, without what counts or varies.
func (h *host) dump() string {
	h.t.Helper()
	testkit.Within(h.t, 10*time.Second, func() string { // the kernel looks at carriers once a second, and later on a busy machine
		if out := h.sh("ip link show"); strings.Contains(out, "NO-CARRIER") || strings.Contains(out, "LOWERLAYERDOWN") {
			return "no carrier:\n" + out
		}
		return ""
	})
	return h.sh("ip -d link show; ip addr show; ip route show table all; ip rule show; ip neigh show nud all; bridge fdb show; nft list ruleset")
}

func pid() int { return os.Getpid() }
