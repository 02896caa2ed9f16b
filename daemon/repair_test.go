package daemon_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// whole returns an error unless the host's VTEP and paths are as they should be.
func (h *host) whole(subnet string, peers ...string) error {
	link, err := h.nl.LinkByName(vtep)
	if err != nil {
		return err
	}
	p := netip.MustParsePrefix(subnet)
	v, ok := link.(*netlink.Vxlan)
	if !ok || v.HardwareAddr.String() != lease.MACOf(p).String() || v.Attrs().MTU != 1450 || v.Flags&net.FlagUp == 0 || !v.GBP || v.Learning {
		return fmt.Errorf("device %+v", link)
	}
	if got := h.addresses(vtep); !slices.Contains(got, fmt.Sprintf("%v/16", p.Addr())) {
		return fmt.Errorf("addresses %v", got)
	}
	got := h.paths()
	for _, want := range pathsTo(peers...) {
		if !slices.Contains(got, want) {
			return fmt.Errorf("no %s in %q", want, got)
		}
	}
	return nil
}

// TestDaemonRepairsWithinASecond is the saboteur: each thing that others may do to the overlay is undone within a second.
func TestDaemonRepairsWithinASecond(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.config["poll_interval"] = 30 // only the watch on the kernel can be this quick
	h.start()
	n := h.ready()
	subnet := netip.MustParsePrefix(n.OverlaySubnet)
	peer := netip.MustParsePrefix("10.255.200.0/24")
	must(t, w.api().Renew(t.Context(), leaseOf(netip.MustParseAddr("10.0.16.77"), peer)))
	h.hasPaths(5*time.Second, "10.0.16.77", peer.String())
	link := func() netlink.Link {
		l, err := h.nl.LinkByName(vtep)
		must(t, err)
		return l
	}
	mac := func(m lease.MAC) net.HardwareAddr { return m[:] }
	path := func() netlink.Route {
		rs, err := h.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: link().Attrs().Index, Dst: address(peer.String()).IPNet}, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
		must(t, err)
		if len(rs) != 1 {
			t.Fatalf("routes %v", rs)
		}
		return rs[0]
	}
	neigh := func(family int, ip string) *netlink.Neigh {
		n := &netlink.Neigh{LinkIndex: link().Attrs().Index, Family: family, IP: net.ParseIP(ip), HardwareAddr: mac(lease.MACOf(peer)), State: netlink.NUD_PERMANENT}
		if family == 7 {
			n.Flags = netlink.NTF_SELF
		}
		return n
	}
	dir, err := endpoint.Open(h.config["endpoint_dir"].(string))
	must(t, err)
	inside, err := kernel.NewNS()
	must(t, err)
	defer inside.Close()
	must(t, h.ns.Do(func() error {
		_, err := dir.Attach(t.Context(), endpoint.Spec{Key: endpoint.Key{Network: "net", Container: "c1", Interface: "eth0"}, Namespace: inside, Subnet: subnet, MTU: n.MTU,
			PortMaps: []endpoint.PortMap{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}}, nil)
		return err
	}))
	before := sortedLines(h.rules()) // the order of chains is that of their making
	for name, spoil := range map[string]func() error{
		"rules flushed": func() error { h.command("nft", "flush", "ruleset"); return nil },
		"guard deleted": func() error { h.command("nft", "flush", "chain", "inet", "silk", "overlay-input"); return nil },
		"translation deleted": func() error {
			h.command("nft", "flush chain inet silk nat-postrouting; delete chain inet silk nat-postrouting")
			return nil
		},
		"translation changed": func() error { h.command("nft", "flush set inet silk nat-local"); return nil },
		"port map deleted": func() error {
			h.command("nft", "delete element inet silk nat-ports { tcp . 8080 }")
			return nil
		},
		"port maps flushed": func() error { h.command("nft", "flush chain inet silk nat-ports"); return nil },
		"route deleted":     func() error { r := path(); return h.nl.RouteDel(&r) },
		"route replaced":    func() error { r := path(); r.Gw = subnet.Addr().Next().AsSlice(); return h.nl.RouteReplace(&r) },
		"neighbour deleted": func() error { return h.nl.NeighDel(neigh(netlink.FAMILY_V4, peer.Addr().String())) },
		"neighbour changed": func() error {
			n := neigh(netlink.FAMILY_V4, peer.Addr().String())
			n.HardwareAddr = net.HardwareAddr{2, 0, 0, 0, 0, 9}
			return h.nl.NeighSet(n)
		},
		"entry deleted": func() error { return h.nl.NeighDel(neigh(7, "10.0.16.77")) },
		"entry changed": func() error { return h.nl.NeighSet(neigh(7, "10.0.16.78")) },
		"address deleted": func() error {
			return h.nl.AddrDel(link(), address(fmt.Sprintf("%v/16", subnet.Addr())))
		},
		"MAC changed":    func() error { return h.nl.LinkSetHardwareAddr(link(), net.HardwareAddr{2, 0, 0, 0, 0, 1}) },
		"MTU changed":    func() error { return h.nl.LinkSetMTU(link(), 1000) },
		"device down":    func() error { return h.nl.LinkSetDown(link()) },
		"device deleted": func() error { return h.nl.LinkDel(link()) },
	} {
		t.Run(name, func(t *testing.T) {
			must(t, spoil())
			start := time.Now()
			eventually(t, patience, "whole again", func() error {
				if err := h.whole(n.OverlaySubnet, "10.0.16.77", peer.String()); err != nil {
					return err
				}
				if got, want := h.paths(), pathsTo("10.0.16.77", peer.String()); !slices.Equal(got, want) {
					return fmt.Errorf("%q, want %q", got, want)
				}
				if diff := cmp.Diff(before, sortedLines(h.rules())); diff != "" {
					return fmt.Errorf("rules (-before +after):\n%s", diff)
				}
				return nil
			})
			t.Logf("repaired within %v", time.Since(start).Round(time.Millisecond))
		})
	}
	if got := h.network(); got.Status != "ready" {
		t.Errorf("after all repairs %+v", got)
	}
}

