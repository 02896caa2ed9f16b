package controller

import (
	"context"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/metrics"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
)

const prefix = "silk_controller_"

// figures are what GET /metrics shows. docs/operate/controller.md explains each.
type figures struct {
	registry *prometheus.Registry
	requests *metrics.Requests
	flying   *prometheus.GaugeVec
	alarm    *prometheus.GaugeVec
}

// newFigures returns figures of the store that current returns, nil while there is none.
func newFigures(current func() *leasesql.Store) *figures {
	m := &figures{
		registry: prometheus.NewRegistry(),
		requests: metrics.NewRequests(prefix),
		flying: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "requests_in_flight", Help: "Requests being served, by class: watch (waiting daemons) or other.",
		}, []string{"class"}),
		alarm: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: prefix + "range_alarm_percent", Help: "Highest of 70, 85 and 95 percent that the use of the range has reached, 0 if none.",
		}, []string{"kind"}),
	}
	m.registry.MustRegister(m.requests, m.flying, m.alarm, &storeCollector{current},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// inFlight counts what next is serving.
func (m *figures) inFlight(next http.Handler) http.Handler {
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
func (m *figures) serve(ping func(context.Context) error, log *slog.Logger) http.Handler {
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
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descTotal    = desc("leases", "Leases in the database, expired ones included, by kind.", "kind")
	descSize     = desc("range_size", "Leases that the range can hold, by kind.", "kind")
	descFree     = desc("leases_free", "Members of the range that nobody holds, by kind.", "kind")
	descStale    = desc("leases_stale", "Leases not renewed for staleness_threshold_seconds, expired ones included.")
	descExpired  = desc("leases_expired", "Leases not renewed for lease_expiration_seconds.")
	descInvalid  = desc("leases_invalid", "Rows of the database that cannot be read as a lease: neither listed nor given out.")
	descUp       = desc("database_up", "Whether the leases could be counted for this scrape.")
	descDatabase = sqldb.NewMetrics(prefix)
)

// Describe implements prometheus.Collector: what there is depends on the database, so nothing is promised.
func (c *storeCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector. Without a database it shows what is known without one.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	to := metrics.Scrape(ch)
	s := c.current()
	if s == nil {
		to.Gauge(descUp, 0)
		return
	}
	descDatabase.Collect(to, s.DBCounts(), s.DBStats())

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	st, err := s.Stats(ctx)
	if err != nil {
		to.Gauge(descUp, 0)
		return
	}
	to.Gauge(descUp, 1)
	to.Gauge(descTotal, float64(st.Blocks), "block")
	to.Gauge(descTotal, float64(st.Singles), "single")
	for _, k := range kinds {
		size, free := room(st, k)
		to.Gauge(descSize, float64(size), k.String())
		to.Gauge(descFree, float64(free), k.String())
	}
	to.Gauge(descStale, float64(st.Stale))
	to.Gauge(descExpired, float64(st.Expired))
	to.Gauge(descInvalid, float64(st.Invalid))
}
