package daemon_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/daemon"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"github.com/vishvananda/netlink"
)

const vtep = "silk-vtep"

// paths returns the host's paths to peers as "route|neighbour|entry TEXT", sorted.
func (h *host) paths() []string {
	out := []string{}
	link, err := h.nl.LinkByName(vtep)
	if err != nil {
		return out
	}
	routes, err := h.nl.RouteList(link, netlink.FAMILY_V4)
	must(h.t, err)
	for _, r := range routes {
		if r.Gw != nil {
			out = append(out, fmt.Sprintf("route %v via %v", r.Dst, r.Gw))
		}
	}
	neighs, err := h.nl.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
	must(h.t, err)
	for _, n := range neighs {
		out = append(out, fmt.Sprintf("neighbour %v %v", n.IP, n.HardwareAddr))
	}
	entries, err := h.nl.NeighList(link.Attrs().Index, 7) // AF_BRIDGE
	must(h.t, err)
	for _, n := range entries {
		out = append(out, fmt.Sprintf("entry %v %v", n.HardwareAddr, n.IP))
	}
	slices.Sort(out)
	return out
}

// pathsTo returns what paths should be for these peers: pairs of an underlay address and a subnet.
func pathsTo(peers ...string) []string {
	out := []string{}
	for i := 0; i < len(peers); i += 2 {
		p := netip.MustParsePrefix(peers[i+1])
		out = append(out, fmt.Sprintf("route %v via %v", p, p.Addr()), fmt.Sprintf("neighbour %v %v", p.Addr(), lease.MACOf(p)),
			fmt.Sprintf("entry %v %v", lease.MACOf(p), peers[i]))
	}
	slices.Sort(out)
	return out
}

// hasPaths waits until the host has exactly these paths.
func (h *host) hasPaths(within time.Duration, peers ...string) {
	h.t.Helper()
	want := pathsTo(peers...)
	eventually(h.t, within, fmt.Sprintf("paths of %s", h.ip), func() error {
		if got := h.paths(); !slices.Equal(got, want) {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
}

// addresses returns the IPv4 addresses of a device.
func (h *host) addresses(device string) []string {
	link, err := h.nl.LinkByName(device)
	if err != nil {
		return nil
	}
	as, err := h.nl.AddrList(link, netlink.FAMILY_V4)
	must(h.t, err)
	var out []string
	for _, a := range as {
		out = append(out, a.IPNet.String())
	}
	return out
}

func TestDaemonTakesALeaseAndKeepsIt(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	if na.OverlaySubnet == nb.OverlaySubnet || !strings.HasSuffix(na.OverlaySubnet, ".0/24") || na.MTU != 1450 || na.VTEP != vtep {
		t.Errorf("networks %+v and %+v", na, nb)
	}
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	b.hasPaths(5*time.Second, a.ip, na.OverlaySubnet)
	if _, body, err := a.get("/"); err != nil || body != fmt.Sprintf(`{"overlay_subnet":%q,"mtu":1450}`, na.OverlaySubnet) {
		t.Errorf("/: %s, %v", body, err)
	}
	link, err := a.nl.LinkByName(vtep)
	must(t, err)
	v := link.(*netlink.Vxlan)
	if mac := lease.MACOf(netip.MustParsePrefix(na.OverlaySubnet)).String(); v.HardwareAddr.String() != mac || v.VxlanId != 1 || v.Port != 4789 || v.Learning || !v.GBP || v.SrcAddr.String() != a.ip || v.Attrs().MTU != 1450 {
		t.Errorf("device %+v", v)
	}
	if got := a.addresses(vtep); len(got) != 1 || got[0] != strings.TrimSuffix(na.OverlaySubnet, "/24")+"/16" {
		t.Errorf("addresses %v", got)
	}
	var forward string
	must(t, a.ns.Do(func() (err error) { forward, err = kernel.Sysctl("net/ipv4/ip_forward"); return err }))
	if forward != "1" {
		t.Error("the host does not forward")
	}
	// SIGTERM leaves everything, and a restart keeps the device and the lease.
	a.term()
	a.hasPaths(0, b.ip, nb.OverlaySubnet)
	a.start()
	if again := a.ready(); again != na {
		t.Errorf("after a restart %+v, before %+v", again, na)
	}
	same, err := a.nl.LinkByName(vtep)
	must(t, err)
	if same.Attrs().Index != link.Attrs().Index {
		t.Error("the restart made a new device")
	}
	// A released host is forgotten by its peers.
	b.term()
	must(t, w.api().Release(t.Context(), netip.MustParseAddr(b.ip)))
	a.hasPaths(5 * time.Second)
}

func TestDaemonServesDebugAndMetrics(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	h.ready()
	if code, _, err := h.get("/health"); code != 200 || err != nil {
		t.Errorf("/health: %d, %v", code, err)
	}
	for _, path := range []string{"/debug/pprof/", "/log-level"} {
		resp, err := h.client.Post("http://127.0.0.1:22233"+path, "", strings.NewReader("error"))
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %v, %v", path, resp, err)
			continue
		}
		resp.Body.Close()
	}
	eventually(t, 5*time.Second, "the list is heard", func() error {
		_, body, err := h.get("/metrics")
		if err == nil && !strings.Contains(body, "silk_daemon_leases 1\n") {
			err = fmt.Errorf("one lease is not in the metrics")
		}
		return err
	})
	_, body, err := h.get("/metrics")
	for _, want := range []string{`silk_daemon_state{state="ready"} 1`, "silk_daemon_subnet_addresses 255\n", "silk_daemon_containers 0\n",
		`silk_daemon_overlay_objects{kind="failed"} 0`, `silk_daemon_loop_passes_total{loop="convergence"}`, "silk_daemon_conntrack_entries_max"} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %q (%v)", want, err)
		}
	}
}

