package overlay_test

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

func TestSetMakesTheWorkedExample(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	r := h.set(example())
	if r.Desired != 8 || r.Observed != 0 || r.Failed != 0 || r.Device.MTU != 1450 || r.Device.Lower != "eth0" || r.Device.Index == 0 {
		t.Errorf("report %+v", r)
	}
	h.holds(example())
	link := h.sh("ip -d link show silk-vtep")
	for _, want := range []string{"mtu 1450", "ee:ee:0a:ff:1e:00", "vxlan id 1 local 10.0.16.15 dev eth0", "dstport 4789", "nolearning", " gbp", "UP"} {
		if !strings.Contains(link, want) {
			t.Errorf("device lacks %q: %s", want, link)
		}
	}
	if out := h.sh("ip -6 addr show dev silk-vtep; cat /proc/sys/net/ipv6/conf/silk-vtep/disable_ipv6"); out != "1\n" {
		t.Errorf("IPv6 is on: %s", out)
	}
	if strings.Contains(link, "qlen") {
		t.Errorf("device has a queue: %s", link)
	}
	got := h.sh(`ip addr show silk-vtep | grep inet; ip route show dev silk-vtep; ip neigh show dev silk-vtep | sort; bridge fdb show dev silk-vtep | sort`)
	testkit.Golden(t, "testdata/example.txt", regexp.MustCompile(` +\n`).ReplaceAllString(got, "\n"), overlay.Rewrite())
}

// TestGuardCanBeListed compares with what the nft of Debian 12 prints.
func TestGuardCanBeListed(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	testkit.Listing(t, "testdata/guard.nft", h.sh("nft list table inet silk"), overlay.Rewrite())
	h.sh("nft list ruleset | nft -c -f -") // and can be read back
}

func TestSetTwiceDoesNothing(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	for i, full := range []bool{true, false, false} { // the second look proves that all is right
		if r := h.set(example()); r.Changed != 0 || r.Observed != r.Desired || r.Full != full {
			t.Errorf("set %d: report %+v", i+2, r)
		}
	}
	h.f.Forget()
	if r := h.set(example()); !r.Full || r.Changed != 0 {
		t.Errorf("set after Forget: report %+v", r)
	}
}

func TestSetSendsOnlyTheDifference(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	c := example()
	h.set(c)
	h.set(c)
	c.Peers = append(slices.Clone(c.Peers), newLease("10.255.3.0/24", "10.0.16.21"))
	for _, peers := range [][]lease.Lease{c.Peers, c.Peers[1:], c.Peers} {
		c.Peers = peers
		if r := h.set(c); r.Full || r.Changed != 4 || r.Desired != 4*len(peers) {
			t.Errorf("set of %d peers: report %+v", len(peers), r)
		}
		h.holds(c)
	}
}

func TestForeignChangeIsSeenByTheNextSet(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	h.set(example())
	h.sh("ip route del 10.255.2.0/24")
	c := example()
	c.Peers = c.Peers[:1] // the route is not wanted any more, but Set cannot know before it looks
	if r := h.set(c); !r.Full {
		t.Errorf("a route was deleted and Set did not look: %+v", r)
	}
	h.holds(c)
}

func TestChangeElsewhereCostsNoLook(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	h.set(example())
	h.sh(`ip link add s-010255030002 type veth peer name c0; ip addr add 169.254.0.1 peer 10.255.30.2/32 dev s-010255030002
		ip link set s-010255030002 up; ip neigh add 10.255.30.2 lladdr ee:ee:0a:ff:1e:02 dev s-010255030002 nud permanent
		ip route add 192.168.99.0/24 dev eth0; nft add table inet other; nft add chain inet silk nat-out`)
	h.send(":0", "10.255.77.1:9", nil) // nobody has this address
	if r := h.set(example()); r.Full {
		t.Errorf("a container came and Set looked at everything: %+v", r)
	}
}

