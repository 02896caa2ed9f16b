package daemon

import (
	"context"
	"errors"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// renewalLoop returns the loop that turns step. A third of the interval as the first pause after a failure keeps a
// controller that comes back from being met by every host at once.
func (d *daemon) renewalLoop(step func(context.Context) error) *reconcile.Loop {
	i := d.cfg.interval()
	return &reconcile.Loop{Name: "renewal", Step: d.beat("renewal", step), Log: d.log, Resync: i, Retry: i / 3}
}

// renewing keeps the lease. The first renewal after the start comes at a random part of the interval, so that hosts that
// start in the same second spread over it; later ones keep drifting apart.
func (d *daemon) renewing(ctx context.Context) error {
	d.mu.Lock()
	first := spread(d.cfg.interval())
	if d.doubt != "" {
		first = min(first, spread(retryFirst))
	}
	d.now.beats["renewal"] = time.Now().Add(first)
	d.mu.Unlock()
	t := time.NewTimer(first)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-t.C:
	case <-d.nudged:
	}
	return d.renewal.Run(ctx)
}

// nudge asks for a renewal soon, also while the first one is still to come.
func (d *daemon) nudge() {
	d.renewal.Kick()
	select {
	case d.nudged <- struct{}{}:
	default:
	}
}

// retryFirst bounds the first pause after the controller went away.
const retryFirst = 5 * time.Second

// renew is one pass: keep the lease, or find another when it is lost.
func (d *daemon) renew(ctx context.Context) error {
	d.mu.Lock()
	s := d.standing
	d.mu.Unlock()
	if s.Lost || s.Refused {
		if done, err := d.replace(ctx); done || s.Lost {
			return err
		}
	}
	err := d.reg.Renew(ctx, s.Lease)
	if ctx.Err() != nil {
		return nil
	}
	d.mu.Lock()
	d.now.renewError = err
	if err == nil {
		d.now.renewals++
	} else {
		d.now.renewalFailures++
	}
	d.mu.Unlock()
	switch {
	case err == nil:
		d.confirm()
	case errors.Is(err, fault.Conflict):
		d.refuse(ctx, err)
	default:
		return err
	}
	return nil
}

// confirm notes that the lease is this host's now.
func (d *daemon) confirm() {
	now := wall()
	d.mu.Lock()
	was := d.standing
	d.standing.Confirmed, d.standing.Refused = now, false
	doubt := d.doubt
	d.doubt = ""
	d.watchExpiry(d.standing)
	d.mu.Unlock()
	d.save.Kick()
	switch {
	case d.fenced(was, now):
		d.log.Info("lease confirmed: the host comes back to the overlay", "lease", was.Lease)
		d.convergence.Kick()
	case doubt != "":
		d.log.Info("lease confirmed", "lease", was.Lease)
	default:
		d.log.Debug("lease renewed", "lease", was.Lease)
	}
}

// refuse takes the host off the overlay at once: the controller says that its lease is not its own. Then it looks whether
// the subnet is another's, because a deployed controller also refuses when its database fails.
func (d *daemon) refuse(ctx context.Context, why error) {
	d.mu.Lock()
	first := !d.standing.Refused
	if first {
		d.standing.Refused, d.fencedAt, d.doubt = true, time.Now(), ""
	}
	l := d.standing.Lease
	d.mu.Unlock()
	if first {
		d.convergence.Kick()
		d.log.Error("lease is refused: the host keeps off the overlay", "lease", l, "error", why)
		d.storeLease()
	}
	if !d.another(ctx, l) {
		return
	}
	d.mu.Lock()
	d.standing.Lost = true
	d.mu.Unlock()
	d.log.Error("lease is lost: the host keeps off the overlay until its last container has gone", "lease", l)
	d.storeLease()
}

// another reports whether a lease that the controller refuses is certainly not this host's. Our own controller is believed as it
// is; it can be told from a deployed one by its watch. That one's list has to show it.
func (d *daemon) another(ctx context.Context, l lease.Lease) bool {
	_, err := d.reg.Watch(ctx, lease.Revision{})
	if _, partial := errors.AsType[*leasehttp.Partial](err); err == nil || partial {
		return true
	}
	if !errors.Is(err, fault.NotFound) {
		return false
	}
	ls, err := d.reg.Leases(ctx)
	if _, partial := errors.AsType[*leasehttp.Partial](err); err != nil && !partial {
		return false
	}
	return slices.ContainsFunc(ls, func(o lease.Lease) bool {
		return o.Underlay == l.Underlay && o != l || o.Underlay != l.Underlay && o.Subnet.Overlaps(l.Subnet)
	})
}

// replace takes a new lease once the last container of a lost one has gone. It is not done while there may be one.
func (d *daemon) replace(ctx context.Context) (done bool, err error) {
	d.mu.Lock()
	since, converged := time.Since(d.fencedAt), d.now.fenced
	d.mu.Unlock()
	if since < drainGrace || !converged { // an attachment may be on its way
		return false, nil
	}
	c := d.seen.count(ctx)
	d.noteContainers(c)
	if !c.none() {
		return false, nil
	}
	l, err := d.acquire(ctx)
	if ctx.Err() != nil {
		return true, nil
	}
	d.mu.Lock()
	d.now.renewError = err
	d.mu.Unlock()
	if err != nil {
		return true, err
	}
	d.log.Info("lease acquired in place of the lost one", "lease", l)
	d.take(Saved{Lease: l, Confirmed: wall()}, "")
	d.convergence.Kick()
	return true, nil
}

// draining looks often for the last container of a lost lease.
func (d *daemon) draining(ctx context.Context) error {
	for reconcile.Sleep(ctx, drainPoll) {
		d.mu.Lock()
		lost := d.standing.Lost // a refused lease is asked for again at the pace of renewals
		d.mu.Unlock()
		if lost {
			d.nudge()
		}
	}
	return nil
}

// saving writes the state whenever it changed, and once more at the end.
func (d *daemon) saving(ctx context.Context) error {
	err := d.save.Run(ctx)
	if err := d.writeState(context.WithoutCancel(ctx)); err != nil {
		d.log.Error("state could not be stored at the end", "error", err)
	}
	return err
}

// writeState stores the lease and the peers.
func (d *daemon) writeState(context.Context) error {
	err := errors.Join(d.writeLease(), d.writePeers())
	d.mu.Lock()
	d.now.saveError = err
	d.mu.Unlock()
	if errors.Is(err, errNoState) || errors.Is(err, errFrozen) { // the start has said so, and no attempt will change it
		return nil
	}
	return err
}

func (d *daemon) writeLease() error {
	d.saveMu.Lock()
	defer d.saveMu.Unlock()
	d.mu.Lock()
	s := d.standing
	d.mu.Unlock()
	return d.state.SetLease(s)
}

func (d *daemon) writePeers() error {
	d.saveMu.Lock()
	defer d.saveMu.Unlock()
	d.mu.Lock()
	p := d.peers.State()
	d.mu.Unlock()
	return d.state.SetPeers(p)
}
