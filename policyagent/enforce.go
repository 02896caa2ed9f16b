package policyagent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// compiled is what the last pass has made, so that a pass that finds nothing new costs little.
type compiled struct {
	compiler  firewall.Compiler
	reaches   reaches
	version   uint64
	endpoints []firewall.Endpoint
	rules     firewall.Ruleset
	problems  []firewall.Problem
	fresh     bool // all of it is of use

	marks  []endpoint.Identity   // as listed
	set    bool                  // rules were set once
	kernel firewall.Ruleset      // that was set last
	cutAll bool                  // connections are to be judged whoever began them
	cut    map[identity.Tag]bool // connections of these groups are to be judged
	looked time.Time
}

// A pass that takes long, because there are very many policies, leaves the processor alone for as long as it took, so that changes that come
// all the time cost half of it at most; for longRest at most, so that none waits for long.
const (
	longPass = 50 * time.Millisecond
	longRest = 300 * time.Millisecond
)

// pass is one turn of the enforcement: make the kernel agree with the containers and the policies as they are now.
func (a *agent) pass(ctx context.Context) error {
	a.mu.Lock()
	took, ended := a.now.passTook, a.now.passEnded
	a.mu.Unlock()
	if rest := min(took, longRest) - time.Since(ended); took > longPass && rest > 0 && !reconcile.Sleep(ctx, rest) {
		return ctx.Err()
	}
	a.mu.Lock()
	a.now.begun, a.now.begunAt = a.now.begun+1, time.Now()
	number, began := a.now.begun, a.now.begunAt
	a.mu.Unlock()
	cutError, err := a.enforce(ctx)
	if ctx.Err() != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now.ended, a.now.passError, a.now.cutError = number, err, cutError
	a.now.passTook, a.now.passEnded = time.Since(began), time.Now()
	if err == nil {
		a.now.enforcedAt = time.Now()
	}
	if err = errors.Join(err, cutError); err != nil {
		a.now.inForce = revision.Revision{}
		a.reconsider()
	}
	a.wake()
	return err
}

// enforce carries out a pass. What it learns it notes itself, under mu. That connections could not be ended is an error of its own: new ones are
// judged as they should be.
func (a *agent) enforce(ctx context.Context) (cutError, err error) {
	h, err := a.seen.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("find containers: %w", err)
	}
	now := wall()
	a.mu.Lock()
	a.ask(h.groups())
	a.askGroups(h)
	starting := a.dynamic() && !a.groups.known && now.Sub(a.opened) < groupsStart
	if a.adopted && (!a.known || starting) { // the rules that an earlier agent left are better than none
		a.now.hosted = h
		logs := a.logs()
		a.mu.Unlock()
		a.flows.want(logs.C2C || logs.Egress) // they may log
		a.flows.know(h, nil, 0, firewall.Ruleset{}, now)
		return nil, a.table.Stand(ctx)
	}
	records, expired := a.groups.keep(now)
	if expired {
		a.version++
		a.save.Kick()
	}
	held := a.held.Absent()
	rules, rev, router, absent := a.held.Keep(now), a.held.Revision(), a.router, a.held.Absent()
	if absent != held { // its time was over: no list below shows it, and no later Keep
		a.version++
		a.save.Kick()
	}
	version := a.version
	groupsVersion := a.groups.version
	since, logs := a.now.changedAt, a.logs()
	a.mu.Unlock()

	a.give(&h, records, groupsVersion)
	c := &a.cache
	enforceable := h.endpoints()
	if err := a.mark(h, true); err != nil {
		enforceable = h.listed(c.marks, err)
	}
	a.compile(enforceable, rules, version, router, absent > 0)
	if !a.flows.want(logs.C2C || logs.Egress || c.rules.Logs()) {
		logs.C2C, logs.Egress = false, false
	}
	c.rules.Log = logs
	a.flows.know(h, rules, version, c.rules, now)
	if time.Since(c.looked) > lookAgain {
		if c.set {
			a.table.Forget()
			a.checkHost(ctx) // it has said what there is to say
		}
		c.looked = time.Now()
	}
	changes, err := a.table.Set(ctx, c.rules)
	if err != nil {
		return nil, err
	}
	a.mark(h, false) // one too many closes nothing that is open
	first := !c.set
	c.note(first)
	ended, cutError := a.cut(ctx)
	if cutError != nil {
		rev = revision.Revision{} // what was removed is not out of force
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.now.hosted, a.now.version = h, version
	a.noteEnforced(h, rev, since, changes, first, ended)
	return cutError, nil
}

// compile makes the ruleset, unless the one that there is still stands.
func (a *agent) compile(eps []firewall.Endpoint, rules []policy.Rule, version uint64, router identity.Tag, aging bool) {
	c := &a.cache
	same := func(x, y firewall.Endpoint) bool {
		return x.Device == y.Device && x.Address == y.Address && x.Group == y.Group && x.Egress == y.Egress && slices.Equal(x.Ingress, y.Ingress)
	}
	if c.fresh && !aging && c.version == version && slices.EqualFunc(c.endpoints, eps, same) {
		return
	}
	in := a.input
	in.Endpoints, in.Rules = eps, rules
	if a.cfg.Ingress {
		in.Router = router
	}
	c.rules, c.problems = c.compiler.Compile(in)
	c.version, c.endpoints, c.fresh = version, eps, true
}

