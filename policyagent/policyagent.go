// Package policyagent is vxlan-policy-agent, the part of Silk that makes policies hold on a host: it hears from policy-server what the
// containers of the host may send and be sent, and keeps the kernel's rules like that.
//
// It decides little itself: policy.Held says what an answer, and the lack of one, means for the rules to keep, firewall.Compile makes
// a ruleset of rules and containers, firewall/nft brings the kernel to it. It attaches no containers (cni, endpoint) and gives no tags
// (policy-server).
//
// Use: Load a configuration, Run it until the context ends.
package policyagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/secgroup"
)

const (
	passGap     = 5 * time.Millisecond   // between passes that somebody asks for
	passRetry   = 200 * time.Millisecond // first pause after a pass that failed: repairs must not wait for long then either
	passResync  = 5 * time.Second        // between passes that nobody asks for
	lookAgain   = 5 * time.Minute        // how long notifications are trusted before the whole table is looked at
	saveGap     = 2 * time.Second        // between writes of the state
	routerCheck = 5 * time.Minute        // between questions for the tag of overlay ingress
	lockTimeout = 10 * time.Second       // wait for the agent before to let go of the table and the state
)

// Run is vxlan-policy-agent: it returns nil when ctx ends, and an error when the host cannot be protected by it or what is configured
// cannot be. Its first act is a table that refuses what is not known to be allowed. It leaves all rules in the kernel as they are.
// level is what the debug listener changes.
func Run(ctx context.Context, cfg Config, level *slog.LevelVar, log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // a host with many policies makes much garbage at once and then little for long
	}
	a, err := open(ctx, cfg, nil, log)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer a.close()
	tc, err := cfg.certificates().Client()
	if err != nil {
		return fmt.Errorf("create tls config: %w", err)
	}
	client := policyhttp.NewClient(cfg.servers(), tc, policyhttp.ClientOptions{
		Timeout: cfg.timeout(), Wait: watchWait/2 + spread(watchWait/2).Truncate(time.Second), Poll: cfg.poll(), PollGroups: time.Duration(cfg.ASGPoll) * time.Second, Traceparent: os.Getenv("TRACEPARENT"),
	})
	defer client.Close()
	a.groupFeed = client.SecurityGroups()
	return a.run(ctx, client, level)
}

// agent is the running program. What its loops share is below mu; they never hold it while they wait for anything.
type agent struct {
	cfg     Config
	log     *slog.Logger
	ns      *kernel.NS
	table   *nft.Table
	seen    sources
	state   *state
	input   firewall.Input       // what does not change of it
	adopted bool                 // another agent's table was there at the start
	nudged  chan struct{}        // ends a pause between questions to policy-server
	latency prometheus.Histogram // from hearing of a change to having it in the kernel
	flows   *flowLog
	peers   peers
	closers []func() error

	feed        policy.Feed
	groupFeed   secgroup.Feed // nil: there are none
	opened      time.Time
	enforcement *reconcile.Loop
	save        *reconcile.Loop
	cache       compiled // of the enforcement alone

	mu            sync.Mutex
	held          *policy.Held
	version       uint64  // changes with what is held
	tagged        *tagged // of groups by tag; nil until somebody asks, and of an older version once that changed
	known         bool    // there was a list of policies, now or in an earlier life
	router        identity.Tag
	groups        groups
	logging       bool // the switch of the debug server, and of what goes outside the next
	loggingEgress bool
	turn          chan struct{} // closed, and replaced, when anything below changes
	question      question
	now           progress
}

// open makes the base table, then everything else that needs no server, in ns (nil: the process's own).
func open(ctx context.Context, cfg Config, ns *kernel.NS, log *slog.Logger) (*agent, error) {
	a := &agent{cfg: cfg, log: log, ns: ns, turn: make(chan struct{}), nudged: make(chan struct{}, 1), logging: cfg.C2CLogging, loggingEgress: cfg.ASGLogging, state: &state{}, latency: newLatency()}
	if err := a.open(ctx); err != nil {
		a.close()
		return nil, err
	}
	a.closers = append(a.closers, a.peers.close)
	a.opened, a.groups.nudged = wall(), make(chan struct{}, 1)
	a.enforcement = &reconcile.Loop{Name: "enforcement", Step: a.pass, Log: log, Resync: passResync, MinGap: passGap, Retry: passRetry}
	a.flows.changed = a.enforcement.Kick
	a.save = &reconcile.Loop{Name: "state", Step: a.writeState, Log: log, MinGap: saveGap}
	return a, nil
}

