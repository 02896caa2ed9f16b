package daemon

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/reconcile"
)

// metrics returns the handler of /metrics. Nothing is counted twice: values are read when somebody asks.
func (d *daemon) metrics() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{ErrorLog: nil, MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("silk_daemon_"+name, help, labels, nil)
}

var (
	descState    = desc("state", "1 for the state the host is in, 0 for the others.", "state")
	descPasses   = desc("loop_passes_total", "Passes of a loop.", "loop")
	descFailures = desc("loop_failures_total", "Passes of a loop that failed.", "loop")
	descSuccess  = desc("loop_last_success_timestamp_seconds", "When a loop last succeeded; absent before the first time.", "loop")
	descTook     = desc("loop_last_duration_seconds", "How long the last pass of a loop took.", "loop")

	descRenewals  = desc("renewals_total", "Successful renewals of the lease.")
	descRefused   = desc("renewal_failures_total", "Failed renewals of the lease.")
	descConfirmed = desc("lease_confirmed_timestamp_seconds", "When the controller last confirmed the lease; absent if never.")
	descHeard     = desc("peers_heard_timestamp_seconds", "When a list of leases was last heard; absent before the first time.")
	descUnheard   = desc("peers_failures_total", "Failed attempts to hear leases.")
	descListed    = desc("leases", "Leases in the last list, the host's own among them.")
	descPartial   = desc("leases_unusable", "Leases in the last list that cannot be used.")
	descHeld      = desc("leases_held", "Leases that are kept though no list has them now.")

	descObjects = desc("overlay_objects", "Routes, neighbours, forwarding entries and set elements of the overlay in the last pass.", "kind")
	descSkipped = desc("peers_skipped", "Peers that no path was made for; non_routable are those outside the overlay network.", "reason")

	descContainers = desc("containers", "Containers attached to the host.")
	descStale      = desc("datastore_stale_entries", "Entries of the deployed store without a container.")
	descSize       = desc("subnet_addresses", "Addresses of the host's subnet that containers can have.")
	descTracked    = desc("conntrack_entries", "Entries of the connection table.")
	descTrackable  = desc("conntrack_entries_max", "Size of the connection table.")
)

// collector reads the daemon when it is asked.
type collector struct{ d *daemon }

// Describe implements prometheus.Collector: the metrics depend on the state, so none are promised.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	d := c.d
	status := d.view().network.Status
	d.mu.Lock()
	p, s, held := d.now, d.standing, d.peers.Held()
	d.mu.Unlock()
	gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, labels...)
	}
	counter := func(desc *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), labels...)
	}
	stamp := func(desc *prometheus.Desc, t time.Time, labels ...string) {
		if !t.IsZero() {
			gauge(desc, float64(t.UnixMilli())/1000, labels...)
		}
	}
	for _, st := range []Status{StatusReady, StatusDegraded, StatusStarting, StatusFenced} {
		v := 0.0
		if st == status {
			v = 1
		}
		gauge(descState, v, string(st))
	}
	for _, l := range []*reconcile.Loop{d.convergence, d.renewal, d.save} {
		st := l.Stats()
		counter(descPasses, st.Passes, l.Name)
		counter(descFailures, st.Failures, l.Name)
		stamp(descSuccess, st.LastSuccess, l.Name)
		gauge(descTook, st.Duration.Seconds(), l.Name)
	}
	counter(descRenewals, p.renewals)
	counter(descRefused, p.renewalFailures)
	stamp(descConfirmed, s.Confirmed)
	stamp(descHeard, p.heard)
	counter(descUnheard, p.hearFailures)
	gauge(descListed, float64(p.listed))
	gauge(descPartial, float64(p.partial))
	gauge(descHeld, float64(held))
	for kind, n := range map[string]int{"desired": p.report.Desired, "observed": p.report.Observed, "changed": p.report.Changed,
		"failed": p.report.Failed, "foreign": p.report.Foreign} {
		gauge(descObjects, float64(n), kind)
	}
	gauge(descSkipped, float64(p.report.NonRoutable), "non_routable")
	gauge(descSkipped, float64(len(p.report.Skipped)-p.report.NonRoutable), "other")
	gauge(descContainers, float64(p.containers.Live))
	gauge(descStale, float64(p.containers.Stale))
	gauge(descSize, float64(usable(s)))
	used, size := conntrack()
	gauge(descTracked, float64(used))
	gauge(descTrackable, float64(size))
}
