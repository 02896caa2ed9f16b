package endpoint_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var comparable = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

// files returns the names of the records.
func (h host) files() []string {
	h.t.Helper()
	all, err := os.ReadDir(h.dir.Path())
	if err != nil {
		h.t.Fatal(err)
	}
	var names []string
	for _, f := range all {
		if !strings.HasPrefix(f.Name(), ".") {
			names = append(names, f.Name())
		}
	}
	return names
}

// containers returns the kernel's container devices.
func (h host) containers() []endpoint.Container {
	h.t.Helper()
	list, err := endpoint.Containers(h.ns)
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

// clean fails the test if anything of an endpoint is left.
func (h host) clean() {
	h.t.Helper()
	if f, c := h.files(), h.containers(); len(f) > 0 || len(c) > 0 {
		h.t.Errorf("left: files %v, devices %v", f, c)
	}
}

func TestAttachAgain(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	s := h.spec("c1", c)
	s.Metadata = json.RawMessage("{\"app_id\": \"<a&\u2028>\"}")
	first := h.must(h.attach(s))
	again := h.must(h.attach(s))
	if diff := cmp.Diff(first, again, comparable); diff != "" {
		t.Errorf("the second result differs (-first +second):\n%s", diff)
	}
	for name, change := range map[string]func(*endpoint.Spec){
		"network namespace":    func(s *endpoint.Spec) { s.Namespace = netns.New(t) },
		"policy group":         func(s *endpoint.Spec) { s.Group = "other" },
		"metadata":             func(s *endpoint.Spec) { s.Metadata = json.RawMessage(`{"app_id":"b"}`) },
		"address":              func(s *endpoint.Spec) { s.Requested = netip.MustParseAddr("10.255.30.77") },
		"list of egress rules": func(s *endpoint.Spec) { s.NetOut = json.RawMessage(`[]`) },
		"set of port mappings": func(s *endpoint.Spec) {
			s.PortMaps = []endpoint.PortMap{{HostPort: 1, ContainerPort: 2, Protocol: "tcp"}}
		},
	} {
		other := s
		change(&other)
		if _, err := h.attach(other); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), name) {
			t.Errorf("another %s: %v, want a conflict that names it", name, err)
		}
	}
	other := s
	other.MTU = 1400 // not the runtime's to choose
	if r := h.must(h.attach(other)); r.MTU != 1450 {
		t.Errorf("MTU of the existing endpoint became %d", r.MTU)
	}
	if n := len(h.containers()); n != 1 {
		t.Errorf("%d devices, want 1", n)
	}
}

// TestAttachMakesWhole is an ADD after one that was killed: a record without, or with some of, the kernel's objects.
func TestAttachMakesWhole(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	s := h.spec("c1", c)
	first := h.must(h.attach(s))
	for _, damage := range []struct {
		ns   *kernel.NS
		args string
	}{
		{h.ns, "link del " + first.Device},
		{h.ns, "addr flush dev " + first.Device},
		{h.ns, "route del 10.255.30.2"},
		{h.ns, "neigh del 10.255.30.2 dev " + first.Device},
		{c, "link del eth0"},
		{c, "route del default"},
		{c, "neigh del 169.254.0.1 dev eth0"},
	} {
		ip(t, damage.ns, strings.Fields(damage.args)...)
		r := h.must(h.attach(s))
		if diff := cmp.Diff(first, r, comparable); diff != "" {
			t.Errorf("after %q the result differs (-first +now):\n%s", damage.args, diff)
		}
		if d := h.check(key("c1"), c); len(d) > 0 {
			t.Errorf("after %q and a new ADD: %v", damage.args, d)
		}
	}
}