func TestSetAdoptsWhatADeployedDaemonLeft(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.sh(`ip link add silk-vtep address ee:ee:0a:ff:1e:00 txqueuelen 0 type vxlan id 1 local 10.0.16.15 dev eth0 dstport 4789 nolearning gbp
		ip link set silk-vtep up
		ip addr add 10.255.30.0/16 brd + scope link dev silk-vtep
		for n in 2:16 7:27; do
			s=${n%:*}; u=${n#*:}
			ip route add 10.255.$s.0/24 via 10.255.$s.0 dev silk-vtep src 10.255.30.0
			ip neigh add 10.255.$s.0 lladdr ee:ee:0a:ff:0$s:00 dev silk-vtep nud permanent
			bridge fdb add ee:ee:0a:ff:0$s:00 dev silk-vtep dst 10.0.16.$u self permanent
		done`)
	before := h.sh("cat /proc/net/dev_snmp6/silk-vtep 2>/dev/null; ip -o link show silk-vtep | cut -d: -f1")
	h.set(example())
	h.holds(example())
	if after := h.sh("ip -o link show silk-vtep | cut -d: -f1"); !strings.HasSuffix(before, after) {
		t.Errorf("the device was made anew: index %s, was %s", after, before)
	}
	if left := h.sh("ip route; ip neigh; bridge fdb show dev silk-vtep"); strings.Contains(left, "10.255.7.0") || strings.Contains(left, ":07:00") {
		t.Errorf("a stale peer stayed:\n%s", left)
	}
}

func TestDeviceWithOtherAttributesIsMadeAnew(t *testing.T) {
	for name, attrs := range map[string]string{
		"vni":      "id 2 local 10.0.16.15 dev eth0 dstport 4789 nolearning gbp",
		"port":     "id 1 local 10.0.16.15 dev eth0 dstport 4790 nolearning gbp",
		"local":    "id 1 local 10.0.16.14 dev eth0 dstport 4789 nolearning gbp",
		"lower":    "id 1 local 10.0.16.15 dev wire dstport 4789 nolearning gbp",
		"gbp":      "id 1 local 10.0.16.15 dev eth0 dstport 4789 nolearning",
		"learning": "id 1 local 10.0.16.15 dev eth0 dstport 4789 gbp",
		"remote":   "id 1 local 10.0.16.15 remote 10.0.16.99 dev eth0 dstport 4789 nolearning gbp",
		"proxy":    "id 1 local 10.0.16.15 dev eth0 dstport 4789 nolearning gbp proxy",
		"external": "external dstport 4789 nolearning gbp",
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "10.0.16.15")
			h.sh("ip link add silk-vtep type vxlan " + attrs + "; ip link set silk-vtep up")
			h.set(example())
			h.holds(example())
		})
	}
}

func TestSetRefusesWhatIsNotOurs(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		kind   fault.Kind
		words  []string
	}{
		"not a vxlan":    {"ip link add silk-vtep type bridge", fault.Conflict, []string{"silk-vtep", "bridge"}},
		"external":       {"ip link add geo type vxlan external dstport 4789; ip link set geo up", fault.Conflict, []string{"4789", "external", "geo"}},
		"same vni":       {"ip link add other type vxlan id 1 dev eth0 local 10.0.16.15 dstport 4789 gbp; ip link set other up", fault.Conflict, []string{"other", "VNI 1"}},
		"no underlay":    {"ip addr flush dev eth0", fault.Unavailable, []string{"10.0.16.15"}},
		"foreign set":    {"nft 'add table inet silk; add map inet silk overlay-peers { type ipv4_addr : verdict; }; add chain inet silk x; add rule inet silk x ip saddr vmap @overlay-peers'", fault.Internal, []string{"overlay-peers"}},
		"wildcard taken": {"ip link add other type vxlan id 7 dev eth0 dstport 4789; ip link set other up", fault.Conflict, []string{"other", "4789"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "10.0.16.15")
			h.sh(c.script)
			_, err := h.f.Set(context.Background(), example())
			if err == nil || fault.Of(err) != c.kind {
				t.Fatalf("set: %v, want a fault of kind %v", err, c.kind)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error does not name %q: %v", w, err)
				}
			}
		})
	}
}

