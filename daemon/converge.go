package daemon

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/nat"
	"code.cloudfoundry.org/silk/overlay"
)

// lookInterval is how long the overlay may trust the kernel's notifications before it looks at everything again.
const lookInterval = 5 * time.Minute

// converge is one pass: make the kernel agree with the lease and the peers as they are now.
func (d *daemon) converge(ctx context.Context) error {
	now := wall()
	d.mu.Lock()
	s := d.standing
	peers := d.peers.Keep(now)
	was := d.now
	d.mu.Unlock()
	fenced := d.fenced(s, now)

	if time.Since(was.looked) > lookInterval {
		d.fabric.Forget()
	}
	report, err := d.fabric.Set(ctx, d.desired(s, peers, fenced))
	if ctx.Err() != nil {
		return nil
	}
	nerr := nat.Set(ctx, nil, nat.Config{Local: local(s), NoMasquerade: []netip.Prefix{d.cfg.noMasquerade()}, VTEP: d.cfg.VTEPName})
	terr := tuneHost(d.sysctls, s.Lease.Subnet)
	aside, cancel := context.WithTimeout(ctx, countAside)
	defer cancel()
	perr := d.restorePorts(aside)
	c := d.seen.count(aside)

	d.mu.Lock()
	d.now.report, d.now.convergeError, d.now.tuneError = report, errors.Join(err, nerr, perr), terr
	if report.Full {
		d.now.looked = time.Now()
	}
	if report.Device.MTU != 0 {
		d.now.mtu = report.Device.MTU
	}
	if report.Device.Index != 0 && (err == nil || report.Failed > 0) { // a refused peer does not spoil the rest
		d.now.converged, d.now.fenced, d.now.peers = s.Lease, fenced, reachable(s, peers, fenced, report)
	}
	d.mu.Unlock()
	d.noteContainers(c)
	d.reap(time.Now())
	d.tell(was, report, fenced)
	if terr != nil && (was.tuneError == nil || was.tuneError.Error() != terr.Error()) {
		d.log.Error("sysctls could not be set", "error", terr)
	}
	return errors.Join(err, nerr, perr)
}

// restorePorts puts back what somebody took away of the containers' port maps.
func (d *daemon) restorePorts(ctx context.Context) error {
	if d.reaper.Dir == nil {
		return nil
	}
	n, err := d.reaper.Dir.RestorePorts(ctx)
	if n > 0 {
		d.log.Info("port maps restored", "changed", n)
	}
	return err
}

// reachable returns to how many other hosts a pass has made paths.
func reachable(s Saved, peers []lease.Lease, fenced bool, r overlay.Report) int {
	if fenced {
		return 0
	}
	n := 0
	for _, l := range peers {
		if l.Underlay != s.Lease.Underlay {
			n++
		}
	}
	return max(n-len(r.Skipped), 0)
}

// tell logs what changed since the pass before.
func (d *daemon) tell(was progress, report overlay.Report, fenced bool) {
	if report.Changed > 0 {
		d.log.Info("overlay converged", "desired", report.Desired, "observed", report.Observed, "changed", report.Changed, "failed", report.Failed)
	}
	if !slices.Equal(was.report.Skipped, report.Skipped) {
		for _, s := range report.Skipped[:min(len(report.Skipped), maxTold)] {
			d.log.Warn("peer skipped", "lease", s.Lease, "reason", s.Reason)
		}
		d.log.Info("peers skipped", "count", len(report.Skipped), "non_routable", report.NonRoutable)
	}
	if fenced != was.fenced {
		d.log.Warn("overlay fence changed", "fenced", fenced)
	}
}

// maxTold bounds how many of many similar things are logged.
const maxTold = 10

// noteContainers remembers a count, and warns when the subnet fills up.
func (d *daemon) noteContainers(c Containers) {
	d.mu.Lock()
	was, size := d.now.containers, usable(d.standing)
	d.now.containers = c
	d.mu.Unlock()
	before, after := fullness(was.Live, size), fullness(c.Live, size)
	if after > before {
		d.log.Warn("subnet fills up", "used", c.Live, "size", size, "percent", after)
	}
}

// fullness returns the highest of 70, 85 and 95 percent that used has reached, 0 if none.
func fullness(used, size int) int {
	for _, p := range []int{95, 85, 70} {
		if size > 0 && used*100 >= size*p {
			return p
		}
	}
	return 0
}

// usable returns how many containers can have an address of the lease: all addresses but the first, the VTEP's.
func usable(s Saved) int {
	if !s.Lease.Subnet.IsValid() || s.Lease.Subnet.IsSingleIP() {
		return 0
	}
	return 1<<(32-s.Lease.Subnet.Bits()) - 1
}