func TestDaemonRestartsWhileTheControllerIsAway(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	eventually(t, time.Second, "the peer is counted", func() error {
		_, body, err := a.get("/health")
		if err == nil && !strings.Contains(body, `"peers":1`) {
			err = errors.New(body)
		}
		return err
	})
	link, err := a.nl.LinkByName(vtep)
	must(t, err)
	eventually(t, 10*time.Second, "saved peers", func() error {
		b, err := os.ReadFile(filepath.Join(a.dir, "state", "peers.json"))
		if err == nil && !strings.Contains(string(b), nb.OverlaySubnet) {
			err = fmt.Errorf("%s", b)
		}
		return err
	})
	w.away()
	a.kill()

	t.Run("restart", func(t *testing.T) {
		a.start()
		if n := a.becomes(daemon.StatusDegraded); n.OverlaySubnet != na.OverlaySubnet || n.MTU != 1450 || !strings.Contains(n.Reason, "did not confirm") {
			t.Errorf("%+v", n)
		}
		if code, body, err := a.get("/ready"); code != 200 {
			t.Errorf("/ready: %d %s %v", code, body, err)
		}
		if code, body, err := a.get("/health"); code != 200 || !strings.Contains(body, "degraded") {
			t.Errorf("/health: %d %s %v", code, body, err)
		}
		same, err := a.nl.LinkByName(vtep)
		must(t, err)
		if same.Attrs().Index != link.Attrs().Index {
			t.Error("the device was made anew")
		}
		a.hasPaths(0, b.ip, nb.OverlaySubnet)
		a.term()
	})
	t.Run("reboot", func(t *testing.T) {
		must(t, a.nl.LinkDel(link))
		a.start()
		a.becomes(daemon.StatusDegraded)
		a.hasPaths(time.Second, b.ip, nb.OverlaySubnet)
		if got := a.addresses(vtep); len(got) != 1 {
			t.Errorf("addresses %v", got)
		}
	})
	w.controller("a.db")
	if n := a.ready(); n.OverlaySubnet != na.OverlaySubnet {
		t.Errorf("%+v, want %v", n, na.OverlaySubnet)
	}
	a.becomes(daemon.StatusReady)
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
}

func TestDaemonKeepsItsLeaseWhenTheDatabaseIsLost(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	w.away()
	must(t, b.proc.cmd.Process.Signal(stopSignal)) // b is slow to come back
	w.controller("b.db")
	eventually(t, 10*time.Second, "lease of the first host", func() error {
		ls, err := w.api().Leases(t.Context())
		if err == nil && (len(ls) != 1 || ls[0].Subnet.String() != na.OverlaySubnet) {
			err = fmt.Errorf("%v", ls)
		}
		return err
	})
	eventually(t, 10*time.Second, "the new list is heard", func() error {
		_, body, err := a.get("/metrics")
		if err == nil && !strings.Contains(body, "silk_daemon_leases_held 1\n") {
			err = fmt.Errorf("no lease is held")
		}
		return err
	})
	a.hasPaths(0, b.ip, nb.OverlaySubnet)
	must(t, b.proc.cmd.Process.Signal(contSignal))
	eventually(t, 10*time.Second, "both leases", func() error {
		ls, err := w.api().Leases(t.Context())
		if err == nil && len(ls) != 2 {
			err = fmt.Errorf("%v", ls)
		}
		return err
	})
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	if n := a.becomes(daemon.StatusReady); n != na {
		t.Errorf("%+v, before the loss %+v", n, na)
	}
}