// TestDaemonRepairsWhileTheStoreIsLocked has a stuck writer hold the deployed store's lock: to count containers is not so
// urgent that repairs may wait for it.
func TestDaemonRepairsWhileTheStoreIsLocked(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.config["poll_interval"] = 30
	f, err := os.Create(h.config["datastore"].(string))
	must(t, err)
	defer f.Close()
	h.start()
	n := h.ready()
	must(t, kernel.Flock(t.Context(), f))
	for i := range 5 {
		link, err := h.nl.LinkByName(vtep)
		must(t, err)
		must(t, h.nl.LinkSetMTU(link, 1000+i))
		eventually(t, patience, "whole again", func() error { return h.whole(n.OverlaySubnet) })
	}
}

// TestDaemonLeavesWhatIsNotOurs puts foreign objects beside ours and restarts the daemon over them.
func TestDaemonLeavesWhatIsNotOurs(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	eth, err := a.nl.LinkByName("eth0")
	must(t, err)
	must(t, a.nl.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: address("192.0.2.0/24").IPNet, Gw: net.ParseIP(controllerIP)}))
	must(t, a.nl.NeighAdd(&netlink.Neigh{LinkIndex: eth.Attrs().Index, IP: net.ParseIP("10.0.16.200"), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 2}, State: netlink.NUD_PERMANENT}))
	must(t, a.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br-other"}}))
	a.command("nft", "add table inet other")
	a.command("nft", "add chain inet other c { type filter hook forward priority 5 ; }")
	must(t, w.api().Release(t.Context(), netip.MustParseAddr("10.0.16.200")))
	a.term()
	// A peer that went while the daemon was down, and leftovers of an earlier run.
	b.term()
	must(t, w.api().Release(t.Context(), netip.MustParseAddr(b.ip)))
	a.start()
	a.ready()
	a.hasPaths(5 * time.Second)
	if rs, err := a.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: address("192.0.2.0/24").IPNet}, netlink.RT_FILTER_DST); err != nil || len(rs) != 1 {
		t.Errorf("foreign route: %v, %v", rs, err)
	}
	if ns, err := a.nl.NeighList(eth.Attrs().Index, netlink.FAMILY_V4); err != nil || !slices.ContainsFunc(ns, func(n netlink.Neigh) bool { return n.IP.String() == "10.0.16.200" }) {
		t.Errorf("foreign neighbour: %v, %v", ns, err)
	}
	if _, err := a.nl.LinkByName("br-other"); err != nil {
		t.Error(err)
	}
	if s := a.rules(); !strings.Contains(s, "table inet other") || !strings.Contains(s, "table inet silk") {
		t.Errorf("rules:\n%s", s)
	}
	if err := a.whole(na.OverlaySubnet); err != nil {
		t.Error(err)
	}
}

