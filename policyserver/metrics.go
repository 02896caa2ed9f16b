package policyserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/metrics"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policyserver/follow"
)

// figures are what GET /metrics shows. docs/operate/policy-server.md explains each.
type figures struct {
	registry    *prometheus.Registry
	requests    *metrics.Requests
	tagsLow     prometheus.Gauge
	force       *prometheus.GaugeVec
	oldAgents   prometheus.Gauge
	cleanups    *prometheus.CounterVec
	lastCleanup prometheus.Gauge
	stale       prometheus.Gauge
	deleted     prometheus.Counter
}

// newFigures returns figures of the store that current returns, nil while there is none.
func newFigures(current func() *policysql.Store) *figures {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + name, Help: help})
	}
	m := &figures{
		registry:  prometheus.NewRegistry(),
		requests:  metrics.NewRequests(prefix, "api"),
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
	m.registry.MustRegister(m.requests, m.tagsLow, m.force, m.oldAgents, m.lastCleanup, m.stale, m.cleanups, m.deleted, &storeCollector{current},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

const prefix = "silk_policy_server_"

// cleaned notes the outcome of a look for stale policies.
func (m *figures) cleaned(stale int, err error) {
	if err != nil {
		m.cleanups.WithLabelValues("failed").Inc()
		return
	}
	m.cleanups.WithLabelValues("ok").Inc()
	m.lastCleanup.SetToCurrentTime()
	m.stale.Set(float64(stale))
}

func (m *figures) removed(n int) { m.deleted.Add(float64(n)) }

func (m *figures) handler(log *slog.Logger) http.Handler {
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
	m.tagsLow.Set(metrics.Number(st.TagsLow))
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
	m.oldAgents.Set(metrics.Number(f.OldAgents))
	return nil
}

// storeCollector shows the store's figures when it is scraped, from memory.
type storeCollector struct{ current func() *policysql.Store }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descUp       = desc("database_connected", "1 since the database was connected.")
	descPolicies = desc("policies", "Policies.")
	descTags     = desc("tags", "Tags, by state: used, quarantined (freed too recently to be given), free.", "state")
	descMaxTag   = desc("tags_max", "How many tags there are.")
	descInvalid  = desc("rows_invalid", "Rows of the database that cannot be read, and are ignored.")
	descWatchers = desc("watchers", "Agents that wait at this server now.")
	descHosts    = desc("hosts", "Hosts that report to this server.")
	descRevision = desc("revision", "Counter of the revision.")

	descGroups         = desc("security_groups", "Security groups.")
	descGroupsInvalid  = desc("security_groups_rows_invalid", "Rows of security groups that cannot be read, and are ignored.")
	descGroupsWatchers = desc("security_groups_watchers", "Agents that wait for security groups at this server now.")
	descGroupsRevision = desc("security_groups_revision", "Counter of the revision of security groups.")

	descDatabase = sqldb.NewMetrics(prefix)
)

// Describe implements prometheus.Collector: what there is depends on the database, so nothing is promised.
func (c *storeCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	to := metrics.Scrape(ch)
	s := c.current()
	if s == nil {
		to.Gauge(descUp, 0)
		return
	}
	to.Gauge(descUp, 1)
	st := s.Stats()
	to.Gauge(descPolicies, float64(st.Policies))
	to.Gauge(descTags, float64(st.Used), "used")
	to.Gauge(descTags, float64(st.Quarantine), "quarantined")
	to.Gauge(descTags, float64(st.Tags-st.Used-st.Quarantine), "free")
	to.Gauge(descMaxTag, float64(st.Tags))
	to.Gauge(descInvalid, float64(st.Invalid))
	to.Gauge(descWatchers, float64(st.Watchers))
	to.Gauge(descHosts, float64(st.Hosts))
	to.Gauge(descRevision, float64(st.Revision.Counter))
	g := s.SecurityGroups().Stats()
	to.Gauge(descGroups, float64(g.Groups))
	to.Gauge(descGroupsInvalid, float64(g.Invalid))
	to.Gauge(descGroupsWatchers, float64(g.Watchers))
	to.Gauge(descGroupsRevision, float64(g.Revision.Counter))
	descDatabase.Collect(to, s.DBCounts(), s.DBStats())
}

// followCollector shows how following Cloud Controller goes.
type followCollector struct{ status func() follow.Status }

var (
	descFollowActive = desc("security_groups_sync_active", "1 when this server is the one that follows Cloud Controller.")
	descFollowLast   = desc("security_groups_sync_last_success_timestamp_seconds", "When this server last knew that what is kept is what Cloud Controller shows.")
	descFollowOK     = desc("security_groups_sync_passes_total", "Looks at Cloud Controller, by result: ok, or failed.", "result")
	descFollowLists  = desc("security_groups_sync_lists_total", "Lists of all security groups that were read, by result: changed, or same.", "result")
	descFollowFails  = desc("security_groups_sync_failing", "1 when the last look at Cloud Controller failed: what is known stays.")
	descFollowHeld   = desc("security_groups_sync_held", "Groups that the last list lacked and that stay for a while, because they are so many.")
	descFollowUnread = desc("security_groups_sync_unread", "Groups and rules of the last list that cannot be understood: agents leave them out.")
)

// Describe implements prometheus.Collector.
func (c *followCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descFollowActive, descFollowLast, descFollowOK, descFollowLists, descFollowFails, descFollowUnread, descFollowHeld} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *followCollector) Collect(ch chan<- prometheus.Metric) {
	to, st := metrics.Scrape(ch), c.status()
	to.Gauge(descFollowActive, metrics.Number(st.Active))
	if !st.Last.IsZero() {
		to.Gauge(descFollowLast, float64(st.Last.UnixMilli())/1000)
	}
	to.Counter(descFollowOK, float64(st.Passes), "ok")
	to.Counter(descFollowOK, float64(st.Failed), "failed")
	to.Counter(descFollowLists, float64(st.Replaced), "changed")
	to.Counter(descFollowLists, float64(st.Lists-st.Replaced), "same")
	to.Gauge(descFollowFails, metrics.Number(st.Err != nil))
	to.Gauge(descFollowUnread, float64(st.Unread))
	to.Gauge(descFollowHeld, float64(st.Held))
}
