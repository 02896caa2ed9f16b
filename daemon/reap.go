package daemon

import "time"

const (
	reapInterval = time.Minute     // between two looks for dead endpoints
	reapGrace    = 5 * time.Minute // for the runtime to detach a dead container itself
)

// reap forgets endpoints of containers that died without their runtime's saying so. Their addresses would be taken until the next
// boot: few runtimes ask for a GC.
func (d *daemon) reap(now time.Time) {
	if d.reaper.Dir == nil || now.Sub(d.reaped) < reapInterval {
		return
	}
	d.reaped = now
	n, err := d.reaper.Pass(now)
	if n > 0 {
		d.log.Info("endpoints of dead containers forgotten", "count", n)
	}
	if err != nil {
		d.log.Warn("some endpoints could not be looked at", "error", err)
	}
}
