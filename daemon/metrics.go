package daemon

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/internal/metrics"
)

// metrics returns the handler of /metrics.
func (d *daemon) metrics() http.Handler { return metrics.Handler(metrics.Reader(d.collect)) }

const prefix = "silk_daemon_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descState = desc("state", "1 for the state the host is in, 0 for the others.", "state")
	descLoops = metrics.NewLoops(prefix)

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

// collect reads the figures.
func (d *daemon) collect(to metrics.Scrape) {
	status := d.view().network.Status
	d.mu.Lock()
	p, s, held := d.now, d.standing, d.peers.Held()
	d.mu.Unlock()
	for _, st := range []Status{StatusReady, StatusDegraded, StatusStarting, StatusFenced} {
		to.Flag(descState, st == status, string(st))
	}
	descLoops.Collect(to, d.convergence, d.renewal, d.save)
	to.Counter(descRenewals, float64(p.renewals))
	to.Counter(descRefused, float64(p.renewalFailures))
	to.Time(descConfirmed, s.Confirmed)
	to.Time(descHeard, p.heard)
	to.Counter(descUnheard, float64(p.hearFailures))
	to.Gauge(descListed, float64(p.listed))
	to.Gauge(descPartial, float64(p.partial))
	to.Gauge(descHeld, float64(held))
	for kind, n := range map[string]int{"desired": p.report.Desired, "observed": p.report.Observed, "changed": p.report.Changed,
		"failed": p.report.Failed, "foreign": p.report.Foreign} {
		to.Gauge(descObjects, float64(n), kind)
	}
	to.Gauge(descSkipped, float64(p.report.NonRoutable), "non_routable")
	to.Gauge(descSkipped, float64(len(p.report.Skipped)-p.report.NonRoutable), "other")
	to.Gauge(descContainers, float64(p.containers.Live))
	to.Gauge(descStale, float64(p.containers.Stale))
	to.Gauge(descSize, float64(usable(s)))
	used, size := conntrack()
	to.Gauge(descTracked, float64(used))
	to.Gauge(descTrackable, float64(size))
}