// TestDaemonHearsFromADeployedController takes the watch away: peers come with the next list and go after three.
func TestDaemonHearsFromADeployedController(t *testing.T) {
	w := newWorld(t)
	store := w.store("a.db")
	inner := leasehttp.Handler(store, discard, leasehttp.HandlerOptions{})
	w.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v1/") {
			http.NotFound(rw, r)
			return
		}
		inner.ServeHTTP(rw, r)
	}))
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	nb := b.ready()
	a.ready()
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	b.term()
	must(t, store.Release(t.Context(), netip.MustParseAddr(b.ip)))
	start := time.Now()
	a.hasPaths(10 * time.Second)
	if took := time.Since(start); took < 1500*time.Millisecond {
		t.Errorf("the peer was gone after %v, before three lists", took)
	}
}

func TestDaemonOnASingleAddress(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.config["single_ip_only"] = true
	a.start()
	b.start()
	n, nb := a.ready(), b.ready()
	if !strings.HasPrefix(n.OverlaySubnet, "10.255.0.") || !strings.HasSuffix(n.OverlaySubnet, "/32") {
		t.Fatalf("%+v", n)
	}
	b.hasPaths(5*time.Second, a.ip, n.OverlaySubnet)
	link, err := a.nl.LinkByName(vtep)
	must(t, err)
	for _, state := range []string{"kept", "lost"} {
		a.term()
		if state == "lost" {
			must(t, os.RemoveAll(filepath.Join(a.dir, "state")))
		}
		a.start()
		if again := a.ready(); again.OverlaySubnet != n.OverlaySubnet {
			t.Errorf("state %s: %+v, before %v", state, again, n.OverlaySubnet)
		}
		same, err := a.nl.LinkByName(vtep)
		must(t, err)
		if same.Attrs().Index != link.Attrs().Index {
			t.Errorf("state %s: the device was made anew", state)
		}
		if strings.Contains(a.proc.out.String(), "acquir") {
			t.Errorf("state %s: a lease was acquired instead of renewed", state)
		}
	}
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
}

func TestDaemonFollowsTheMTU(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	h.ready()
	eth, err := h.nl.LinkByName("eth0")
	must(t, err)
	must(t, h.nl.LinkSetMTU(eth, 1400))
	eventually(t, patience, "MTU 1350", func() error {
		link, err := h.nl.LinkByName(vtep)
		if err == nil && (link.Attrs().MTU != 1350 || h.network().MTU != 1350) {
			err = fmt.Errorf("device %d, info %+v", link.Attrs().MTU, h.network())
		}
		return err
	})
}

func TestDaemonRunsWithoutAPlaceForState(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	must(t, os.WriteFile(filepath.Join(h.dir, "file"), nil, 0o600))
	h.config["state_dir"], h.config["endpoint_dir"] = filepath.Join(h.dir, "file", "state"), filepath.Join(h.dir, "file", "endpoints")
	h.start()
	n := h.becomes(daemon.StatusDegraded)
	if code, body, _ := h.get("/ready"); !strings.Contains(body, "there is no state directory") {
		t.Errorf("/ready: %d %s", code, body)
	}
	h.term()
	h.start()
	if again := h.becomes(daemon.StatusDegraded); again.OverlaySubnet != n.OverlaySubnet {
		t.Errorf("%+v, before %v", again, n.OverlaySubnet)
	}
}

// TestDaemonReadsStateThatItCannotWrite starts over a state directory that cannot be locked or written, as after the file system
// became read-only: what is in it still counts, above all that the lease is lost.
func TestDaemonReadsStateThatItCannotWrite(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	n := h.ready()
	h.term()
	w.away()
	h.container(netip.MustParsePrefix(n.OverlaySubnet).Addr().Next().Next().String())
	dir := h.config["state_dir"].(string)
	state, err := daemon.OpenState(dir)
	must(t, err)
	s, err := state.Lease()
	must(t, err)
	s.Lost = true
	must(t, state.SetLease(s))
	must(t, os.Remove(filepath.Join(dir, "daemon.lock")))
	must(t, os.Mkdir(filepath.Join(dir, "daemon.lock"), 0o700)) // root may write anything, but not this
	h.start()
	h.becomes(daemon.StatusFenced)
}

func TestDaemonStopsInPeaceWhileItWaitsForTheController(t *testing.T) {
	w := newWorld(t)
	asked := make(chan struct{}, 10)
	w.serve(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- struct{}{}; <-r.Context().Done() }))
	h := w.host(10)
	h.config["client_timeout_seconds"] = 60
	h.start()
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Fatal("the controller was not asked")
	}
	h.term()
}
