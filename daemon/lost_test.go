package daemon_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/daemon"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// steal gives a host's subnet to another underlay address.
func (w *world) steal(from *host, subnet, to string) {
	w.t.Helper()
	api := w.api()
	must(w.t, api.Release(w.t.Context(), netip.MustParseAddr(from.ip)))
	p := netip.MustParsePrefix(subnet)
	must(w.t, api.Renew(w.t.Context(), lease.Lease{Underlay: netip.MustParseAddr(to), Subnet: p, MAC: lease.MACOf(p)}))
}

func TestDaemonKeepsOffALostLease(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	c1 := netip.MustParsePrefix(na.OverlaySubnet).Addr().Next().Next().String()
	remove := a.container(c1)
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	// A daemon that is slow to renew would take the lease again before the thief does.
	must(t, a.proc.cmd.Process.Signal(stopSignal))
	w.steal(a, na.OverlaySubnet, "10.0.16.99")
	must(t, a.proc.cmd.Process.Signal(contSignal))

	fenced := func(t *testing.T) {
		t.Helper()
		a.becomes(daemon.StatusFenced)
		eventually(t, 5*time.Second, "verdict", func() error {
			if n := a.network(); n.OverlaySubnet != na.OverlaySubnet || !strings.Contains(n.Reason, "another host's") {
				return fmt.Errorf("%+v", n)
			}
			return nil
		})
		a.hasPaths(2 * time.Second)
		eventually(t, 2*time.Second, "no address", func() error {
			if got := a.addresses(vtep); len(got) > 0 {
				return fmt.Errorf("addresses %v", got)
			}
			return nil
		})
		if _, body, _ := a.get("/"); body != `{"overlay_subnet":"","mtu":1450}` {
			t.Errorf("/: %s", body)
		}
		if code, body, _ := a.get("/ready"); code != 503 || !strings.Contains(body, "fenced") {
			t.Errorf("/ready: %d %s", code, body)
		}
		if code, body, _ := a.get("/health"); code != 200 || !strings.Contains(body, "fenced") {
			t.Errorf("/health: %d %s", code, body)
		}
		rs, err := a.nl.RouteGet(netip.MustParseAddr(c1).AsSlice())
		if err != nil || len(rs) != 1 {
			t.Errorf("the container's route: %v, %v", rs, err)
		}
	}
	fenced(t)
	b.hasPaths(5*time.Second, "10.0.16.99", na.OverlaySubnet) // replaced at once
	t.Run("restart", func(t *testing.T) { a.kill(); a.start(); fenced(t) })
	t.Run("restart without the controller, the device gone", func(t *testing.T) {
		w.away()
		a.kill()
		link, err := a.nl.LinkByName(vtep)
		must(t, err)
		must(t, a.nl.LinkDel(link))
		a.start()
		fenced(t)
	})
	t.Run("the thief goes", func(t *testing.T) { // and yet the subnet was another's
		w.controller("a.db")
		must(t, w.api().Release(t.Context(), netip.MustParseAddr("10.0.16.99")))
		a.kill()
		a.start()
		fenced(t)
	})
	remove()
	n := a.ready()
	if n.OverlaySubnet == na.OverlaySubnet || n.Status != daemon.StatusReady {
		t.Errorf("after the last container %+v, lost was %v", n, na.OverlaySubnet)
	}
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	b.hasPaths(5*time.Second, a.ip, n.OverlaySubnet)
}

func TestDaemonKeepsOffWhenItsLeaseMayHaveExpired(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	a, b := w.host(10), w.host(11)
	a.config["partition_tolerance_seconds"] = 4
	a.start()
	b.start()
	na, nb := a.ready(), b.ready()
	a.container(netip.MustParsePrefix(na.OverlaySubnet).Addr().Next().Next().String())
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	w.away()
	a.becomes(daemon.StatusDegraded)
	a.hasPaths(0, b.ip, nb.OverlaySubnet)
	if n := a.becomes(daemon.StatusFenced); !strings.Contains(n.Reason, "partition_tolerance_seconds") {
		t.Errorf("%+v", n)
	}
	a.hasPaths(2 * time.Second)
	a.kill()
	a.start()
	a.becomes(daemon.StatusFenced)
	a.hasPaths(0)
	w.controller("a.db")
	if n := a.ready(); n.OverlaySubnet != na.OverlaySubnet {
		t.Errorf("back with %+v, want %v", n, na.OverlaySubnet)
	}
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
}