func (a *agent) open(ctx context.Context) error {
	if err := a.openTable(ctx); err != nil {
		return err
	}
	if err := a.checkHost(ctx); errors.Is(err, fault.Conflict) {
		return err
	}
	services, _ := a.cfg.services() // judged by Validate
	a.input = firewall.Input{
		Network: a.cfg.overlay(), VTEP: a.cfg.VTEPName, MaxTag: identity.Tag(a.cfg.MaxTag), Services: services, DNS: a.cfg.dns(), Unrestricted: a.cfg.Open,
		Limit: a.cfg.limit(),
	}
	a.cache.reaches = newReaches(a.cfg.DenyNetworks)
	records, err := endpoint.Open(a.cfg.EndpointDir)
	if err != nil {
		return err
	}
	a.seen = sources{ns: a.ns, records: records, store: a.cfg.Datastore}
	a.flows = newFlowLog(a.ns, a.cfg, records.Sysctls(), a.log)
	if a.cache.marks, err = records.Identities(); err != nil {
		a.log.Warn("identities that an earlier agent listed cannot be read", "error", err)
	}
	return a.openState(ctx)
}

// checkHost looks for what others have on the host that does not go with ours, and says so. Conflict: tags would decide about routes.
func (a *agent) checkHost(ctx context.Context) error {
	warnings, err := a.table.Check(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range warnings {
		if !slices.Contains(a.now.warnings, w) {
			a.log.Warn("host may refuse what policies allow", "warning", w)
		}
	}
	a.now.warnings = warnings
	if err != nil {
		err = fmt.Errorf("check host: %w", err)
		a.log.Error("host does not go with policies", "error", err)
		a.now.warnings = append(a.now.warnings, err.Error())
	}
	return err
}

// openTable makes the base table, or adopts the one that an earlier agent left. One that still stops is waited for.
func (a *agent) openTable(ctx context.Context) error {
	there, err := kernel.HasTable(a.ns, nft.Name)
	if err != nil {
		return err
	}
	a.adopted = there
	deadline := time.Now().Add(lockTimeout)
	for {
		a.table, err = nft.Open(a.ns, nft.Options{ConnMask: a.cfg.ConnMask, LogGroup: a.cfg.logGroup()})
		if err == nil {
			a.closers = append(a.closers, a.table.Close)
			return nil
		}
		if !errors.Is(err, fault.Conflict) || time.Now().After(deadline) || !reconcile.Sleep(ctx, 50*time.Millisecond) {
			return fmt.Errorf("make the policy table: %w", err)
		}
	}
}

// openState reads what was known last. Without a directory, as in a deployment that does not know of it, the agent runs but says so.
func (a *agent) openState(ctx context.Context) error {
	a.held, a.groups.held = policy.NewHeld(watchWait), secgroup.NewHeld(watchWait)
	wait, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	s, unlock, err := openState(wait, a.cfg.StateDir)
	if errors.Is(err, fault.Unavailable) {
		return err
	}
	if err != nil {
		a.log.Error("state directory cannot be used: a restart without policy-server will not know the policies of now", "error", err)
		s = &state{dir: a.cfg.StateDir} // what is in it may be read: it is on a disk that has become read-only, say
	} else {
		a.state = s
		a.closers = append(a.closers, unlock)
	}
	v, err := s.load()
	if err != nil {
		a.log.Error("saved policies cannot be used", "error", err)
	}
	if v.held.Groups != nil {
		a.held, a.router, a.known = v.held.Restore(watchWait), v.router, true
		a.log.Info("policies restored", "revision", v.held.Revision, "policies", len(v.held.Listed)+len(v.held.Absent))
	}
	a.restoreGroups(s)
	return nil
}

// restoreGroups reads which security groups were known last.
func (a *agent) restoreGroups(s *state) {
	h, err := s.loadGroups()
	if err != nil {
		a.log.Error("saved security groups cannot be used", "error", err)
	}
	if h == nil {
		return
	}
	a.groups.held, a.groups.known = h.Restore(watchWait), true
	a.log.Info("security groups restored", "revision", h.Revision, "groups", len(h.Listed)+len(h.Absent))
}

// close lets go of everything in reverse order.
func (a *agent) close() {
	for i := len(a.closers) - 1; i >= 0; i-- {
		if err := a.closers[i](); err != nil {
			a.log.Warn("closing failed", "error", err)
		}
	}
}

// run serves until ctx ends.
func (a *agent) run(ctx context.Context, feed policy.Feed, level *slog.LevelVar) error {
	a.feed = feed
	if a.cfg.ASGSyncing && !a.dynamic() {
		a.log.Warn("there is nobody to ask for security groups: containers reach what the runtime says", "key", "enable_asg_syncing")
	}
	force, err := net.Listen("tcp", a.cfg.forceAddress())
	if err != nil {
		return fmt.Errorf("force-policy-poll-cycle-server: %w", err)
	}
	inside, err := net.Listen("tcp", a.cfg.debugAddress())
	if err != nil {
		force.Close()
		return fmt.Errorf("debug server: %w", err)
	}
	tasks := []service.Task{
		{Name: "state", Run: a.saving},
		{Name: "enforcement", Run: a.enforcement.Run},
		{Name: "kernel-watch", Run: a.watchKernel("watch on the policy table ended", a.table.Watch)},
		{Name: "container-watch", Run: a.watchKernel("watch on container devices ended", a.watchContainers)},
		{Name: "policy-watch", Run: a.hearing},
		{Name: "flow-log", Run: a.flows.run},
		a.peerTask(),
	}
	if a.dynamic() {
		tasks = append(tasks, service.Task{Name: "security-group-watch", Run: a.hearingGroups})
	}
	if a.cfg.Ingress {
		tasks = append(tasks, service.Task{Name: "ingress-tag", Run: a.routerLoop().Run})
	}
	return service.Run(ctx, a.log, append(tasks,
		service.HTTP("force-policy-poll-cycle", force, nil, a.forceHandler(), service.DefaultLimits, a.log),
		service.HTTP("debug", inside, nil, a.debugHandler(level), debugLimits, a.log),
	)...)
}

// debugLimits leave time for a profile of a minute.
var debugLimits = service.Limits{Header: 5 * time.Second, Body: 15 * time.Second, Write: 5 * time.Minute, Idle: 2 * time.Minute}

func (a *agent) watchContainers(ctx context.Context, kick func()) error {
	return endpoint.Watch(ctx, a.ns, kick)
}

// watchKernel wakes the enforcement whenever somebody changes what it depends on, and watches again when a watch ends.
func (a *agent) watchKernel(lost string, watch func(context.Context, func()) error) func(context.Context) error {
	return func(ctx context.Context) error {
		for failures := 1; ctx.Err() == nil; failures++ {
			err := watch(ctx, a.enforcement.Kick)
			if ctx.Err() != nil {
				break
			}
			pause := reconcile.Backoff(time.Second, time.Minute, failures)
			a.log.Error(lost, "error", err, "retry_in", pause)
			a.enforcement.Kick()
			reconcile.Sleep(ctx, pause)
		}
		return nil
	}
}

// saving writes the state whenever it changed, and once more at the end.
func (a *agent) saving(ctx context.Context) error {
	err := a.save.Run(ctx)
	if err := a.writeState(context.WithoutCancel(ctx)); err != nil {
		a.log.Error("state could not be stored at the end", "error", err)
	}
	return err
}

// writeState stores what is known, if it is another than was stored last.
func (a *agent) writeState(context.Context) error {
	err := errors.Join(a.writePolicies(), a.writeGroups())
	a.mu.Lock()
	a.now.saveError = err
	a.mu.Unlock()
	if errors.Is(err, errNoState) { // the start has said so, and no attempt will change it
		return nil
	}
	return err
}

// writePolicies stores what is known of policies, if it is another than was stored last.
func (a *agent) writePolicies() error {
	a.mu.Lock()
	if !a.known || a.now.saved == a.version {
		a.mu.Unlock()
		return nil
	}
	version, v := a.version, saved{a.held.State(), a.router}
	a.mu.Unlock()
	err := a.state.save(v)
	a.mu.Lock()
	if err == nil {
		a.now.saved = version
	}
	a.mu.Unlock()
	return err
}

// routerLoop learns the tag of overlay ingress and follows it.
func (a *agent) routerLoop() *reconcile.Loop {
	return &reconcile.Loop{Name: "ingress-tag", Log: a.log, Resync: routerCheck, Step: func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, a.cfg.timeout())
		defer cancel()
		tag, err := a.feed.Tag(ctx, identity.IngressRouter, identity.Router)
		if err != nil {
			return fmt.Errorf("ask for the tag of overlay ingress: %w", err)
		}
		a.mu.Lock()
		changed := tag != a.router
		if changed {
			a.router, a.version = tag, a.version+1
		}
		a.mu.Unlock()
		if changed {
			a.log.Info("tag of overlay ingress learned", "tag", tag)
			a.enforcement.Kick()
			a.save.Kick()
		}
		return nil
	}}
}

// wake tells those who wait for progress. mu is held.
func (a *agent) wake() {
	close(a.turn)
	a.turn = make(chan struct{})
}

// wall returns the time without its monotonic part, which is another one after a restart.
func wall() time.Time { return time.Now().Round(0) }

// spread returns a random part of d.
func spread(d time.Duration) time.Duration { return rand.N(max(d, 1)) }
