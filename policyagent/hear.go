package policyagent

import (
	"context"
	"errors"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/revision"
)

const (
	watchWait    = 60 * time.Second       // of one wait for changes, at most; at least half of it
	hearFirst    = 250 * time.Millisecond // first pause after an attempt to hear that failed
	hearLongest  = 15 * time.Second       // and the longest: a server that comes back is heard soon
	hearGap      = time.Second            // between answers without changes, of a server that does not let us wait
	lagPause     = 50 * time.Millisecond  // before a server is asked again that lags behind another one
	enforceLimit = 5 * time.Second        // wait for what was heard to be in the kernel, before the next question tells
)

// question is what policy-server is to be asked.
type question struct {
	groups []identity.Group // nil until the containers are known
	told   policy.Ask       // that is under way
	stale  chan struct{}    // closed when it is not the right one any more; nil when none is under way
}

// ask makes the groups the ones to be asked for. mu is held.
func (a *agent) ask(groups []identity.Group) {
	if a.question.groups == nil || !slices.Equal(groups, a.question.groups) {
		a.question.groups = groups
		a.reconsider()
		a.wake()
	}
}

// reconsider ends a question that does not say what is so now. mu is held.
func (a *agent) reconsider() {
	q := &a.question
	if q.stale != nil && (a.now.inForce != q.told.InForce || !slices.Equal(q.groups, q.told.Groups)) {
		close(q.stale)
		q.stale = nil
	}
}

// next returns the question to ask now, and a channel that is closed when it is not the right one any more. It waits until the containers
// are known; ok is false when ctx ends before.
func (a *agent) next(ctx context.Context) (q policy.Ask, stale chan struct{}, ok bool) {
	ok = a.await(ctx, func() bool { return a.question.groups != nil })
	a.mu.Lock()
	defer a.mu.Unlock()
	groups := a.question.groups
	a.question.told = policy.Ask{Host: a.cfg.name(), Groups: groups, Since: a.held.Since(groups), InForce: a.now.inForce}
	a.question.stale = make(chan struct{})
	a.now.asked = time.Now()
	return a.question.told, a.question.stale, ok
}

// await waits until cond, which is called with mu held, holds, and returns false when ctx ends before.
func (a *agent) await(ctx context.Context, cond func() bool) bool {
	for {
		a.mu.Lock()
		ok, turn := cond(), a.turn
		a.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-turn:
		}
	}
}

// hearing keeps the policies in step with policy-server.
func (a *agent) hearing(ctx context.Context) error {
	failures := 0
	for {
		q, stale, ok := a.next(ctx)
		if !ok {
			return nil
		}
		select { // the question that is asked now is the answer to it
		case <-a.nudged:
		default:
		}
		asked := time.Now()
		u, err := whileFresh(ctx, a.feed.Watch, q, stale)
		if partial, is := errors.AsType[*policyhttp.Partial](err); is {
			a.log.Warn("some policies cannot be used", "error", partial)
			err = nil
		}
		if err == nil {
			if err = a.adopt(u, q.Groups); errors.Is(err, fault.Unavailable) { // one of several servers, which will soon have more to say
				a.log.Debug("answer not used", "error", err)
				rest(ctx, lagPause, stale, a.nudged)
				continue
			}
		} else if closed(stale) && ctx.Err() == nil {
			continue // the question was given up
		}
		if ctx.Err() != nil {
			return nil
		}
		a.noteHeard(err)
		var pause time.Duration
		switch {
		case err != nil:
			failures++
			pause = reconcile.Backoff(hearFirst, hearLongest, failures)
			a.log.Warn("policies could not be heard", "error", err, "retry_in", pause)
		case u.Changes():
			failures = 0
			a.awaitForce(ctx)
		default:
			failures = 0
			pause = hearGap - time.Since(asked)
		}
		rest(ctx, pause, stale, a.nudged)
	}
}

// whileFresh asks until there is an answer or the question is stale.
func whileFresh[Q, U any](ctx context.Context, ask func(context.Context, Q) (U, error), q Q, stale <-chan struct{}) (U, error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	defer func() { cancel(); <-done }()
	go func() {
		defer close(done)
		select {
		case <-stale:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ask(ctx, q)
}

// rest waits for the pause, or until there is another question or somebody nudges.
func rest(ctx context.Context, pause time.Duration, stale, nudged <-chan struct{}) {
	if pause <= 0 {
		return
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-stale:
	case <-nudged:
	}
}

// nudge ends a pause: somebody waits for an answer.
func nudge(nudged chan<- struct{}) {
	select {
	case nudged <- struct{}{}:
	default:
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// adopt takes in an answer to a question about groups.
func (a *agent) adopt(u policy.Update, groups []identity.Group) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	was, held := a.held.Revision(), a.held.Absent()
	if err := a.held.Update(u, groups, wall()); err != nil {
		return err
	}
	first := !a.known
	a.known = true
	if !u.Changes() && !first && a.held.Absent() == held { // an answer may find the time of what is held over
		if a.now.inForce == was && was != (revision.Revision{}) {
			a.now.inForce = u.Revision // what lies between does not touch this host
		}
		return nil
	}
	a.noteChange()
	a.log.Debug("policies changed", "revision", u.Revision, "full", u.Full, "set", len(u.Set), "gone", len(u.Gone), "held", a.held.Absent())
	a.save.Kick()
	return nil
}

// noteChange has what is held from now on enforced. mu is held.
func (a *agent) noteChange() {
	a.version++
	a.now.changedLast = time.Now()
	if a.now.changedAt.IsZero() {
		a.now.changedAt = a.now.changedLast
	}
	a.enforcement.Kick()
}

// awaitForce waits until what was heard is in the kernel, so that the next question can tell.
func (a *agent) awaitForce(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, enforceLimit)
	defer cancel()
	a.await(ctx, func() bool { return a.now.inForce == a.held.Revision() && a.now.version == a.version })
}

// noteHeard notes how an attempt to hear ended.
func (a *agent) noteHeard(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now.hearError = err; err == nil {
		a.now.heard = time.Now()
	} else {
		a.now.hearFailures++
		if errors.Is(err, fault.Denied) {
			a.now.hearDenied++
		}
	}
	a.wake()
}