// TestDaemonTakesOverFromADeployedOne puts everything there as the deployed daemon makes it: the device stays, and so do the
// paths all the time, with and without a controller.
func TestDaemonTakesOverFromADeployedOne(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	local, peer, old := netip.MustParsePrefix("10.255.30.0/24"), netip.MustParsePrefix("10.255.2.0/24"), netip.MustParsePrefix("10.255.3.0/24")
	must(t, w.api().Renew(t.Context(), leaseOf(netip.MustParseAddr(h.ip), local)))
	must(t, w.api().Renew(t.Context(), leaseOf(netip.MustParseAddr("10.0.16.77"), peer)))
	eth, err := h.nl.LinkByName("eth0")
	must(t, err)
	mac := func(p netip.Prefix) net.HardwareAddr { m := lease.MACOf(p); return m[:] }
	must(t, h.nl.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: vtep, HardwareAddr: mac(local)}, VxlanId: 1, Port: 4789, GBP: true,
		SrcAddr: net.ParseIP(h.ip), VtepDevIndex: eth.Attrs().Index}))
	link, err := h.nl.LinkByName(vtep)
	must(t, err)
	must(t, h.nl.LinkSetUp(link))
	a := address("10.255.30.0/16")
	a.Scope = int(netlink.SCOPE_LINK)
	must(t, h.nl.AddrAdd(link, a))
	index := link.Attrs().Index
	for p, underlay := range map[netip.Prefix]string{peer: "10.0.16.77", old: "10.0.16.78"} {
		must(t, h.nl.NeighSet(&netlink.Neigh{LinkIndex: index, Family: netlink.FAMILY_V4, IP: p.Addr().AsSlice(), HardwareAddr: mac(p), State: netlink.NUD_PERMANENT}))
		must(t, h.nl.NeighSet(&netlink.Neigh{LinkIndex: index, Family: 7, Flags: netlink.NTF_SELF, IP: net.ParseIP(underlay), HardwareAddr: mac(p), State: netlink.NUD_PERMANENT}))
		must(t, h.nl.RouteAdd(&netlink.Route{LinkIndex: index, Dst: address(p.String()).IPNet, Gw: p.Addr().AsSlice(), Src: local.Addr().AsSlice()}))
	}
	cut := make(chan error, 1)
	stop := make(chan struct{})
	go func() { // what a packet would meet, all the time
		for {
			rs, err := h.nl.RouteGet(peer.Addr().Next().AsSlice())
			if err != nil || len(rs) != 1 || rs[0].LinkIndex != index || !rs[0].Gw.Equal(peer.Addr().AsSlice()) {
				cut <- fmt.Errorf("route to the peer: %v, %v", rs, err)
				return
			}
			select {
			case <-stop:
				cut <- nil
				return
			default:
			}
		}
	}()
	w.away()
	remove := h.container("10.255.30.2")
	h.start()
	if n := h.becomes("degraded"); n.OverlaySubnet != local.String() {
		t.Errorf("%+v", n)
	}
	h.hasPaths(5*time.Second, "10.0.16.77", peer.String(), "10.0.16.78", old.String())
	h.kill()
	w.controller("a.db")
	h.start()
	if n := h.ready(); n.OverlaySubnet != local.String() {
		t.Errorf("%+v", n)
	}
	eventually(t, 5*time.Second, "the list is heard", func() error {
		_, body, err := h.get("/metrics")
		if err == nil && !strings.Contains(body, "silk_daemon_leases 2\n") {
			err = errors.New("not two leases")
		}
		return err
	})
	remove()
	h.hasPaths(time.Second, "10.0.16.77", peer.String(), "10.0.16.78", old.String()) // the latter is held
	close(stop)
	if err := <-cut; err != nil {
		t.Error(err)
	}
	if err := h.whole(local.String(), "10.0.16.77", peer.String()); err != nil {
		t.Error(err)
	}
	if same, err := h.nl.LinkByName(vtep); err != nil || same.Attrs().Index != index {
		t.Errorf("the device was made anew: %v, %v", same, err)
	}
}

