package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// start brings the host to where the loops can take over: it looks at what is there, asks the controller, decides, and makes
// the kernel agree once.
func (d *daemon) start(ctx context.Context) error {
	if err := d.checkHost(ctx); err != nil {
		return err
	}
	f, err := d.find(ctx)
	if err != nil {
		return err
	}
	dec := Decide(f, AnswerNone)
	var refused error
	if dec.Action == ActionAsk {
		answer := AnswerRenewed
		refused = d.reg.Renew(ctx, f.Candidate())
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(refused, fault.Conflict):
			answer = AnswerConflict
		case refused != nil:
			answer = AnswerFailed
		}
		dec = Decide(f, answer)
	}
	if err := d.carryOut(ctx, f, dec, refused); err != nil {
		return err
	}
	return d.firstConvergence(ctx)
}

// checkHost refuses a host that the overlay cannot be on.
func (d *daemon) checkHost(ctx context.Context) error {
	names, err := resolvers(d.cfg.ResolvConf)
	if err != nil {
		d.log.Warn("resolvers could not be read", "error", err)
	}
	warnings, err := d.fabric.CheckHost(ctx, d.desired(Saved{}, nil, false), names)
	for _, w := range warnings {
		d.log.Warn("host has a route that contains the overlay network", "route", w)
	}
	if err != nil {
		return fmt.Errorf("check host: %w", err)
	}
	return nil
}

