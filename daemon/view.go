package daemon

import (
	"fmt"
	"time"
)

// view returns what the info endpoint tells now.
func (d *daemon) view() view {
	now := wall()
	d.mu.Lock()
	defer d.mu.Unlock()
	s, p := d.standing, d.now
	reasons, fenced := d.troubles(now), d.fenced(s, now)
	status := StatusReady
	switch {
	case fenced:
		status = StatusFenced
	case p.converged != s.Lease || p.fenced:
		status = StatusStarting
		reasons = append(reasons, "the kernel does not hold the lease yet")
	case len(reasons) > 0:
		status = StatusDegraded
	}
	stuck := d.stuck()
	v := view{
		network: Network{OverlaySubnet: s.Lease.Subnet.String(), OverlayNetwork: d.cfg.Overlay().String(), MTU: p.mtu, VTEP: d.cfg.VTEPName, Status: status},
		health:  Health{Status: status, Reasons: append(reasons, stuck...), Peers: p.peers},
		ready:   (status == StatusReady || status == StatusDegraded) && (p.restored || !p.heard.IsZero()),
		alive:   len(stuck) == 0,
	}
	if len(v.health.Reasons) > 0 {
		v.network.Reason = v.health.Reasons[0]
	}
	return v
}

// troubles words what is not as it should be, the worst first. mu is held.
func (d *daemon) troubles(now time.Time) []string {
	s, p := d.standing, d.now
	late := 3 * d.cfg.interval()
	var r []string
	add := func(format string, args ...any) { r = append(r, fmt.Sprintf(format, args...)) }
	switch age := AgeOf(s.Confirmed, now, d.cfg.tolerance()); {
	case s.Lost:
		add("fenced: the lease of %v is another host's: %d containers keep each other and the way out, not the overlay; when the last has gone a new lease is taken",
			s.Lease.Subnet, p.containers.Live)
	case s.Refused:
		add("fenced: the controller refuses to renew the lease of %v: %d containers keep each other and the way out, not the overlay", s.Lease.Subnet, p.containers.Live)
	case age == AgeExpired:
		add("fenced: the lease of %v was last confirmed %v, longer ago than partition_tolerance_seconds: it may be another host's", s.Lease.Subnet, s.Confirmed.UTC().Format(time.RFC3339))
	case d.doubt != "":
		add("unconfirmed: %s", d.doubt)
	case age == AgeUnknown:
		add("unconfirmed: the clock went back behind the last confirmation of the lease, %v", s.Confirmed.UTC().Format(time.RFC3339))
	case now.Sub(s.Confirmed) > late:
		add("unconfirmed: the lease was last confirmed %v", s.Confirmed.UTC().Format(time.RFC3339))
	}
	if len(r) > 0 && p.renewError != nil {
		add("renewal: %v", p.renewError)
	}
	// A controller that lets us wait is there: one that is not fails sooner.
	waiting := time.Since(p.asked) > d.cfg.timeout()+time.Second
	switch {
	case !p.heard.IsZero() && time.Since(p.heard) > late+watchWait+d.cfg.timeout():
		add("lagging: leases of peers were last heard %v", p.heard.UTC().Format(time.RFC3339))
	case p.heard.IsZero() && p.hearError != nil && !waiting:
		add("lagging: no leases of peers heard since the start: %v", p.hearError)
	}
	if p.partial > 0 {
		add("lagging: %d leases of peers cannot be used", p.partial)
	}
	if p.convergeError != nil {
		add("convergence: %v", p.convergeError)
	}
	if p.tuneError != nil {
		add("sysctls: %v", p.tuneError)
	}
	if p.saveError != nil {
		add("state: %v", p.saveError)
	}
	if p.containers.Err != nil {
		add("containers: %v", p.containers.Err)
	}
	return r
}

// stuckAfter is how long a loop may take for one pass beyond the time it waits.
const stuckAfter = 2 * time.Minute

// stuck words which loops have stopped turning. mu is held.
func (d *daemon) stuck() []string {
	var r []string
	for _, l := range []struct {
		name string
		idle time.Duration
	}{{"convergence", d.cfg.interval()}, {"renewal", d.cfg.interval()}, {"lease-watch", d.cfg.interval() + watchWait}} {
		if last, ok := d.now.beats[l.name]; ok && time.Since(last) > l.idle*2+d.cfg.timeout()+stuckAfter {
			r = append(r, fmt.Sprintf("stuck: the %s loop last ended a pass %v", l.name, last.UTC().Format(time.RFC3339)))
		}
	}
	return r
}
