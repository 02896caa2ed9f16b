// Package metrics has what the programs show of themselves alike: requests answered, passes of loops. The names of metrics are the programs'
// own; they begin with a prefix such as silk_daemon_.
package metrics

import (
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/reconcile"
)

// Scrape receives the figures that a collector reads when somebody asks for them.
type Scrape chan<- prometheus.Metric

// Reader is a prometheus.Collector that reads its figures when somebody asks: nothing is counted twice. Which there are depends on the program's state, so none are
// promised.
type Reader func(Scrape)

// Describe implements prometheus.Collector.
func (Reader) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (r Reader) Collect(out chan<- prometheus.Metric) { r(out) }

// Handler returns the handler of /metrics, with those of the process and of the language's runtime besides.
func Handler(all ...prometheus.Collector) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.MustRegister(all...)
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// Gauge adds a figure that can fall.
func (s Scrape) Gauge(d *prometheus.Desc, v float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

// Counter adds a figure that only grows.
func (s Scrape) Counter(d *prometheus.Desc, v float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

// Time adds an instant, in seconds since 1970 to the millisecond; nothing for the zero time.
func (s Scrape) Time(d *prometheus.Desc, t time.Time, labels ...string) {
	if !t.IsZero() {
		s.Gauge(d, float64(t.UnixMilli())/1000, labels...)
	}
}

// Flag adds 1 or 0.
func (s Scrape) Flag(d *prometheus.Desc, on bool, labels ...string) {
	s.Gauge(d, Number(on), labels...)
}

// Number is 1 for true and 0 for false.
func Number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Loops describes the passes of a program's loops, by the label loop.
type Loops struct{ passes, failures, success, took *prometheus.Desc }

// NewLoops returns the description of PREFIXloop_passes_total and so on.
func NewLoops(prefix string) Loops {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+name, help, []string{"loop"}, nil)
	}
	return Loops{
		passes:   desc("loop_passes_total", "Passes of a loop."),
		failures: desc("loop_failures_total", "Passes of a loop that failed."),
		success:  desc("loop_last_success_timestamp_seconds", "When a loop last succeeded; absent before the first time."),
		took:     desc("loop_last_duration_seconds", "How long the last pass of a loop took."),
	}
}

// Collect adds the figures of loops.
func (d Loops) Collect(to Scrape, loops ...*reconcile.Loop) {
	for _, l := range loops {
		st := l.Stats()
		to.Counter(d.passes, float64(st.Passes), l.Name)
		to.Counter(d.failures, float64(st.Failures), l.Name)
		to.Time(d.success, st.LastSuccess, l.Name)
		to.Gauge(d.took, st.Duration.Seconds(), l.Name)
	}
}

// Requests counts and times the answers of a server. It is a prometheus.Collector.
type Requests struct {
	total   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

// NewRequests returns PREFIXrequests_total and PREFIXrequest_seconds, by the labels more, by route and, the first, by code.
func NewRequests(prefix string, more ...string) *Requests {
	by := append(more[:len(more):len(more)], "route")
	return &Requests{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "requests_total", Help: "Requests answered, by route and status.",
		}, append(by[:len(by):len(by)], "code")),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "request_seconds", Help: "Time from a request's header to its answer, by route; a watch includes its wait.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, by),
	}
}

// Describe implements prometheus.Collector.
func (r *Requests) Describe(ch chan<- *prometheus.Desc) {
	r.total.Describe(ch)
	r.seconds.Describe(ch)
}

// Collect implements prometheus.Collector.
func (r *Requests) Collect(ch chan<- prometheus.Metric) {
	r.total.Collect(ch)
	r.seconds.Collect(ch)
}

// Observe returns what counts an answer whose further labels have these values. Routes and statuses must be few: the server's own, not what
// clients send. An empty route is shown as root.
func (r *Requests) Observe(values ...string) func(route string, status int, took time.Duration) {
	// Finding metrics by their labels each time costs more than counting.
	type answer struct {
		route  string
		status int
	}
	type counted struct {
		total   prometheus.Counter
		seconds prometheus.Observer
	}
	var known sync.Map // answer -> counted
	return func(route string, status int, took time.Duration) {
		c, ok := known.Load(answer{route, status})
		if !ok {
			name := route
			if name == "" {
				name = "root"
			}
			by := append(values[:len(values):len(values)], name)
			n := r.total.WithLabelValues(append(by[:len(by):len(by)], strconv.Itoa(status))...)
			c, _ = known.LoadOrStore(answer{route, status}, counted{n, r.seconds.WithLabelValues(by...)})
		}
		c.(counted).total.Inc()
		c.(counted).seconds.Observe(took.Seconds())
	}
}
