package dns

import (
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/metrics"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

const prefix = "silk_dns_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descNames         = desc("names", "Names in the table.")
	descRegistrations = desc("registrations", "Registrations in the table: pairs of a name and an address.")
	descBytes         = desc("table_bytes", "About what the table takes of memory.")
	descMessages      = desc("messages_total", "Messages heard on NATS.", "subject")
	descGreetings     = desc("greetings_total", "Greetings on NATS that were answered.")
	descRejected      = desc("rejected_total", "Messages, and names in them, that were not taken.", "reason")
	descLost          = desc("messages_lost_total", "Messages that came faster than they could be kept; sources are asked to tell again.")
	descWaiting       = desc("waiting_bytes", "About what heard messages take that are not read yet.")
	descPruned        = desc("stale_registrations_total", "Registrations removed because they were not told of for too long.")
	descConnected     = desc("nats_connected", "1 while NATS is heard.")
	descConnects      = desc("nats_connections_total", "Connections made to NATS.")
	descAttempts      = desc("nats_attempts_total", "Attempts to connect to NATS.")
	descWarm          = desc("warm", "1 when a name that is not in the table is said not to exist.")
	descHeard         = desc("last_message_timestamp_seconds", "When a message was last heard; absent before the first.")
	descSilence       = desc("last_message_age_seconds", "How long ago a message was last heard; absent before the first.")
	descLatency       = desc("change_latency_max_seconds", "The most that a change told of was old when it was heard, since the start.")
	descAdvertised    = desc("advertised_registrations", "Registrations of containers of this host.")
	descHealthy       = desc("healthy", "1 when nothing is wrong.")
	descLoops         = metrics.NewLoops(prefix)
)

// show is what people see of the program.
type show struct {
	p        *program // nil: there is no table
	requests *metrics.Requests
}

// handler serves the debug listener.
func (s *show) handler(level *slog.LevelVar) *http.ServeMux {
	m := service.Debug(level)
	all := []prometheus.Collector{metrics.Reader(s.collect), s.requests}
	if s.p != nil {
		m.Handle(registrationhttp.PathNames, registrationhttp.NamesHandler(s.p.book.table, s.p.book.Warm))
		if s.p.server != nil {
			all = append(all, s.p.server)
		}
	}
	m.Handle("/metrics", metrics.Handler(all...))
	m.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { httpjson.Write(w, http.StatusOK, s.health()) })
	return m
}

// Health is the answer of /health, with 200 for as long as the program answers anybody: a restart mends none of the reasons.
type Health struct {
	Status  string   `json:"status"` // ready, degraded or cold
	Reasons []string `json:"reasons,omitempty"`
}

// health returns how the program stands.
func (s *show) health() Health {
	h := Health{Status: "ready"}
	if s.p == nil {
		return h
	}
	add := func(format string, args ...any) { h.Reasons = append(h.Reasons, fmt.Sprintf(format, args...)) }
	p := s.p
	if err := p.ear.trouble(); err != nil {
		add("nats: %v: names stay as they are", err)
	}
	if err := p.state.trouble(); err != nil {
		add("state: %v", err)
	}
	if err := p.locals.trouble(); err != nil {
		add("address: %v", err)
	}
	if p.crier != nil {
		if err := p.crier.looking.Stats().LastError; err != nil {
			add("containers: %v", err)
		}
	}
	warm := p.book.Warm()
	switch {
	case !warm:
		add("names: not all are known yet")
		h.Status = "cold"
	case len(h.Reasons) > 0:
		h.Status = "degraded"
	}
	return h
}

// collect reads the figures.
func (s *show) collect(to metrics.Scrape) {
	to.Flag(descHealthy, len(s.health().Reasons) == 0)
	if s.p == nil {
		return
	}
	p, b := s.p, s.p.book
	names, all := b.table.Len()
	to.Gauge(descNames, float64(names))
	to.Gauge(descRegistrations, float64(all))
	to.Gauge(descBytes, float64(b.table.Size()))
	to.Counter(descMessages, float64(b.registers.Load()), "register")
	to.Counter(descMessages, float64(b.unregisters.Load()), "unregister")
	to.Counter(descRejected, float64(b.malformed.Load()), "malformed")
	to.Counter(descRejected, float64(b.refused.Load()), "address")
	to.Counter(descRejected, float64(b.full.Load()), "full")
	to.Counter(descPruned, float64(b.pruned.Load()))
	to.Counter(descGreetings, float64(p.ear.greetings.Load()))
	to.Counter(descLost, float64(p.ear.dropped.Load()))
	to.Gauge(descWaiting, float64(p.ear.queue.waiting()))
	to.Flag(descConnected, p.ear.standing.Load())
	to.Counter(descConnects, float64(p.ear.connects.Load()))
	to.Counter(descAttempts, float64(p.ear.attempts.Load()))
	to.Flag(descWarm, b.Warm())
	b.mu.Lock()
	heard, latest, own := b.heard, b.latest, len(b.own)
	b.mu.Unlock()
	if !heard.IsZero() {
		to.Time(descHeard, heard)
		to.Gauge(descSilence, time.Since(heard).Seconds())
	}
	to.Gauge(descLatency, latest.Seconds())
	to.Gauge(descAdvertised, float64(own))
	descLoops.Collect(to, p.saving, p.pruning)
	if p.crier != nil {
		descLoops.Collect(to, p.crier.looking)
	}
}