func TestInvalidConfigIsRefused(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	for name, spoil := range map[string]func(*overlay.Config){
		"device":              func(c *overlay.Config) { c.Device = "" },
		"container's name":    func(c *overlay.Config) { c.Device = "s-vtep" },
		"vni":                 func(c *overlay.Config) { c.VNI = 1 << 24 },
		"port":                func(c *overlay.Config) { c.Port = 0 },
		"underlay":            func(c *overlay.Config) { c.Underlay = c.Network.Addr().Next() },
		"network":             func(c *overlay.Config) { c.Network = c.Local.Subnet },
		"local":               func(c *overlay.Config) { c.Local = newLease("10.254.30.0/24", "10.0.16.15") },
		"local of another":    func(c *overlay.Config) { c.Local = newLease("10.255.30.0/24", "10.0.16.16") },
		"local with odd MAC":  func(c *overlay.Config) { c.Local.MAC[5]++ },
		"local without a net": func(c *overlay.Config) { c.Local = lease.Lease{Underlay: c.Underlay} },
	} {
		c := example()
		spoil(&c)
		if _, err := h.f.Set(context.Background(), c); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want an Invalid fault", name, err)
		}
	}
	if _, err := h.try("ip link show silk-vtep"); err == nil {
		t.Error("an invalid configuration made a device")
	}
}

func TestOneBadPeerHarmsNoOther(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	c := example()
	c.Peers = append(c.Peers, newLease("10.254.1.0/24", "10.0.16.30"), newLease("10.255.5.0/24", "255.255.255.255"))
	bad := newLease("10.255.4.0/24", "10.0.16.31")
	bad.MAC[0] = 1
	c.Peers = append(c.Peers, bad)
	r := h.set(c)
	if r.NonRoutable != 1 || len(r.Skipped) != 3 || r.Desired != 8 {
		t.Errorf("report %+v, want 3 skipped, 1 of them not routable", r)
	}
	h.holds(example())
}

func TestFencedHostHasNoPaths(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	c := example()
	h.set(c)
	c.Fenced = true
	h.set(c)
	h.holds(c)
	if left := h.sh("ip addr show silk-vtep | grep 'inet ' || true; ip route show dev silk-vtep; ip neigh show dev silk-vtep; bridge fdb show dev silk-vtep"); left != "" {
		t.Errorf("a fenced host kept:\n%s", left)
	}
	if g := h.sh("nft list table inet silk"); !strings.Contains(g, `udp dport 4789 iifname "s-*" counter`) || strings.Contains(g, "10.0.16.16") {
		t.Errorf("guard of a fenced host:\n%s", g)
	}
	c.Fenced = false
	h.set(c)
	h.holds(c)
}

func TestNewLeaseTakesOver(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	c := example()
	c.Local = newLease("10.255.31.0/24", "10.0.16.15")
	h.set(c)
	h.holds(c)
	c.Local = newLease("10.255.0.9/32", "10.0.16.15") // single-IP
	h.set(c)
	h.holds(c)
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.sh("nft add table inet other; ip route add 192.168.99.0/24 dev eth0")
	before := h.dump()
	h.set(example())
	for range 2 {
		if err := h.f.Remove(context.Background(), "silk-vtep"); err != nil {
			t.Fatal(err)
		}
		if after := h.dump(); after != before {
			t.Errorf("after Remove:\n%s\nbefore:\n%s", after, before)
		}
	}
}

func TestRemoveKeepsTheTableOfOthers(t *testing.T) {
	for _, what := range []string{"chain inet silk nat-out", "set inet silk nat-x { type ipv4_addr; }", "counter inet silk c"} {
		h := newHost(t, "10.0.16.15")
		h.sh("nft add table inet silk; nft 'add " + what + "'")
		before := h.dump()
		h.set(example())
		if err := h.f.Remove(context.Background(), "silk-vtep"); err != nil {
			t.Fatal(err)
		}
		if after := h.dump(); after != before {
			t.Errorf("%s: after Remove:\n%s\nbefore:\n%s", what, after, before)
		}
	}
}

func TestRemoveLeavesForeignDeviceAlone(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.sh("ip link add silk-vtep type bridge")
	if err := h.f.Remove(context.Background(), "silk-vtep"); !errors.Is(err, fault.Conflict) {
		t.Errorf("remove of a bridge: %v, want a Conflict fault", err)
	}
	h.sh("ip link show silk-vtep")
}

func TestLowerDeviceMayBeNamed(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	c := example()
	c.Lower = "wire"
	h.set(c)
	h.holds(c)
	if link := h.sh("ip -d link show silk-vtep"); !strings.Contains(link, "dev wire") {
		t.Errorf("not by the named device: %s", link)
	}
}

func TestSetEndsWithItsContext(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.f.Set(ctx, example()); !errors.Is(err, context.Canceled) {
		t.Errorf("set: %v, want context.Canceled", err)
	}
}
