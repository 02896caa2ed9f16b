package sqldb

import (
	"database/sql"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/internal/metrics"
)

// Metrics describes what a program shows of its database.
type Metrics struct {
	queries, errors, retries, open, most, waits, waited *prometheus.Desc
}

// NewMetrics returns the description of PREFIXdatabase_statements_total and so on.
func NewMetrics(prefix string) Metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+"database_"+name, help, labels, nil)
	}
	return Metrics{
		queries: desc("statements_total", "Statements sent to the database."),
		errors:  desc("errors_total", "Statements and commits that failed."),
		retries: desc("retries_total", "Transactions begun again after a conflict or a lost connection."),
		open:    desc("connections", "Connections to the database, by state: used or idle.", "state"),
		most:    desc("connections_max", "Most connections allowed, 0 without limit."),
		waits:   desc("connection_waits_total", "Times that a connection had to be waited for."),
		waited:  desc("connection_wait_seconds_total", "Time spent waiting for connections."),
	}
}

// Collect adds the figures of a DB: its Counts and Stats.
func (m Metrics) Collect(to metrics.Scrape, n Counts, st sql.DBStats) {
	to.Counter(m.queries, float64(n.Queries))
	to.Counter(m.errors, float64(n.Errors))
	to.Counter(m.retries, float64(n.Retries))
	to.Gauge(m.open, float64(st.InUse), "used")
	to.Gauge(m.open, float64(st.Idle), "idle")
	to.Gauge(m.most, float64(st.MaxOpenConnections))
	to.Counter(m.waits, float64(st.WaitCount))
	to.Counter(m.waited, st.WaitDuration.Seconds())
}