// TestDaemonComesBackFromARefusalThatWasAMistake is a deployed controller whose database fails while it renews: it says 409.
func TestDaemonComesBackFromARefusalThatWasAMistake(t *testing.T) {
	w := newWorld(t)
	store := w.store("a.db")
	inner := leasehttp.Handler(store, discard, leasehttp.HandlerOptions{})
	var refuse atomic.Bool
	w.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/v1/"):
			http.NotFound(rw, r)
		case r.URL.Path == leasehttp.PathRenew && refuse.Load():
			rw.WriteHeader(http.StatusConflict)
			rw.Write([]byte(`{"error": "renew-subnet-lease: insert: connection lost"}`))
		default:
			inner.ServeHTTP(rw, r)
		}
	}))
	a, b := w.host(10), w.host(11)
	b.start()
	nb := b.ready()
	b.term()
	a.start()
	na := a.ready()
	remove := a.container(netip.MustParsePrefix(na.OverlaySubnet).Addr().Next().Next().String())
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	refuse.Store(true)
	a.becomes(daemon.StatusFenced)
	a.hasPaths(2 * time.Second)
	a.kill()
	a.start()
	a.becomes(daemon.StatusFenced)
	a.hasPaths(2 * time.Second)
	refuse.Store(false)
	if n := a.becomes(daemon.StatusReady); n.OverlaySubnet != na.OverlaySubnet {
		t.Errorf("%+v, before %v", n, na.OverlaySubnet)
	}
	a.hasPaths(5*time.Second, b.ip, nb.OverlaySubnet)
	// When the list shows another with the subnet it is no mistake.
	must(t, a.proc.cmd.Process.Signal(stopSignal))
	must(t, store.Release(t.Context(), netip.MustParseAddr(a.ip)))
	must(t, store.Renew(t.Context(), leaseOf(netip.MustParseAddr("10.0.16.99"), netip.MustParsePrefix(na.OverlaySubnet))))
	must(t, a.proc.cmd.Process.Signal(contSignal))
	a.becomes(daemon.StatusFenced)
	eventually(t, 5*time.Second, "verdict", func() error {
		if n := a.network(); !strings.Contains(n.Reason, "another host's") {
			return fmt.Errorf("%+v", n)
		}
		return nil
	})
	remove()
	if n := a.ready(); n.OverlaySubnet == na.OverlaySubnet {
		t.Errorf("%+v: the lost subnet", n)
	}
}

func TestDaemonTakesAnotherLeaseAtOnceWithoutContainers(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	n := h.ready()
	must(t, h.proc.cmd.Process.Signal(stopSignal))
	w.steal(h, n.OverlaySubnet, "10.0.16.99")
	must(t, h.proc.cmd.Process.Signal(contSignal))
	eventually(t, 20*time.Second, "another lease", func() error {
		if again := h.network(); again.Status != daemon.StatusReady || again.OverlaySubnet == n.OverlaySubnet {
			return fmt.Errorf("%+v", again)
		}
		return nil
	})
	eventually(t, 5*time.Second, "whole", func() error { return h.whole(h.network().OverlaySubnet, "10.0.16.99", n.OverlaySubnet) })
}

// TestDaemonHearsThatItsLeaseIsAnothers does not wait for the next renewal.
func TestDaemonHearsThatItsLeaseIsAnothers(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.config["poll_interval"] = 600
	h.start()
	n := h.ready()
	h.container(netip.MustParsePrefix(n.OverlaySubnet).Addr().Next().Next().String())
	w.steal(h, n.OverlaySubnet, "10.0.16.99")
	h.becomes(daemon.StatusFenced)
	h.hasPaths(2 * time.Second)
}

// TestDaemonSurvivesBeingKilledWhileItLosesItsLease kills it at random instants between the theft and the new lease: it never uses
// the lost subnet, and ends with another.
func TestDaemonSurvivesBeingKilledWhileItLosesItsLease(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	n := h.ready()
	remove := h.container(netip.MustParsePrefix(n.OverlaySubnet).Addr().Next().Next().String())
	must(t, h.proc.cmd.Process.Signal(stopSignal))
	w.steal(h, n.OverlaySubnet, "10.0.16.99")
	h.kill()
	r := rand.New(rand.NewPCG(2, 3))
	for i := range 30 {
		h.start()
		<-time.NewTimer(time.Duration(r.IntN(40)) * time.Millisecond).C
		h.kill()
		if i == 15 {
			remove()
		}
	}
	h.start()
	if again := h.ready(); again.OverlaySubnet == n.OverlaySubnet {
		t.Errorf("%+v: the lost subnet", again)
	}
	eventually(t, 5*time.Second, "whole", func() error { return h.whole(h.network().OverlaySubnet, "10.0.16.99", n.OverlaySubnet) })
	ls, err := w.api().Leases(t.Context())
	if err != nil || len(ls) != 2 {
		t.Errorf("leases %v, %v", ls, err)
	}
}
