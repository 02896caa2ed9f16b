package tlsproxy

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/internal/metrics"
)

const prefix = "silk_tls_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descLoops      = metrics.NewLoops(prefix)
	descPorts      = desc("ports", "Ports of containers at which TLS is to end, by state.", "state")
	descContainers = desc("containers_refused", "Containers for which nothing can listen.")
	descBad        = desc("records_bad", "Endpoint records that cannot be read.")
	descOpen       = desc("connections", "Connections that are open.")
	descLimit      = desc("connections_limit", "How many can be.")
	descUnfinished = desc("handshakes_unfinished", "Connections whose handshakes are not over.")
	descAccepted   = desc("connections_accepted_total", "Connections accepted.")
	descHandshakes = desc("handshakes_total", "Handshakes that succeeded.", "kind")
	descRefused    = desc("connections_refused_total", "Connections that were refused, by reason.", "reason")
	descTruncated  = desc("connections_truncated_total", "Connections that clients ended without a word, and that were broken off.")
	descBytes      = desc("bytes_total", "Bytes in clear, by direction: received are from clients.", "direction")
	descExpiry     = desc("certificate_soonest_expiry_timestamp_seconds", "When the first of the certificates shown expires; absent without any.")
	descMissing    = desc("certificates_missing", "Containers that have no certificate to show.")
	descTroubled   = desc("certificates_not_renewed", "Containers that show an earlier certificate, because the present one cannot be used.")
)

// metrics returns the handler of /metrics.
func (p *proxy) metrics() http.Handler { return metrics.Handler(metrics.Reader(p.collect)) }

// collect reads the figures.
func (p *proxy) collect(to metrics.Scrape) {
	descLoops.Collect(to, p.loops...)
	var sum figures
	states := map[string]int{stateListening: 0, stateTaken: 0, stateFailed: 0}
	unfinished, missing, troubled := 0, 0, 0
	var first time.Time
	p.mu.Lock()
	sites := make([]*site, 0, len(p.sites))
	for _, s := range p.sites {
		sites = append(sites, s)
	}
	open, limit, refused, bad := p.conns, p.limit(), len(p.failures), p.bad
	p.gone.add(&sum)
	p.mu.Unlock()
	for _, s := range sites {
		s.mu.Lock()
		unfinished += s.unready
		s.mu.Unlock()
		for _, q := range s.ports {
			q.stats.add(&sum)
			q.mu.Lock()
			states[q.state()]++
			q.mu.Unlock()
		}
		cred, err := p.certificates.inspect(s.record)
		switch {
		case cred == nil:
			missing++
		case err != nil:
			troubled++
		}
		if cred != nil && (first.IsZero() || cred.expires.Before(first)) {
			first = cred.expires
		}
	}
	for state, n := range states {
		to.Gauge(descPorts, float64(n), state)
	}
	to.Gauge(descContainers, float64(refused))
	to.Gauge(descBad, float64(bad))
	to.Gauge(descOpen, float64(open))
	to.Gauge(descLimit, float64(limit))
	to.Gauge(descUnfinished, float64(unfinished))
	to.Gauge(descMissing, float64(missing))
	to.Gauge(descTroubled, float64(troubled))
	to.Time(descExpiry, first)
	sum.collect(to)
}

// collect shows what is counted.
func (f *figures) collect(to metrics.Scrape) {
	to.Counter(descAccepted, float64(f.accepted.Load()))
	to.Counter(descHandshakes, float64(f.handshakes.Load()-f.resumed.Load()), "full")
	to.Counter(descHandshakes, float64(f.resumed.Load()), "resumed")
	to.Counter(descTruncated, float64(f.truncated.Load()))
	to.Counter(descBytes, float64(f.received.Load()), "received")
	to.Counter(descBytes, float64(f.sent.Load()), "sent")
	for r := range reasons {
		to.Counter(descRefused, float64(f.refused[r].Load()), reason(r).String())
	}
}