// find looks at the host. State that cannot be read is as good as none.
func (d *daemon) find(ctx context.Context) (Found, error) {
	f := Found{Underlay: d.cfg.Underlay(), Overlay: d.cfg.Overlay(), Bits: d.cfg.SubnetPrefixLength}
	var err error
	if f.Device, err = observeDevice(d.cfg.VTEPName, f.Overlay); err != nil {
		return f, err
	}
	if f.Saved, err = d.state.Lease(); err != nil {
		d.log.Error("saved lease could not be read", "error", err)
	}
	f.Age = AgeOf(f.Saved.Confirmed, wall(), d.cfg.tolerance())
	f.Containers = d.seen.count(ctx)
	if f.Containers.Err != nil {
		d.log.Error("containers could not be counted", "error", f.Containers.Err)
	}
	if f.Containers.Stale > 0 {
		d.log.Warn("datastore has entries without a container", "entries", f.Containers.Stale)
	}
	p, err := d.state.Peers()
	if err != nil {
		d.log.Error("saved peers could not be read", "error", err)
	}
	paths, err := d.fabric.Paths(ctx, d.cfg.VTEPName)
	if err != nil {
		return f, fmt.Errorf("observe paths: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.peers = p.Restore(d.cfg.interval())
	d.peers.Adopt(paths, wall()) // a daemon before this one made them: none is cut before there is a list
	d.now.restored = len(d.peers.Keep(wall())) > 0
	d.now.containers = f.Containers
	return f, nil
}

// carryOut does what was decided about the lease. refused is what the controller said to the candidate, if it was asked.
func (d *daemon) carryOut(ctx context.Context, f Found, dec Decision, refused error) error {
	c := f.Candidate()
	if refused != nil {
		d.log.Error("renew lease", "lease", c, "error", refused)
	}
	switch dec.Action {
	case ActionUse:
		d.log.Info("lease renewed", "lease", c)
		d.take(Saved{Lease: c, Confirmed: wall()}, "")
	case ActionDegrade, ActionSuspend:
		s := Saved{Lease: c}
		if c == f.Saved.Lease {
			s.Confirmed, s.Refused = f.Saved.Confirmed, f.Saved.Refused
		}
		d.log.Warn("starting without the controller", "lease", c, "action", dec.Action.String(), "reason", dec.Reason)
		d.take(s, dec.Reason)
	case ActionRefused:
		s := Saved{Lease: c, Refused: true, Lost: d.another(ctx, c)}
		d.log.Error("lease is refused: the host keeps off the overlay", "lease", c, "given_to_another", s.Lost, "reason", dec.Reason)
		d.take(s, "")
	case ActionFence:
		d.log.Error("lease is lost: the host keeps off the overlay until its last container has gone", "lease", c, "reason", dec.Reason)
		d.take(Saved{Lease: c, Confirmed: f.Saved.Confirmed, Lost: true}, "")
	case ActionAcquire:
		d.log.Info("acquiring a lease", "reason", dec.Reason)
		l, err := d.acquire(ctx)
		if err != nil {
			return errors.Join(err, renewalContext(refused, f))
		}
		d.log.Info("lease acquired", "lease", l)
		d.take(Saved{Lease: l, Confirmed: wall()}, "")
	default:
		return errors.New(dec.Reason)
	}
	return nil
}

// renewalContext words why a candidate was not simply kept.
func renewalContext(refused error, f Found) error {
	if refused == nil {
		return nil
	}
	return fmt.Errorf("renew subnet lease with containers: %d: %w", f.Containers.Live, refused)
}

// acquire takes a lease for this host. One that does not fit the configuration is an error.
func (d *daemon) acquire(ctx context.Context) (lease.Lease, error) {
	l, err := d.reg.Acquire(ctx, d.cfg.Underlay(), d.cfg.kind())
	if err == nil && !inside(d.cfg.Overlay(), l.Subnet) {
		err = fault.Conflictf("the controller gave %v, which is not in the overlay network %v: the two configurations disagree", l.Subnet, d.cfg.Overlay())
	}
	if err != nil {
		return lease.Lease{}, fmt.Errorf("acquire subnet lease: %w", err)
	}
	return l, nil
}

// take makes s the host's standing and stores it. doubt says why it is not confirmed. A lease that cannot be stored is held
// all the same: the loop that stores it tries again, and the info endpoint tells.
func (d *daemon) take(s Saved, doubt string) {
	d.mu.Lock()
	d.standing, d.doubt = s, doubt
	d.fencedAt = time.Time{}
	if s.Lost || s.Refused {
		d.fencedAt = time.Now()
	}
	d.watchExpiry(s)
	d.mu.Unlock()
	d.storeLease()
}

// storeLease stores the standing, now if that is possible.
func (d *daemon) storeLease() {
	err := d.writeLease()
	if err == nil {
		return
	}
	if !errors.Is(err, errNoState) && !errors.Is(err, errFrozen) {
		d.log.Error("lease could not be stored", "error", err)
	}
	d.mu.Lock()
	d.now.saveError = err
	d.mu.Unlock()
	d.save.Kick()
}

// watchExpiry wakes the convergence when the lease stops being valid. mu is held.
func (d *daemon) watchExpiry(s Saved) {
	if d.expiry != nil {
		d.expiry.Stop()
	}
	if left := s.Confirmed.Add(d.cfg.tolerance()).Sub(wall()); !s.Confirmed.IsZero() && left > 0 {
		d.expiry = time.AfterFunc(left, d.convergence.Kick)
	}
}

// firstConvergence fails only when what is configured cannot be; for the rest the loop tries again.
func (d *daemon) firstConvergence(ctx context.Context) error {
	err := d.converge(ctx)
	if err == nil || ctx.Err() != nil {
		return nil
	}
	d.mu.Lock()
	made := d.now.report.Device.Index != 0 || d.fenced(d.standing, wall())
	d.mu.Unlock()
	k := fault.Of(err)
	if !made || k == fault.Invalid || k == fault.NotFound || k == fault.Conflict {
		return fmt.Errorf("create vtep: %w", err)
	}
	d.log.Error("first convergence", "error", err)
	return nil
}

// desired returns what the kernel is to hold.
func (d *daemon) desired(s Saved, peers []lease.Lease, fenced bool) overlay.Config {
	return overlay.Config{
		Device: d.cfg.VTEPName, VNI: uint32(d.cfg.VNI), Port: uint16(d.cfg.VTEPPort), Underlay: d.cfg.Underlay(), Lower: d.cfg.VXLANInterface,
		Network: d.cfg.Overlay(), Local: s.Lease, Peers: peers, Fenced: fenced,
	}
}

// fenced reports whether the host has to keep off the overlay at a time.
func (d *daemon) fenced(s Saved, now time.Time) bool {
	return s.Lost || s.Refused || AgeOf(s.Confirmed, now, d.cfg.tolerance()) == AgeExpired
}

// local returns the subnets that containers of this host have addresses of.
func local(s Saved) []netip.Prefix { return []netip.Prefix{s.Lease.Subnet} }
