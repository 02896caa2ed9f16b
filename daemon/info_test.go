package daemon

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/lease"
)

// standingDaemon returns a daemon that has converged on a lease and heard a list.
func standingDaemon(t *testing.T) *daemon {
	cfg := DefaultConfig()
	cfg.UnderlayIP = "10.0.16.5"
	d := &daemon{cfg: cfg, peers: lease.NewPeers(cfg.interval())}
	d.convergence, d.renewal, d.save = &reconcile.Loop{Name: "convergence"}, &reconcile.Loop{Name: "renewal"}, &reconcile.Loop{Name: "state"}
	d.standing = Saved{Lease: mine("10.255.30.0/24"), Confirmed: wall()}
	d.now.converged, d.now.heard, d.now.mtu = d.standing.Lease, time.Now(), 1450
	d.now.beats = map[string]time.Time{"convergence": time.Now(), "renewal": time.Now(), "lease-watch": time.Now()}
	return d
}

func get(t *testing.T, h http.Handler, method, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	b, _ := io.ReadAll(w.Result().Body)
	return w.Code, string(b)
}

func TestInfoKeepsTheOldAnswer(t *testing.T) {
	d := standingDaemon(t)
	h := infoHandler(d.view, d.metrics())
	for _, path := range []string{"/", "/ping", "/any/thing", "//x"} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "HEAD"} {
			code, body := get(t, h, method, path)
			if code != 200 || body != `{"overlay_subnet":"10.255.30.0/24","mtu":1450}` {
				t.Errorf("%s %s: %d %s", method, path, code, body)
			}
		}
	}
}

// TestInfoTellsTheTruth has a row for each thing that can be wrong.
func TestInfoTellsTheTruth(t *testing.T) {
	broken := errors.New("no such device")
	for _, c := range []struct {
		name          string
		change        func(*daemon)
		status        Status
		health, ready int
		reason        string
	}{
		{"well", func(*daemon) {}, StatusReady, 200, 200, ""},
		{"started without the controller", func(d *daemon) { d.doubt = "the controller is away" }, StatusDegraded, 200, 200, "unconfirmed: the controller is away"},
		{"no renewal for long", func(d *daemon) { d.standing.Confirmed = wall().Add(-2 * time.Minute); d.now.renewError = broken }, StatusDegraded, 200, 200, "unconfirmed: the lease was last confirmed"},
		{"one renewal failed", func(d *daemon) { d.now.renewError = broken }, StatusReady, 200, 200, ""},
		{"clock went back", func(d *daemon) { d.standing.Confirmed = wall().Add(time.Hour) }, StatusDegraded, 200, 200, "clock"},
		{"tolerance over", func(d *daemon) { d.standing.Confirmed = wall().Add(-200 * time.Hour) }, StatusFenced, 200, 503, "fenced: the lease of 10.255.30.0/24 was last confirmed"},
		{"lost", func(d *daemon) { d.standing.Lost = true; d.now.containers.Live = 3 }, StatusFenced, 200, 503, "another host's: 3 containers"},
		{"not converged", func(d *daemon) { d.now.converged = lease.Lease{}; d.now.convergeError = broken }, StatusStarting, 200, 503, "convergence: no such device"},
		{"not yet back from the fence", func(d *daemon) { d.now.fenced = true }, StatusStarting, 200, 503, "does not hold the lease"},
		{"convergence fails", func(d *daemon) { d.now.convergeError = broken }, StatusDegraded, 200, 200, "convergence: no such device"},
		{"peers not heard for long", func(d *daemon) { d.now.heard = time.Now().Add(-3 * time.Minute) }, StatusDegraded, 200, 200, "lagging"},
		{"waiting for peers", func(d *daemon) {
			d.now.heard, d.now.asked, d.now.hearError = time.Time{}, time.Now().Add(-time.Minute), broken
		}, StatusReady, 200, 503, ""},
		{"peers never heard", func(d *daemon) { d.now.heard, d.now.asked = time.Time{}, time.Now(); d.now.hearError = broken }, StatusDegraded, 200, 503, "lagging: no leases of peers"},
		{"peers known from before", func(d *daemon) { d.now.heard, d.now.restored = time.Time{}, true }, StatusReady, 200, 200, ""},
		{"leases that cannot be used", func(d *daemon) { d.now.partial = 2 }, StatusDegraded, 200, 200, "2 leases"},
		{"state cannot be saved", func(d *daemon) { d.now.saveError = broken }, StatusDegraded, 200, 200, "state: "},
		{"sysctls refused", func(d *daemon) { d.now.tuneError = broken }, StatusDegraded, 200, 200, "sysctls: "},
		{"store unreadable", func(d *daemon) { d.now.containers.Err = broken }, StatusDegraded, 200, 200, "containers: "},
		{"a loop is stuck", func(d *daemon) { d.now.beats["convergence"] = time.Now().Add(-time.Hour) }, StatusReady, 503, 200, "stuck: the convergence loop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := standingDaemon(t)
			c.change(d)
			h := infoHandler(d.view, d.metrics())
			code, body := get(t, h, "GET", "/health")
			if code != c.health || !strings.Contains(body, `"status":"`+string(c.status)+`"`) || !strings.Contains(body, c.reason) {
				t.Errorf("/health: %d %s, want %d %s %q", code, body, c.health, c.status, c.reason)
			}
			if code, body := get(t, h, "GET", "/ready"); code != c.ready {
				t.Errorf("/ready: %d %s, want %d", code, body, c.ready)
			}
			code, body = get(t, h, "GET", "/v1/network")
			if code != 200 || !strings.Contains(body, `"status":"`+string(c.status)+`"`) || !strings.Contains(body, `"overlay_network":"10.255.0.0/16"`) {
				t.Errorf("/v1/network: %d %s", code, body)
			}
			want := `{"overlay_subnet":"10.255.30.0/24","mtu":1450}`
			if c.status == StatusFenced || c.status == StatusStarting {
				want = `{"overlay_subnet":"","mtu":1450}`
			}
			if code, body := get(t, h, "GET", "/"); code != 200 || body != want {
				t.Errorf("/: %d %s, want %s", code, body, want)
			}
			code, body = get(t, h, "GET", "/metrics")
			if code != 200 || !strings.Contains(body, `silk_daemon_state{state="`+string(c.status)+`"} 1`) {
				t.Errorf("/metrics: %d, want state %s", code, c.status)
			}
		})
	}
}
