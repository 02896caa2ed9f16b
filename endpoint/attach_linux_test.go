package endpoint_test

import (
	"context"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

var subnet = netip.MustParsePrefix("10.255.30.0/24")

// host is a host's namespace with a directory of endpoints.
type host struct {
	t   testing.TB
	ns  *kernel.NS
	dir *endpoint.Dir
}

func newHost(t testing.TB) host {
	t.Helper()
	d, err := endpoint.Open(filepath.Join(t.TempDir(), "endpoints"))
	if err != nil {
		t.Fatal(err)
	}
	return host{t, netns.New(t), d}
}

func key(container string) endpoint.Key {
	return endpoint.Key{Network: "silk", Container: container, Interface: "eth0"}
}

func (h host) spec(container string, ns *kernel.NS) endpoint.Spec {
	return endpoint.Spec{Key: key(container), Path: "/run/netns/" + container, Namespace: ns, Subnet: subnet, MTU: 1450, Group: "app-" + container}
}

func (h host) attach(s endpoint.Spec) (r endpoint.Record, err error) {
	err = h.ns.Do(func() error {
		r, err = h.dir.Attach(context.Background(), s, nil)
		return err
	})
	return r, err
}

func (h host) detach(k endpoint.Key, ns *kernel.NS) error {
	return h.ns.Do(func() error { return h.dir.Detach(context.Background(), k, ns, nil) })
}

func (h host) must(r endpoint.Record, err error) endpoint.Record {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

// ip runs ip(8) in ns and returns what it prints, one line each, without device numbers.
func ip(t testing.TB, ns *kernel.NS, args ...string) string {
	t.Helper()
	var out []byte
	if err := ns.Do(func() (err error) {
		out, err = exec.Command("ip", args...).CombinedOutput()
		return err
	}); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
	return string(out)
}

func sysctl(t testing.TB, ns *kernel.NS, key string) (v string) {
	t.Helper()
	if err := ns.Do(func() (err error) { v, err = kernel.Sysctl(key); return err }); err != nil {
		t.Fatal(err)
	}
	return v
}

// reach connects from one namespace to an address in another.
func reach(t testing.TB, from, to *kernel.NS, addr string) {
	t.Helper()
	var l net.Listener
	if err := to.Do(func() (err error) { l, err = net.Listen("tcp4", addr+":0"); return err }); err != nil {
		t.Errorf("listen on %s: %v", addr, err)
		return
	}
	defer l.Close()
	if err := from.Do(func() error {
		c, err := net.DialTimeout("tcp4", l.Addr().String(), 5*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Errorf("connect to %s: %v", addr, err)
	}
}

func TestAttachMakesTheObjects(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	r := h.must(h.attach(h.spec("c1", c)))
	if got := r.Address(); got != netip.MustParseAddr("10.255.30.2") {
		t.Errorf("address %v, want the second of the subnet", got)
	}
	dev := r.Device
	for _, tt := range []struct {
		ns   *kernel.NS
		args string
		want []string
	}{
		{h.ns, "-o -d link show " + dev, []string{dev + "@", "NOARP", "UP", "mtu 1450", "qdisc noqueue", "aa:aa:0a:ff:1e:02", "veth"}},
		{h.ns, "-o addr show " + dev, []string{"inet 169.254.0.1 peer 10.255.30.2/32 scope link"}},
		{h.ns, "route", []string{"10.255.30.2 dev " + dev + " proto kernel scope link src 169.254.0.1"}},
		{h.ns, "neigh show dev " + dev, []string{"10.255.30.2 lladdr ee:ee:0a:ff:1e:02 PERMANENT"}},
		{c, "-o -d link show eth0", []string{"NOARP", "UP", "mtu 1450", "ee:ee:0a:ff:1e:02", "veth"}},
		{c, "-o addr show eth0", []string{"inet 10.255.30.2 peer 169.254.0.1/32 scope link"}},
		{c, "route", []string{"default via 169.254.0.1 dev eth0 src 10.255.30.2", "169.254.0.1 dev eth0 proto kernel scope link src 10.255.30.2"}},
		{c, "neigh show dev eth0", []string{"169.254.0.1 lladdr aa:aa:0a:ff:1e:02 PERMANENT"}},
	} {
		got := ip(t, tt.ns, strings.Fields(tt.args)...)
		for _, w := range tt.want {
			if !strings.Contains(got, w) {
				t.Errorf("ip %s: no %q in\n%s", tt.args, w, got)
			}
		}
		if strings.Contains(got, "inet6") {
			t.Errorf("ip %s: IPv6 is left:\n%s", tt.args, got)
		}
	}
	if n := strings.Count(ip(t, c, "route"), "\n"); n != 2 {
		t.Errorf("%d routes in the container, want 2", n)
	}
	for ns, keys := range map[*kernel.NS][]string{
		h.ns: {"net/ipv4/ip_forward", "net/ipv4/conf/" + dev + "/rp_filter", "net/ipv6/conf/" + dev + "/disable_ipv6"},
		c:    {"net/ipv4/conf/eth0/rp_filter", "net/ipv6/conf/eth0/disable_ipv6"},
	} {
		for _, k := range keys {
			if v := sysctl(t, ns, k); v != "1" {
				t.Errorf("%s is %s, want 1", k, v)
			}
		}
	}
	reach(t, c, h.ns, "169.254.0.1")
	reach(t, h.ns, c, "10.255.30.2")
}

// TestSmallMTU: below 1280 bytes a device has no IPv6 that could be disabled.
func TestSmallMTU(t *testing.T) {
	h := newHost(t)
	for i, mtu := range []int{68, 1279, 1280, 65535} {
		c := netns.New(t)
		s := h.spec(string(rune('a'+i)), c)
		s.MTU = mtu
		r := h.must(h.attach(s))
		if d := h.check(r.Key, c); len(d) > 0 {
			t.Errorf("MTU %d: %v", mtu, d)
		}
		if out := ip(t, c, "-6", "addr", "show", "eth0") + ip(t, h.ns, "-6", "addr", "show", r.Device); strings.Contains(out, "inet6") {
			t.Errorf("MTU %d: %s", mtu, out)
		}
	}
}