// mark lists as whom the kernel knows addresses: before a change both those of now and those to come, afterwards the latter.
func (a *agent) mark(h hosted, before bool) error {
	c := &a.cache
	next := map[endpoint.Identity]bool{}
	for _, x := range h.containers {
		for _, i := range x.identities() {
			next[i] = true
		}
	}
	if before {
		for _, m := range c.marks {
			next[m] = true
		}
	}
	if len(next) == len(c.marks) && !slices.ContainsFunc(c.marks, func(m endpoint.Identity) bool { return !next[m] }) {
		return nil
	}
	list := slices.Collect(maps.Keys(next))
	if err := a.seen.records.SetIdentities(list); err != nil {
		return err
	}
	c.marks = list
	return nil
}

// note remembers what was set, and the groups that may send less than before: their connections are to be judged. The first time all are.
func (c *compiled) note(first bool) {
	was := c.kernel
	c.kernel, c.set = c.rules, true
	if first {
		c.cutAll = true
		return
	}
	if c.cut == nil {
		c.cut = map[identity.Tag]bool{}
	}
	for _, g := range was.Groups {
		var left []firewall.Allow
		if now := c.rules.Group(g.Tag); now != nil {
			left = now.Allowed
		}
		for x := range firewall.Missing(g.Allowed, left) {
			c.cut[x.Source] = true
		}
	}
	for _, x := range was.Ingress {
		if _, still := slices.BinarySearchFunc(c.rules.Ingress, x, firewall.CompareIngress); !still || was.Router != c.rules.Router {
			c.cut[was.Router] = true
		}
	}
}

// cut ends the connections that are no longer allowed, of those that are to be judged.
func (a *agent) cut(ctx context.Context) (int, error) {
	c := &a.cache
	if a.cfg.KeepEstablished {
		c.cutAll, c.cut = false, nil
	}
	if !c.cutAll && len(c.cut) == 0 {
		return 0, nil
	}
	var tags []identity.Tag // none: all
	if !c.cutAll {
		tags = slices.Sorted(maps.Keys(c.cut))
	}
	n, err := a.table.Cut(ctx, tags...)
	if err != nil {
		return n, fmt.Errorf("end connections that are no longer allowed: %w", err)
	}
	c.cutAll, c.cut = false, nil
	return n, nil
}

// noteEnforced notes a pass that succeeded. mu is held.
func (a *agent) noteEnforced(h hosted, rev revision.Revision, since time.Time, changes nft.Changes, first bool, ended int) {
	c := &a.cache
	p := &a.now
	enforced := make(map[endpoint.Key]container, len(h.containers))
	for _, x := range h.containers {
		if c.has(x) {
			enforced[x.key] = x
		}
	}
	p.enforced, p.problems = enforced, slices.Concat(h.problems, c.problems)
	p.desired, p.policies, p.reaches, p.cut = changes.Desired, c.rules.Policies(), len(c.rules.Reaches), p.cut+uint64(ended)
	if changes.Drift > 0 && !first {
		p.drift += uint64(changes.Drift)
		a.log.Warn("rules repaired: somebody else had changed them", "changes", changes.Drift)
	}
	if changes.Sent > 0 {
		a.log.Debug("rules changed", "elements", changes.Desired, "sent", changes.Sent)
	}
	if ended > 0 {
		a.log.Info("connections ended that no policy allows any more", "count", ended)
	}
	a.tellProblems()
	if p.inForce != rev {
		p.inForce = rev
		a.reconsider()
	}
	if !since.IsZero() && p.changedAt.Equal(since) {
		a.latency.Observe(time.Since(since).Seconds())
		p.changedAt = time.Time{}
		if a.version != p.version { // another came during the pass
			p.changedAt = p.changedLast
		}
	}
}

// has reports whether a container's addresses are in the ruleset.
func (c *compiled) has(x container) bool {
	for _, e := range x.endpoints {
		_, ok := slices.BinarySearchFunc(c.rules.Sources, firewall.Source{Address: e.Address, Device: e.Device}, firewall.CompareSource)
		if !ok {
			return false
		}
	}
	return len(x.endpoints) > 0
}

// tellProblems logs what cannot be enforced when that changes. mu is held.
func (a *agent) tellProblems() {
	texts := make([]string, len(a.now.problems))
	for i, p := range a.now.problems {
		texts[i] = p.String()
	}
	slices.Sort(texts)
	if slices.Equal(texts, a.now.told) {
		return
	}
	for _, t := range texts {
		if _, known := slices.BinarySearch(a.now.told, t); !known {
			a.log.Warn("something cannot be enforced and is refused", "problem", t)
		}
	}
	a.now.told = texts
}
