package policyserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/policy/policysql"
)

// metrics are what GET /metrics shows. docs/operate/policy-server.md explains each.
type metrics struct {
	registry    *prometheus.Registry
	requests    *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	tagsLow     prometheus.Gauge
	force       *prometheus.GaugeVec
	oldAgents   prometheus.Gauge
	cleanups    *prometheus.CounterVec
	lastCleanup prometheus.Gauge
	stale       prometheus.Gauge
	deleted     prometheus.Counter
	known       sync.Map // answer -> counted
}

// newMetrics returns metrics of the store that current returns, nil while there is none.
func newMetrics(current func() *policysql.Store) *metrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + name, Help: help})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "requests_total", Help: "Requests answered, by API, route and status.",
		}, []string{"api", "route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "request_seconds", Help: "Time from a request's header to its answer, by API and route; a watch includes its wait.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"api", "route"}),
		tagsLow:   gauge("tags_low", "1 when 85 percent of the tags are used or in quarantine."),
		oldAgents: gauge("old_agents", "1 when an agent of the deployed kind, which reports nothing, polled lately."),
		force: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "in_force_hosts", Help: "Hosts of all servers: known, reporting, and of these lagging: without the newest revision in their kernels.",
		}, []string{"state"}),
		lastCleanup: gauge("cleanup_last_success_timestamp_seconds", "When stale policies were last looked for with success."),
		stale:       gauge("cleanup_stale_policies", "Stale policies that the last look found and would remove."),
		cleanups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "cleanups_total", Help: "Looks for stale policies, by result: ok, or failed (brakes included).",
		}, []string{"result"}),
		deleted: prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "cleanup_deleted_policies_total", Help: "Stale policies removed."}),
	}
	m.registry.MustRegister(m.requests, m.seconds, m.tagsLow, m.force, m.oldAgents, m.lastCleanup, m.stale, m.cleanups, m.deleted, &storeCollector{current},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

const prefix = "silk_policy_server_"

// observe returns what counts the answers of one of the APIs.
func (m *metrics) observe(api string) func(route string, status int, took time.Duration) {
	return func(route string, status int, took time.Duration) {
		key := answer{api, route, status}
		c, ok := m.known.Load(key)
		if !ok { // of which there are few: routes and statuses are ours
			if route == "" {
				route = "root"
			}
			c, _ = m.known.LoadOrStore(key, counted{m.requests.WithLabelValues(api, route, strconv.Itoa(status)), m.seconds.WithLabelValues(api, route)})
		}
		c.(counted).requests.Inc()
		c.(counted).seconds.Observe(took.Seconds())
	}
}

// answer is what answered requests are counted by.
type answer struct {
	api, route string
	status     int
}

// counted are the metrics of an answer: finding them by their labels each time costs more than counting.
type counted struct {
	requests prometheus.Counter
	seconds  prometheus.Observer
}

// cleaned notes the outcome of a look for stale policies.
func (m *metrics) cleaned(stale int, err error) {
	if err != nil {
		m.cleanups.WithLabelValues("failed").Inc()
		return
	}
	m.cleanups.WithLabelValues("ok").Inc()
	m.lastCleanup.SetToCurrentTime()
	m.stale.Set(float64(stale))
}

func (m *metrics) removed(n int) { m.deleted.Add(float64(n)) }

func (m *metrics) handler(log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 8,
	})
}

// level returns the variable that the debug server sets.
func (p *program) level() *slog.LevelVar {
	if p.cfg.Level == nil {
		return new(slog.LevelVar)
	}
	return p.cfg.Level
}

// watcher looks at the store from time to time: it warns once when tags become scarce, and again after they were not, and shows how far the newest
// revision has come.
type watcher struct {
	p   *program
	low bool
}

// look is a pass of a loop.
func (w *watcher) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	s, m := w.p.opened.Load(), w.p.metrics
	st := s.Stats()
	m.tagsLow.Set(number(st.TagsLow))
	if st.TagsLow && !w.low {
		w.p.log.Warn("tags become scarce: remove policies of groups that are gone, or raise max_tag", "used", st.Used, "quarantined", st.Quarantine, "all", st.Tags)
	}
	w.low = st.TagsLow
	f, err := s.Force(ctx, st.Revision, nil, 0)
	if err != nil {
		return fmt.Errorf("find out what is in force: %w", err)
	}
	m.force.WithLabelValues("known").Set(float64(f.Known))
	m.force.WithLabelValues("reporting").Set(float64(f.Reporting))
	m.force.WithLabelValues("lagging").Set(float64(f.Behind))
	m.oldAgents.Set(number(f.OldAgents))
	return nil
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// storeCollector shows the store's figures when it is scraped, from memory.
type storeCollector struct{ current func() *policysql.Store }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descUp        = desc("database_connected", "1 since the database was connected.")
	descPolicies  = desc("policies", "Policies.")
	descTags      = desc("tags", "Tags, by state: used, quarantined (freed too recently to be given), free.", "state")
	descMaxTag    = desc("tags_max", "How many tags there are.")
	descInvalid   = desc("rows_invalid", "Rows of the database that cannot be read, and are ignored.")
	descWatchers  = desc("watchers", "Agents that wait at this server now.")
	descHosts     = desc("hosts", "Hosts that report to this server.")
	descRevision  = desc("revision", "Counter of the revision.")
	descQueries   = desc("database_statements_total", "Statements sent to the database.")
	descErrors    = desc("database_errors_total", "Statements and commits that failed.")
	descRetries   = desc("database_retries_total", "Transactions begun again after a conflict or a lost connection.")
	descOpen      = desc("database_connections", "Connections to the database, by state: used or idle.", "state")
	descMaxOpen   = desc("database_connections_max", "Most connections allowed, 0 without limit.")
	descWaits     = desc("database_connection_waits_total", "Times that a connection had to be waited for.")
	descWaitTime  = desc("database_connection_wait_seconds_total", "Time spent waiting for connections.")
	allStoreDescs = []*prometheus.Desc{descUp, descPolicies, descTags, descMaxTag, descInvalid, descWatchers, descHosts, descRevision, descQueries,
		descErrors, descRetries, descOpen, descMaxOpen, descWaits, descWaitTime}
)

// Describe implements prometheus.Collector.
func (c *storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range allStoreDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v)
	}
	s := c.current()
	if s == nil {
		gauge(descUp, 0)
		return
	}
	gauge(descUp, 1)
	st := s.Stats()
	gauge(descPolicies, float64(st.Policies))
	gauge(descTags, float64(st.Used), "used")
	gauge(descTags, float64(st.Quarantine), "quarantined")
	gauge(descTags, float64(st.Tags-st.Used-st.Quarantine), "free")
	gauge(descMaxTag, float64(st.Tags))
	gauge(descInvalid, float64(st.Invalid))
	gauge(descWatchers, float64(st.Watchers))
	gauge(descHosts, float64(st.Hosts))
	gauge(descRevision, float64(st.Revision.Counter))
	n := s.DBCounts()
	counter(descQueries, float64(n.Queries))
	counter(descErrors, float64(n.Errors))
	counter(descRetries, float64(n.Retries))
	db := s.DBStats()
	gauge(descOpen, float64(db.InUse), "used")
	gauge(descOpen, float64(db.Idle), "idle")
	gauge(descMaxOpen, float64(db.MaxOpenConnections))
	counter(descWaits, float64(db.WaitCount))
	counter(descWaitTime, db.WaitDuration.Seconds())
}
