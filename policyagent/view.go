package policyagent

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/revision"
)

// progress is what the loops last did, for those who wait, the health and the metrics.
type progress struct {
	begun, ended uint64    // passes
	begunAt      time.Time // the last one
	passError    error     // of the last one, as the next
	cutError     error
	passTook     time.Duration
	passEnded    time.Time
	enforcedAt   time.Time // end of the last pass that succeeded
	hosted       hosted
	enforced     map[endpoint.Key]container // what the kernel has rules for
	version      uint64                     // of what is held, that the kernel has
	inForce      revision.Revision          // zero: not known
	changedAt    time.Time                  // when the first of what is not yet in the kernel was heard; zero: all is
	changedLast  time.Time                  // and the last
	desired      int                        // elements
	policies     int
	reaches      int // sets of rules for what containers may reach outside
	drift, cut   uint64
	problems     []firewall.Problem
	told         []string // problems that the log has
	warnings     []string // of the host

	asked        time.Time // when the attempt to hear that is under way began
	heard        time.Time
	hearError    error // of the last attempt
	hearFailures uint64
	hearDenied   uint64

	saved     uint64 // version of the state that is stored
	saveError error
}

// Health is the answer of /health and /ready of the debug listener.
//
// /health is 200 while the agent does its work, also without policy-server: a restart would not mend that. It is 503 when the enforcement has stopped
// turning. /ready is 200 once the kernel has what is known of policies, and 503 before that and while it does not take it.
type Health struct {
	Status  string   `json:"status"` // ready, degraded or starting
	Reasons []string `json:"reasons,omitempty"`
}

// stuckAfter is how long a pass may take.
const stuckAfter = 2 * time.Minute

// health returns how the agent stands.
func (a *agent) health() (h Health, alive, ready bool) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p := &a.now
	h.Reasons = a.troubles(now)
	ready = a.known && !p.enforcedAt.IsZero() && p.passError == nil
	alive = p.ended == p.begun || now.Sub(p.begunAt) < stuckAfter
	switch {
	case !ready:
		h.Status = "starting"
	case len(h.Reasons) > 0:
		h.Status = "degraded"
	default:
		h.Status = "ready"
	}
	return h, alive, ready
}

// maxTold bounds how many of many similar things are told.
const maxTold = 10

// troubles words what is not as it should be, the worst first. mu is held.
func (a *agent) troubles(now time.Time) []string {
	p := &a.now
	var r []string
	add := func(format string, args ...any) { r = append(r, fmt.Sprintf(format, args...)) }
	if p.passError != nil {
		add("enforcement: %v", p.passError)
	}
	if p.cutError != nil {
		add("enforcement: %v", p.cutError)
	}
	if !a.known {
		add("policies: none are known since the start: the kernel keeps the rules that were there")
	}
	// A server that lets us wait is there: one that is not fails sooner.
	waiting := now.Sub(p.asked) > a.cfg.timeout()+time.Second
	switch {
	case p.hearError != nil && !waiting:
		add("policies: %v", p.hearError)
	case !p.heard.IsZero() && now.Sub(p.heard) > 2*watchWait+a.cfg.timeout():
		add("policies: last heard %v", p.heard.UTC().Format(time.RFC3339))
	}
	if n := a.held.Absent(); n > 0 {
		add("policies: %d are kept though the last list does not have them", n)
	}
	if a.dynamic() {
		r = append(r, a.groupTroubles()...)
	}
	for _, w := range p.warnings {
		add("host: %s", w)
	}
	for _, x := range p.problems[:min(len(p.problems), maxTold)] {
		add("skipped: %v", x)
	}
	if len(p.problems) > maxTold {
		add("skipped: %d more", len(p.problems)-maxTold)
	}
	if p.hosted.strangers > 0 {
		add("containers: %d have a device but no record: they stay closed", p.hosted.strangers)
	}
	if s := a.flows.trouble(); s != "" {
		r = append(r, s)
	}
	if p.saveError != nil {
		add("state: %v", p.saveError)
	}
	return r
}

// debugHandler serves the debug listener.
func (a *agent) debugHandler(level *slog.LevelVar) http.Handler {
	m := service.Debug(level)
	m.HandleFunc("/iptables-c2c-logging", a.serveLogging)
	m.HandleFunc("/flow-log", a.serveSwitch)
	m.HandleFunc("GET /flows", a.flows.serveFlows(make(chan struct{}, followers)))
	m.HandleFunc("GET "+policyhttp.PathPeer, a.servePeer)
	m.Handle("/metrics", a.metrics())
	m.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) {
		h, alive, _ := a.health()
		httpjson.Write(w, statusOf(alive), h)
	})
	m.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		h, _, ready := a.health()
		httpjson.Write(w, statusOf(ready), h)
	})
	return m
}

func statusOf(ok bool) int {
	if ok {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

// serveLogging is the switch that deployed agents log connections between containers by. PUT sets it, every other method reads it.
func (a *agent) serveLogging(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		var body struct {
			Enabled *bool `json:"enabled"`
		}
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&body); err != nil {
			answer(w, http.StatusBadRequest, `{ "error": "decoding request body as json" }`)
			return
		}
		if body.Enabled == nil {
			answer(w, http.StatusBadRequest, `{ "error": "missing required key 'enabled'" }`)
			return
		}
		a.turnLog(flowSwitch{C2C: body.Enabled})
	}
	a.mu.Lock()
	on := a.logging
	a.mu.Unlock()
	answer(w, http.StatusOK, fmt.Sprintf(`{"enabled":%t}`, on))
}
