package controller

import (
	"context"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
)

// metrics are what GET /metrics shows. docs/operate/controller.md explains each.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	flying   *prometheus.GaugeVec
	alarm    *prometheus.GaugeVec
	known    sync.Map // answer -> counted
}

// newMetrics returns metrics of the store that current returns, nil while there is none.
func newMetrics(current func() *leasesql.Store) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "silk_controller_requests_total", Help: "Requests answered, by route and status.",
		}, []string{"route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "silk_controller_request_seconds", Help: "Time from a request's header to its answer, by route; a watch includes its wait.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"route"}),
		flying: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "silk_controller_requests_in_flight", Help: "Requests being served, by class: watch (waiting daemons) or other.",
		}, []string{"class"}),
		alarm: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "silk_controller_range_alarm_percent", Help: "Highest of 70, 85 and 95 percent that the use of the range has reached, 0 if none.",
		}, []string{"kind"}),
	}
	m.registry.MustRegister(m.requests, m.seconds, m.flying, m.alarm, &storeCollector{current},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) observe(route string, status int, took time.Duration) {
	key := answer{route, status}
	c, ok := m.known.Load(key)
	if !ok { // of which there are few: routes and statuses are ours
		c, _ = m.known.LoadOrStore(key, counted{m.requests.WithLabelValues(route, strconv.Itoa(status)), m.seconds.WithLabelValues(route)})
	}
	c.(counted).requests.Inc()
	c.(counted).seconds.Observe(took.Seconds())
}

// answer is what answered requests are counted by.
type answer struct {
	route  string
	status int
}

// counted are the metrics of an answer: finding them by their labels each time costs more than counting.
type counted struct {
	requests prometheus.Counter
	seconds  prometheus.Observer
}

// inFlight counts what next is serving.
func (m *metrics) inFlight(next http.Handler) http.Handler {
	watch, other := m.flying.WithLabelValues("watch"), m.flying.WithLabelValues("other")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g := other
		if r.URL.Path == leasehttp.PathWatch {
			g = watch
		}
		g.Inc()
		defer g.Dec()
		next.ServeHTTP(w, r)
	})
}

// serve answers GET /health with what ping says, as the deployed controller does, and GET /metrics.
func (m *metrics) serve(ping func(context.Context) error, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
	}))
	var failing atomic.Bool // told once, however often somebody asks
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		err := ping(r.Context())
		switch was := failing.Swap(err != nil); {
		case err != nil && !was:
			log.Warn("health check failed", "error", err)
		case err == nil && was:
			log.Info("health check succeeded again")
		}
		if err != nil {
			httpjson.WriteError(w, http.StatusInternalServerError, "check database failed")
		}
	})
	return httpjson.Admit(16, time.Second, mux)
}

// storeCollector asks the database when it is scraped.
type storeCollector struct{ current func() *leasesql.Store }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("silk_controller_"+name, help, labels, nil)
}

var (
	descTotal    = desc("leases", "Leases in the database, expired ones included, by kind.", "kind")
	descSize     = desc("range_size", "Leases that the range can hold, by kind.", "kind")
	descFree     = desc("leases_free", "Members of the range that nobody holds, by kind.", "kind")
	descStale    = desc("leases_stale", "Leases not renewed for staleness_threshold_seconds, expired ones included.")
	descExpired  = desc("leases_expired", "Leases not renewed for lease_expiration_seconds.")
	descInvalid  = desc("leases_invalid", "Rows of the database that cannot be read as a lease: neither listed nor given out.")
	descUp       = desc("database_up", "Whether the leases could be counted for this scrape.")
	descQueries  = desc("database_statements_total", "Statements sent to the database.")
	descErrors   = desc("database_errors_total", "Statements and commits that failed.")
	descRetries  = desc("database_retries_total", "Transactions begun again after a conflict or a lost connection.")
	descOpen     = desc("database_connections", "Connections to the database, by state: used or idle.", "state")
	descMaxOpen  = desc("database_connections_max", "Most connections allowed, 0 without limit.")
	descWaits    = desc("database_connection_waits_total", "Times that a connection had to be waited for.")
	descWaitTime = desc("database_connection_wait_seconds_total", "Time spent waiting for connections.")
)

// Describe implements prometheus.Collector.
func (c *storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descTotal, descSize, descFree, descStale, descExpired, descInvalid, descUp, descQueries, descErrors,
		descRetries, descOpen, descMaxOpen, descWaits, descWaitTime} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. Without a database it shows what is known without one.
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

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	st, err := s.Stats(ctx)
	if err != nil {
		gauge(descUp, 0)
		return
	}
	gauge(descUp, 1)
	gauge(descTotal, float64(st.Blocks), "block")
	gauge(descTotal, float64(st.Singles), "single")
	for _, k := range kinds {
		size, free := room(st, k)
		gauge(descSize, float64(size), k.String())
		gauge(descFree, float64(free), k.String())
	}
	gauge(descStale, float64(st.Stale))
	gauge(descExpired, float64(st.Expired))
	gauge(descInvalid, float64(st.Invalid))
}
