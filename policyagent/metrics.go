package policyagent

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/internal/metrics"
)

// metrics returns the handler of /metrics.
func (a *agent) metrics() http.Handler { return metrics.Handler(metrics.Reader(a.collect)) }

const prefix = "silk_policy_agent_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

var (
	descState = desc("state", "1 for the state the agent is in, 0 for the others.", "state")
	descLoops = metrics.NewLoops(prefix)

	descRevision = desc("revision_in_force", "Counter of the revision that the kernel has; absent while that is not known.", "epoch")
	descHeard    = desc("heard_timestamp_seconds", "When policy-server last answered; absent before the first time.")
	descUnheard  = desc("hear_failures_total", "Failed attempts to hear policies.")
	descHeld     = desc("policies_held", "Policies that are enforced though the last list does not have them.")
	descPolicies = desc("policies", "Allowances in the kernel: policies towards containers of this host.")
	descElements = desc("elements", "Elements of the policy table.")
	descOwned    = desc("table_owned", "1 when nobody but this agent can change the policy table.")
	descDrift    = desc("drift_repairs_total", "Objects and elements that somebody else had changed and that were put right.")
	descCut      = desc("connections_ended_total", "Connections ended because no policy allows them any more.")
	descRefused  = desc("refused_packets_total", "Packets refused since the table was made.", "reason")

	descFlows        = desc("flow_records_total", "Records of the flow log.", "event")
	descFlowLost     = desc("flow_lost_total", "What the flow log lost, because too much came at once or the disk was too slow.", "what")
	descFlowUnlogged = desc("flow_unlogged_packets_total", "Packets that the flow log was not told of because of its limits, since the table was made.")
	descFlowOpen     = desc("flow_open", "Connections whose end the flow log waits for.")
	descFlowOn       = desc("flow_log", "1 when this part of the flow log is switched on.", "part")

	descGroups        = desc("security_groups", "Security groups that are enforced.")
	descGroupsUnheard = desc("security_group_hear_failures_total", "Failed attempts to hear security groups.")
	descReaches       = desc("egress_rule_sets", "Sets of rules for what containers may reach outside the overlay: containers with the same rules share one.")

	descContainers = desc("containers", "Containers on this host, by what is known of them.", "state")
	descSkipped    = desc("skipped", "Records, policies and groups that cannot be enforced and are refused.")
)

// collect reads the figures.
func (a *agent) collect(to metrics.Scrape) {
	h, _, _ := a.health()
	for _, s := range []string{"ready", "degraded", "starting"} {
		to.Flag(descState, s == h.Status, s)
	}
	descLoops.Collect(to, a.enforcement, a.save)
	a.mu.Lock()
	p, held, groups := a.now, a.held.Absent(), a.groups
	listed := len(groups.held.State().Listed) + groups.held.Absent()
	a.mu.Unlock()
	if a.dynamic() {
		to.Gauge(descGroups, float64(listed))
		to.Counter(descGroupsUnheard, float64(groups.fails))
	}
	to.Gauge(descReaches, float64(p.reaches))
	if !p.inForce.IsZero() {
		to.Gauge(descRevision, float64(p.inForce.Counter), p.inForce.Epoch)
	}
	to.Time(descHeard, p.heard)
	to.Counter(descUnheard, float64(p.hearFailures))
	to.Gauge(descHeld, float64(held))
	to.Gauge(descPolicies, float64(p.policies))
	to.Gauge(descElements, float64(p.desired))
	to.Counter(descDrift, float64(p.drift))
	to.Counter(descCut, float64(p.cut))
	to.Gauge(descContainers, float64(len(p.enforced)), "enforced")
	to.Gauge(descContainers, float64(len(p.hosted.containers)-len(p.enforced)), "refused")
	to.Gauge(descContainers, float64(p.hosted.strangers), "unknown")
	to.Gauge(descSkipped, float64(len(p.problems)))
	a.latency.Collect(to)
	a.collectFlows(to)

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	st, err := a.table.Stats(ctx)
	if err != nil {
		a.log.Warn("counters of the policy table could not be read", "error", err)
		return
	}
	to.Flag(descOwned, st.Owned)
	to.Counter(descFlowUnlogged, float64(st.Unlogged))
	for reason, n := range st.Refused {
		to.Counter(descRefused, float64(n), string(reason))
	}
}

// collectFlows reads the flow log.
func (a *agent) collectFlows(to metrics.Scrape) {
	f := a.flows
	f.mu.Lock()
	n, open := f.counts, f.join.Open()
	f.mu.Unlock()
	for e, count := range n.records {
		to.Counter(descFlows, float64(count), flow.Event(e).String())
	}
	to.Counter(descFlowLost, float64(n.packets), "packets")
	to.Counter(descFlowLost, float64(n.ends), "ends")
	if f.file != nil {
		_, lost := f.file.figures()
		to.Counter(descFlowLost, float64(lost), "lines")
	}
	to.Gauge(descFlowOpen, float64(open))
	a.mu.Lock()
	c2c, egress := a.logging, a.loggingEgress
	a.mu.Unlock()
	to.Flag(descFlowOn, c2c, "c2c")
	to.Flag(descFlowOn, egress, "egress")
}

// newLatency returns the histogram of the time from hearing of a change to having it in the kernel.
func newLatency() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: prefix + "change_to_kernel_seconds", Help: "Time from hearing of a change to having it in the kernel.",
		Buckets: []float64{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10},
	})
}