// TestDaemonSurvivesBeingKilled kills it at random instants, spoils things in between, and looks whether the next run is whole. What
// all of them have left goes with silk-teardown.
func TestDaemonSurvivesBeingKilled(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	before := h.dump()
	h.start()
	n := h.ready()
	rounds := 100
	if testing.Short() {
		rounds = 10
	}
	r := rand.New(rand.NewPCG(1, uint64(rounds)))
	for i := range rounds {
		peer := netip.MustParsePrefix(fmt.Sprintf("10.255.%d.0/24", 150+i%40))
		underlay := fmt.Sprintf("10.0.16.%d", 100+i%40)
		must(t, w.api().Renew(t.Context(), leaseOf(netip.MustParseAddr(underlay), peer)))
		h.kill()
		h.start()
		wait := time.NewTimer(time.Duration(r.IntN(60)) * time.Millisecond)
		<-wait.C
		h.kill()
		if link, err := h.nl.LinkByName(vtep); err == nil && r.IntN(4) == 0 {
			must(t, h.nl.LinkDel(link))
		}
		h.start()
		if again := h.ready(); again.OverlaySubnet != n.OverlaySubnet {
			t.Fatalf("round %d: %+v, at first %v", i, again, n.OverlaySubnet)
		}
		eventually(t, 5*time.Second, "whole", func() error { return h.whole(n.OverlaySubnet, underlay, peer.String()) })
	}
	h.becomes("ready")
	h.kill()
	if code, out := h.teardown(); code != 0 {
		t.Errorf("silk-teardown ended with %d:\n%s", code, out)
	}
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(h.dump(), "\n")); diff != "" {
		t.Errorf("the host is not as it was (-before +after):\n%s", diff)
	}
}

// command runs a program of the distribution in the host's namespace.
func (h *host) command(args ...string) string {
	h.t.Helper()
	_, err := exec.LookPath(args[0])
	testkit.Require(h.t, "tools", err)
	var out []byte
	err = h.ns.Do(func() (err error) { out, err = exec.Command(args[0], args[1:]...).CombinedOutput(); return err })
	if err != nil {
		h.t.Fatalf("%q: %v: %s", args, err, out)
	}
	return string(out)
}

// rules returns the host's nft rules without what counts packets.
func (h *host) rules() string {
	h.t.Helper()
	return counters.ReplaceAllString(h.command("nft", "list", "ruleset"), "counter")
}

var counters = regexp.MustCompile(`counter packets \d+ bytes \d+`)

func sortedLines(s string) []string { return slices.Sorted(strings.Lines(s)) }

// patience bounds the wait for what takes a second at most on a machine that has time: the tests share two processors with others, and the
// benchmarks measure it. It is far less than the next look that needs no event.
const patience = 15 * time.Second
