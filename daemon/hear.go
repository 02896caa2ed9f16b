package daemon

import (
	"context"
	"errors"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

const (
	hearGap      = 100 * time.Millisecond // least time between two answers of a watch, and
	hearSpread   = 400 * time.Millisecond // what is added at random: all hosts hear of a change at the same time
	listsPerTry  = 10                     // lists from an older controller before it is asked for a watch again
	partialPause = 5 * time.Second        // after a watch whose answer had leases that cannot be used
)

// hearing keeps the list of peers: by waiting for changes, or by polling a controller that cannot be waited on.
func (d *daemon) hearing(ctx context.Context) error {
	h := hearer{d: d}
	failures := 0
	for ctx.Err() == nil {
		d.mu.Lock()
		d.now.asked = time.Now()
		d.mu.Unlock()
		pause, err := h.pass(ctx)
		if ctx.Err() != nil {
			break
		}
		d.mu.Lock()
		d.now.hearError = err
		if err != nil {
			d.now.hearFailures++
		}
		d.mu.Unlock()
		if err != nil {
			failures++
			pause = max(pause, reconcile.Backoff(min(retryFirst, d.cfg.interval()), d.cfg.interval(), failures))
			d.log.Warn("leases of peers could not be heard", "error", err, "retry_in", pause)
		} else {
			failures = 0
		}
		d.beaten("lease-watch")
		reconcile.Sleep(ctx, pause)
	}
	return nil
}

// hearer remembers between passes whether the controller can be waited on.
type hearer struct {
	d     *daemon
	lists int // still to be polled before a watch is tried again
}

// pass takes in one answer and returns how long to wait for the next.
func (h *hearer) pass(ctx context.Context) (time.Duration, error) {
	d := h.d
	if h.lists > 0 {
		h.lists--
		return h.list(ctx)
	}
	d.mu.Lock()
	since := d.peers.Revision()
	d.mu.Unlock()
	u, err := d.reg.Watch(ctx, since)
	partial, isPartial := errors.AsType[*leasehttp.Partial](err)
	switch {
	case err == nil:
		return hearGap + spread(hearSpread), d.adopt(u)
	case isPartial:
		d.log.Warn("some leases cannot be used", "error", partial)
		d.adoptList(u.Set, len(partial.Skipped))
		return max(partialPause, spread(d.cfg.interval())), nil
	case errors.Is(err, fault.NotFound) || errors.Is(err, fault.Invalid):
		h.lists = listsPerTry - 1
		return h.list(ctx)
	}
	return 0, err
}

// list polls once.
func (h *hearer) list(ctx context.Context) (time.Duration, error) {
	d := h.d
	pause := d.cfg.interval()*9/10 + spread(d.cfg.interval()/5)
	ls, err := d.reg.Leases(ctx)
	partial, isPartial := errors.AsType[*leasehttp.Partial](err)
	switch {
	case err == nil:
		d.adoptList(ls, 0)
	case isPartial:
		d.log.Warn("some leases cannot be used", "error", partial)
		d.adoptList(ls, len(partial.Skipped))
	default:
		return 0, err
	}
	return pause, nil
}

// adopt takes in a sealed update.
func (d *daemon) adopt(u lease.Update) error {
	d.mu.Lock()
	was := d.peers.Revision()
	err := d.peers.Update(u, wall())
	if err == nil {
		d.now.heard, d.now.listed, d.now.partial = time.Now(), u.Count, 0
	}
	held := d.peers.Held()
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if u.Changes() || u.Revision != was {
		d.log.Debug("leases changed", "revision", u.Revision, "full", u.Full, "set", len(u.Set), "gone", len(u.Gone), "held", held)
		d.convergence.Kick()
		d.save.Kick()
		d.suspect(u.Set)
	}
	return nil
}

// suspect asks at once for a renewal, and so for a verdict, when a list has another host on this host's subnet.
func (d *daemon) suspect(ls []lease.Lease) {
	d.mu.Lock()
	own := d.standing.Lease
	d.mu.Unlock()
	for _, l := range ls {
		if l.Underlay != own.Underlay && l.Subnet.Overlaps(own.Subnet) {
			d.log.Warn("another host has this host's subnet", "lease", l)
			d.nudge()
			return
		}
	}
}

// adoptList takes in a list without a seal, of which some leases may be missing.
func (d *daemon) adoptList(ls []lease.Lease, missing int) {
	d.mu.Lock()
	d.peers.List(ls, missing == 0, wall())
	d.now.heard, d.now.listed, d.now.partial = time.Now(), len(ls), missing
	d.mu.Unlock()
	d.convergence.Kick()
	d.save.Kick()
	d.suspect(ls)
}
