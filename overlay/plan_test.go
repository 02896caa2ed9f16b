package overlay

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/lease"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite what tests compare with")

// TestPlan reads testdata/plan/*.txt. Each says what is wanted, what is there and, after "plan:", what is to be done.
//
//	peer SUBNET UNDERLAY      a peer
//	local SUBNET              the local lease (10.255.30.0/24)
//	fenced
//	there:                    what is there: at first what a Set without the lines below would leave, for these peers
//	nothing                   forget that: there is nothing but the lower device
//	peer SUBNET UNDERLAY      what a peer of an earlier Set left
//	no WORDS                  without the objects whose text has WORDS
//	address|route|neigh|fdb|element TEXT   one more object
//	link FIELD=VALUE ...      the device differs
//	lower MTU                 of the lower device, 0 for none
//	chain NAME TEXT           the rules of a chain are just this one
func TestPlan(t *testing.T) {
	files, err := filepath.Glob("testdata/plan/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no plans in testdata", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			input, want, ok := strings.Cut(string(b), "plan:\n")
			if !ok {
				t.Fatalf("%s has no plan", file)
			}
			got := planText(t, input)
			if *update {
				if err := os.WriteFile(file, []byte(input+"plan:\n"+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("plan (-want +got):\n%s", diff)
			}
		})
	}
}

func planText(t *testing.T, input string) string {
	t.Helper()
	wants, there, _ := strings.Cut(input, "there:\n")
	cfg := Config{Device: "silk-vtep", VNI: 1, Port: 4789, Underlay: netip.MustParseAddr("10.0.16.15"), Network: netip.MustParsePrefix("10.255.0.0/16")}
	cfg.Local = testLease(t, "10.255.30.0/24", "10.0.16.15")
	for line := range lines(wants) {
		switch f := strings.Fields(line); f[0] {
		case "peer":
			cfg.Peers = append(cfg.Peers, testLease(t, f[1], f[2]))
		case "local":
			cfg.Local = testLease(t, f[1], "10.0.16.15")
		case "fenced":
			cfg.Fenced = true
		default:
			t.Fatalf("what is %q?", line)
		}
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	w := newWish(cfg)
	o := wished(&w)
	for line := range lines(there) {
		observe(t, &w, o, line)
	}
	var out []string
	for _, s := range w.skipped {
		out = append(out, fmt.Sprintf("skipped %v: %s", s.Lease.Subnet, s.Reason))
	}
	p, err := makePlan(&w, o)
	if err != nil {
		return strings.Join(append(out, "error: "+err.Error()), "\n") + "\n"
	}
	out = append(out, p.explain()...)
	out = append(out, fmt.Sprintf("desired %d observed %d foreign %d", p.desired, p.observed, p.foreign))
	return strings.Join(out, "\n") + "\n"
}

func lines(s string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for l := range strings.Lines(s) {
			l, _, _ = strings.Cut(l, "#")
			if l = strings.TrimSpace(l); l != "" && !yield(l) {
				return
			}
		}
	}
}

func testLease(t *testing.T, subnet, underlay string) lease.Lease {
	t.Helper()
	p, err := netip.ParsePrefix(subnet)
	if err != nil {
		t.Fatal(err)
	}
	return lease.Lease{Underlay: netip.MustParseAddr(underlay), Subnet: p, MAC: lease.MACOf(p)}
}

// wished returns what the kernel holds once w has been set.
func wished(w *wish) *observed {
	c := w.cfg
	o := &observed{
		lower: lowerLink{2, 1500, "eth0"},
		link:  &link{index: 5, kind: "vxlan", mac: c.Local.MAC, mtu: 1450, up: true, vxlan: vxlan{vni: c.VNI, port: c.Port, local: c.Underlay, lower: 2, gbp: true}},
		guard: guard{table: true, set: true, own: true, ownIs: len(pairs(c.Local.Subnet)) > 0, chains: guardChains(c, "eth0")},
	}
	if !c.Fenced {
		o.addrs, o.routes = []address{w.address()}, []route{w.connected()}
	}
	for _, l := range w.peers {
		addPeer(w, o, l)
	}
	return o
}

func addPeer(w *wish, o *observed, l lease.Lease) {
	o.routes = append(o.routes, w.route(l))
	o.neighs = append(o.neighs, neigh{l.Base(), l.MAC, true})
	o.entries = append(o.entries, entry{mac: l.MAC, dst: l.Underlay, permanent: true})
	if !slices.Contains(o.guard.peers, l.Underlay) {
		o.guard.peers = append(o.guard.peers, l.Underlay)
	}
}

func without[T any](list []T, words string) []T {
	return slices.DeleteFunc(list, func(x T) bool { return strings.Contains(fmt.Sprint(x), words) })
}