func (h host) check(k endpoint.Key, ns *kernel.NS) []string {
	h.t.Helper()
	var texts []string
	if err := h.ns.Do(func() error {
		_, diffs, err := h.dir.Check(k, ns)
		for _, d := range diffs {
			texts = append(texts, d.String())
		}
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	return texts
}

// TestAttachReplacesWhatIsDead: the runtime restarted a container under its name and never sent the DEL.
func TestAttachReplacesWhatIsDead(t *testing.T) {
	h, c, next := newHost(t), netns.New(t), netns.New(t) // the next one is made now, or it might get the number of the first
	h.must(h.attach(h.spec("c1", c)))
	c.Close() // the last reference: the devices go with the namespace
	for len(h.containers()) > 0 {
	}
	r := h.must(h.attach(h.spec("c1", next)))
	if got := r.Address().String(); got != "10.255.30.3" {
		t.Errorf("address %s, want the next one", got)
	}
	if f := h.files(); len(f) != 1 {
		t.Errorf("records %v, want one", f)
	}
}

func TestCheckNamesEachDifference(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	s := h.spec("c1", c)
	r := h.must(h.attach(s))
	if d := h.check(r.Key, c); len(d) > 0 {
		t.Fatalf("right after ADD: %v", d)
	}
	for _, tt := range []struct {
		ns         *kernel.NS
		args, want string
	}{
		{h.ns, "ip link set " + r.Device + " mtu 1400", "mtu of " + r.Device + " is 1400: expected 1450"},
		{h.ns, "ip link set " + r.Device + " address aa:aa:aa:aa:aa:aa", "hardware address of " + r.Device + " is aa:aa:aa:aa:aa:aa: expected aa:aa:0a:ff:1e:02"},
		{h.ns, "ip link set " + r.Device + " arp on", "arp of " + r.Device + " is on: expected off"},
		{h.ns, "ip link set " + r.Device + " down", "administrative state of " + r.Device + " is down: expected up"},
		{h.ns, "sysctl net/ipv4/conf/" + r.Device + "/rp_filter=0", "sysctl net/ipv4/conf/" + r.Device + "/rp_filter is 0: expected 1"},
		{h.ns, "sysctl net/ipv6/conf/" + r.Device + "/disable_ipv6=0", "sysctl net/ipv6/conf/" + r.Device + "/disable_ipv6 is 0: expected 1"},
		{h.ns, "sysctl net/ipv4/ip_forward=0", "sysctl net/ipv4/ip_forward is 0: expected 1"},
		{h.ns, "ip addr flush dev " + r.Device, "address 169.254.0.1 peer 10.255.30.2 on " + r.Device + " is missing: expected present"},
		{h.ns, "ip route del 10.255.30.2", "route to 10.255.30.2 on " + r.Device + " is missing: expected present"},
		{h.ns, "ip neigh del 10.255.30.2 dev " + r.Device, "permanent neighbour 10.255.30.2 ee:ee:0a:ff:1e:02 on " + r.Device + " is missing: expected present"},
		{c, "ip link set eth0 mtu 1300", "mtu of eth0 is 1300: expected 1450"},
		{c, "ip addr flush dev eth0", "address 10.255.30.2 peer 169.254.0.1 on eth0 is missing: expected present"},
		{c, "ip route del default", "default route of eth0 is missing: expected via 169.254.0.1"},
		{c, "ip neigh del 169.254.0.1 dev eth0", "permanent neighbour 169.254.0.1 aa:aa:0a:ff:1e:02 on eth0 is missing: expected present"},
		{h.ns, "ip link del " + r.Device, "device " + r.Device + " is missing: expected a veth aa:aa:0a:ff:1e:02"},
	} {
		f := strings.Fields(tt.args)
		if k, v, ok := strings.Cut(f[1], "="); f[0] == "sysctl" && ok {
			if err := tt.ns.Do(func() error { return kernel.SetSysctl(k, v) }); err != nil {
				t.Fatal(err)
			}
		} else {
			ip(t, tt.ns, f[1:]...)
		}
		if got := h.check(r.Key, c); !contains(got, tt.want) {
			t.Errorf("%s: %q, want among them %q", tt.args, got, tt.want)
		}
		if err := h.detach(r.Key, c); err != nil {
			t.Fatal(err)
		}
		s.Requested = r.Address()
		r = h.must(h.attach(s))
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func TestDetach(t *testing.T) {
	h := newHost(t)
	before := ip(t, h.ns, "addr") + ip(t, h.ns, "route", "show", "table", "all")
	for name, prepare := range map[string]func(k endpoint.Key, c *kernel.NS) *kernel.NS{
		"as it should be":           func(_ endpoint.Key, c *kernel.NS) *kernel.NS { return c },
		"without namespace":         func(endpoint.Key, *kernel.NS) *kernel.NS { return nil },
		"namespace gone":            func(_ endpoint.Key, c *kernel.NS) *kernel.NS { c.Close(); return nil },
		"interface gone":            func(_ endpoint.Key, c *kernel.NS) *kernel.NS { ip(t, c, "link", "del", "eth0"); return c },
		"garbage in the record":     func(endpoint.Key, *kernel.NS) *kernel.NS { h.spoil("garbage"); return nil },
		"empty record":              func(endpoint.Key, *kernel.NS) *kernel.NS { h.spoil(""); return nil },
		"another endpoint's record": func(endpoint.Key, *kernel.NS) *kernel.NS { h.spoil(`{"network":"x"}`); return nil },
		"no record":                 func(_ endpoint.Key, c *kernel.NS) *kernel.NS { h.forget(); return c },
	} {
		t.Run(name, func(t *testing.T) {
			c := netns.New(t)
			h.must(h.attach(h.spec("c1", c)))
			ns := prepare(key("c1"), c)
			for range 2 {
				if err := h.detach(key("c1"), ns); err != nil {
					t.Error(err)
				}
			}
			h.clean()
		})
	}
	if after := ip(t, h.ns, "addr") + ip(t, h.ns, "route", "show", "table", "all"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// spoil overwrites the only record.
func (h host) spoil(content string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.dir.Path(), h.files()[0]), []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// forget removes the only record.
func (h host) forget() {
	h.t.Helper()
	if err := os.Remove(filepath.Join(h.dir.Path(), h.files()[0])); err != nil {
		h.t.Fatal(err)
	}
}

// TestDetachLeavesForeignInterfaces: without a record only what is certainly ours goes.
func TestDetachLeavesForeignInterfaces(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	ip(t, c, "link", "add", "eth0", "address", "ee:ee:0a:ff:1e:02", "type", "veth", "peer", "name", "other")
	if err := h.detach(key("c1"), c); err != nil {
		t.Error(err)
	}
	ip(t, c, "link", "show", "eth0")
}

func TestFailedAttachLeavesNothing(t *testing.T) {
	h := newHost(t)
	taken := netns.New(t)
	ip(t, taken, "link", "add", "eth0", "type", "bridge")
	if _, err := h.attach(h.spec("c1", taken)); !errors.Is(err, fault.Conflict) {
		t.Errorf("interface that exists: %v, want a conflict", err)
	}
	h.clean()
	ip(t, taken, "link", "show", "eth0")

	refused := errors.New("refused")
	err := h.ns.Do(func() error {
		_, err := h.dir.Attach(context.Background(), h.spec("c2", netns.New(t)), func(endpoint.Record) error { return refused })
		return err
	})
	if !errors.Is(err, refused) {
		t.Errorf("a later step fails: %v, want its error", err)
	}
	h.clean()
}

func TestForeignDevicesAndRoutesTakeAddresses(t *testing.T) {
	h := newHost(t)
	ip(t, h.ns, "link", "add", "s-010255030002", "type", "veth", "peer", "name", "x")
	ip(t, h.ns, "link", "add", "br0", "type", "bridge")
	ip(t, h.ns, "link", "set", "br0", "up")
	ip(t, h.ns, "route", "add", "10.255.30.3/32", "dev", "br0")
	ip(t, h.ns, "addr", "add", "10.255.30.4/16", "dev", "br0")
	r := h.must(h.attach(h.spec("c1", netns.New(t))))
	if got := r.Address().String(); got != "10.255.30.5" {
		t.Errorf("address %s, want the first that nobody has", got)
	}
	for i, want := range map[string]string{"10.255.30.2": "device s-010255030002", "10.255.30.3": "br0", "10.255.30.4": "br0", "10.255.30.5": "c1/eth0"} {
		s := h.spec("c2", netns.New(t))
		s.Requested = netip.MustParseAddr(i)
		if _, err := h.attach(s); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), want) {
			t.Errorf("requested %s: %v, want a conflict that names %q", i, err, want)
		}
	}
	if got := h.containers(); len(got) != 2 || got[0].Device != "s-010255030002" {
		t.Errorf("container devices %v, want the foreign one too", got)
	}
}

func TestDeviceNumbersThatAreTaken(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	ip(t, h.ns, "link", "add", "host0", "index", fmt.Sprint(1<<24|255<<16|30<<8|2), "type", "bridge")
	ip(t, c, "link", "add", "cont0", "index", "102", "type", "bridge")
	r := h.must(h.attach(h.spec("c1", c)))
	if d := h.check(r.Key, c); len(d) > 0 {
		t.Errorf("%v", d)
	}
	for ns, dev := range map[*kernel.NS]string{h.ns: "host0", c: "cont0"} {
		if got := ip(t, ns, "addr", "show", dev); strings.Contains(got, "inet") || strings.Contains(got, "UP") {
			t.Errorf("the foreign device was changed: %s", got)
		}
		if got := ip(t, ns, "neigh", "show", "dev", dev); got != "" {
			t.Errorf("the foreign device has a neighbour: %s", got)
		}
	}
}

func TestSecondInterface(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	first := h.must(h.attach(h.spec("c1", c)))
	s := h.spec("c1", c)
	s.Interface = "eth1"
	second := h.must(h.attach(s))
	for _, r := range []endpoint.Record{first, second} {
		if d := h.check(r.Key, c); len(d) > 0 {
			t.Errorf("%s: %v", r.Interface, d)
		}
	}
	if got := ip(t, c, "route", "get", "192.0.2.1"); !strings.Contains(got, "dev eth0") {
		t.Errorf("the default route is %s, want the first interface's", got)
	}
	if err := h.detach(first.Key, c); err != nil {
		t.Fatal(err)
	}
	if d := h.check(second.Key, c); len(d) > 0 {
		t.Errorf("after the first went: %v", d)
	}
}

func TestConcurrentAttach(t *testing.T) {
	h := newHost(t)
	const n = 64
	records := make([]endpoint.Record, n)
	var wg sync.WaitGroup
	for i := range n {
		c := netns.New(t)
		wg.Go(func() {
			r, err := h.attach(h.spec(fmt.Sprintf("c%d", i), c))
			if err != nil {
				t.Error(err)
			}
			records[i] = r
		})
	}
	wg.Wait()
	seen := map[netip.Addr]bool{}
	for _, r := range records {
		if seen[r.Address()] {
			t.Errorf("address %v was given twice", r.Address())
		}
		seen[r.Address()] = true
	}
	if got := len(h.containers()); got != n {
		t.Errorf("%d devices, want %d", got, n)
	}
	for _, r := range records {
		wg.Go(func() {
			if err := h.detach(r.Key, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	h.clean()
}

// TestAttachAndDetachOfOneEndpointTakeTurns: whichever comes last, the endpoint is whole or gone.
func TestAttachAndDetachOfOneEndpointTakeTurns(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	for range 5 {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := h.attach(h.spec("c1", c)); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				if err := h.detach(key("c1"), nil); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(h.files()) == 0 {
			h.clean()
		} else if d := h.check(key("c1"), c); len(d) > 0 {
			t.Errorf("%v", d)
		}
		if err := h.detach(key("c1"), c); err != nil {
			t.Fatal(err)
		}
	}
	h.clean()
}