func observe(t *testing.T, w *wish, o *observed, line string) {
	t.Helper()
	word, rest, _ := strings.Cut(line, " ")
	f := strings.Fields(rest)
	switch word {
	case "nothing":
		*o = observed{lower: o.lower}
	case "peer":
		addPeer(w, o, testLease(t, f[0], f[1]))
	case "no":
		o.addrs, o.routes, o.neighs, o.entries = without(o.addrs, rest), without(o.routes, rest), without(o.neighs, rest), without(o.entries, rest)
		o.guard.peers, o.guard.chains = without(o.guard.peers, rest), without(o.guard.chains, rest)
		if rest == "set" {
			o.guard.set, o.guard.peers = false, nil
		}
	case "address":
		o.addrs = append(o.addrs, address{netip.MustParsePrefix(f[0]), scope(t, f)})
	case "route":
		o.routes = append(o.routes, parseTestRoute(t, f))
	case "neigh":
		o.neighs = append(o.neighs, neigh{netip.MustParseAddr(f[0]), testMAC(t, f[1]), slices.Contains(f, "permanent")})
	case "fdb":
		o.entries = append(o.entries, entry{testMAC(t, f[0]), netip.MustParseAddr(f[1]), slices.Contains(f, "permanent"), slices.Contains(f, "odd")})
	case "element":
		o.guard.peers = append(o.guard.peers, netip.MustParseAddr(f[0]))
	case "chain":
		i := slices.IndexFunc(o.guard.chains, func(c chain) bool { return c.name == f[0] })
		o.guard.chains[i].rules = []string{strings.Join(f[1:], " ")}
	case "set": // something else bears its name
		o.guard.set, o.guard.other, o.guard.peers = false, true, nil
	case "lower":
		if o.lower.mtu, _ = strconv.Atoi(f[0]); o.lower.mtu == 0 {
			o.lower = lowerLink{}
		}
	case "link":
		changeLink(t, o.link, f)
	default:
		t.Fatalf("what is %q?", line)
	}
}

func scope(t *testing.T, f []string) uint8 {
	t.Helper()
	for s, name := range scopes {
		if slices.Contains(f, name) {
			return s
		}
	}
	return scopeGlobal
}

func testMAC(t *testing.T, s string) lease.MAC {
	t.Helper()
	m, err := lease.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func parseTestRoute(t *testing.T, f []string) route {
	t.Helper()
	r := route{dst: netip.MustParsePrefix(f[0]), scope: scope(t, f), odd: slices.Contains(f, "odd")}
	for i := 1; i+1 < len(f); i++ {
		n, _ := strconv.Atoi(f[i+1])
		switch f[i] {
		case "via":
			r.via = netip.MustParseAddr(f[i+1])
		case "src":
			r.src = netip.MustParseAddr(f[i+1])
		case "metric":
			r.metric = uint32(n)
		case "proto":
			r.proto = uint8(n)
		case "tos":
			r.tos = uint8(n)
		}
	}
	return r
}

func changeLink(t *testing.T, l *link, f []string) {
	t.Helper()
	for _, x := range f {
		name, value, _ := strings.Cut(x, "=")
		n, _ := strconv.Atoi(value)
		switch name {
		case "mac":
			l.mac = testMAC(t, value)
		case "mtu":
			l.mtu = n
		case "txqlen":
			l.txqlen = n
		case "master":
			l.master = n
		case "down":
			l.up = false
		case "ipv6":
			l.ipv6 = true
		case "arp":
			l.asks = true
		case "kind":
			l.kind = value
		case "vni":
			l.vxlan.vni = uint32(n)
		case "learning":
			l.vxlan.learning = true
		case "lower":
			l.vxlan.lower = n
		default:
			t.Fatalf("what is a link's %q?", x)
		}
	}
}

func TestDeltaIsTheDifference(t *testing.T) {
	cfg := Config{Device: "silk-vtep", Network: netip.MustParsePrefix("10.255.0.0/16"), Local: testLease(t, "10.255.30.0/24", "10.0.16.15")}
	stay, shared := testLease(t, "10.255.2.0/24", "10.0.16.16"), testLease(t, "10.255.3.0/24", "10.0.16.17")
	goes, moves := testLease(t, "10.255.4.0/24", "10.0.16.17"), testLease(t, "10.255.5.0/24", "10.0.16.18")
	moved, comes := moves, testLease(t, "10.255.6.0/24", "10.0.16.20")
	moved.Underlay = netip.MustParseAddr("10.0.16.19")
	w := wish{cfg: cfg, peers: []lease.Lease{stay, shared, moved, comes}}
	p := planDelta(&w, []lease.Lease{stay, shared, goes, moves}, counts{desired: 15})
	want := []string{
		"nft add element inet silk overlay-peers { 10.0.16.19 }",
		"nft add element inet silk overlay-peers { 10.0.16.20 }",
		"bridge fdb replace ee:ee:0a:ff:05:00 dst 10.0.16.19 self permanent dev silk-vtep",
		"bridge fdb replace ee:ee:0a:ff:06:00 dst 10.0.16.20 self permanent dev silk-vtep",
		"ip neigh replace 10.255.6.0 lladdr ee:ee:0a:ff:06:00 nud permanent dev silk-vtep",
		"ip route replace 10.255.6.0/24 via 10.255.6.0 dev silk-vtep proto 83 src 10.255.30.0 metric 1537",
		"ip route del 10.255.4.0/24 via 10.255.4.0 dev silk-vtep proto 83 src 10.255.30.0 metric 1025",
		"ip neigh del 10.255.4.0 dev silk-vtep",
		"bridge fdb del ee:ee:0a:ff:04:00 dst 10.0.16.17 self permanent dev silk-vtep",
		"nft delete element inet silk overlay-peers { 10.0.16.18 }", // .17 still has another lease
	}
	if diff := cmp.Diff(want, p.explain()); diff != "" {
		t.Errorf("plan (-want +got):\n%s", diff)
	}
	if p.desired != 4*3+4 || p.observed != 15 {
		t.Errorf("counted %d desired, %d observed, want 16 and 15", p.desired, p.observed)
	}
	if p := planDelta(&w, w.peers, counts{}); !p.empty() {
		t.Errorf("nothing changed and yet: %q", p.explain())
	}
}
