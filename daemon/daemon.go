// Package daemon is silk-daemon, the part of Silk that runs on every host: it takes the host's lease and keeps it,
// hears of its peers' leases, makes the kernel agree with them, and tells silk-cni which network the host has. Its
// Teardown is silk-teardown, which gives the lease back and removes what Silk put on the host.
//
// It decides nothing in the kernel itself (overlay and nat do) and attaches no container (endpoint does). The
// decisions it does take are pure: Decide at the start, lease.Peers about what a list of leases means.
//
// Use: Load a configuration, Run it until the context ends.
package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/nat"
	"code.cloudfoundry.org/silk/overlay"
)

const (
	watchWait   = 40 * time.Second       // of one wait for newer leases, at most; at least half of it
	kickGap     = 100 * time.Millisecond // between passes that notifications cause
	retryGap    = 250 * time.Millisecond // first pause after a pass that failed: repairs must not wait for long then either
	saveGap     = 2 * time.Second        // between writes of the state
	drainPoll   = 2 * time.Second        // between looks for the last container of a lost lease
	drainGrace  = 5 * time.Second        // an attachment that began before the lease was lost has ended by then
	lockTimeout = 10 * time.Second       // wait for the daemon before to let go of the state
)

// Run is silk-daemon: it returns nil when ctx ends, and an error when the host has no lease and cannot get one, or when what is
// configured cannot be. It leaves the VTEP, the paths and everything else in the kernel as they are. level is what the
// debug listener changes.
func Run(ctx context.Context, cfg Config, level *slog.LevelVar, log *slog.Logger) error {
	d, err := open(ctx, cfg, log)
	if err == nil {
		defer d.close()
		err = d.start(ctx)
	}
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := listen("info endpoint", cfg.HealthCheckPort)
	if err != nil {
		return err
	}
	debug, err := listen("debug server", cfg.DebugServerPort)
	if err != nil {
		info.Close()
		return err
	}
	tasks := []service.Task{
		service.Task{Name: "state", Run: d.saving},
		service.Task{Name: "convergence", Run: d.convergence.Run},
		service.Task{Name: "kernel-watch", Run: d.watching(d.fabric.Watch)},
		service.Task{Name: "nat-watch", Run: d.watching(func(ctx context.Context, changed func()) error { return nat.Watch(ctx, nil, changed) })},
		service.Task{Name: "lease-watch", Run: d.hearing},
		service.Task{Name: "renewal", Run: d.renewing},
		service.Task{Name: "drain", Run: d.draining},
		service.HTTP("info", info, nil, infoHandler(d.view, d.metrics()), service.DefaultLimits, log),
		service.HTTP("debug", debug, nil, service.Debug(level), debugLimits, log),
	}
	if aside, err := net.Listen("unix", kernel.Beside(cfg.HealthCheckPort)); err != nil {
		log.Error("silk-cni has to ask the info endpoint, which takes longer", "error", err)
	} else {
		tasks = append(tasks, service.Aside("network", aside, func() any { return d.view().network }, log))
	}
	return service.Run(ctx, log, tasks...)
}

// debugLimits leave time for a profile of a minute.
var debugLimits = service.Limits{Header: 5 * time.Second, Body: 15 * time.Second, Write: 5 * time.Minute, Idle: 2 * time.Minute}

func listen(what string, port int) (net.Listener, error) {
	ln, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return ln, nil
}

// portsFree finds out before anything is touched whether another program has the ports: a second daemon, most likely. They
// are not kept, because who connects before there is a lease is to be refused.
func portsFree(cfg Config) error {
	for what, port := range map[string]int{"info endpoint": cfg.HealthCheckPort, "debug server": cfg.DebugServerPort} {
		ln, err := listen(what, port)
		if err != nil {
			return err
		}
		ln.Close()
	}
	return nil
}

// daemon is the running program. What its loops share is below mu; they never hold it while they wait for anything.
type daemon struct {
	cfg     Config
	log     *slog.Logger
	reg     lease.Registry
	fabric  *overlay.Fabric
	seen    attachments
	reaper  endpoint.Reaper // the convergence's
	reaped  time.Time
	sysctls *kernel.Sysctls
	state   State
	closers []func() error

	convergence *reconcile.Loop
	renewal     *reconcile.Loop
	save        *reconcile.Loop
	nudged      chan struct{} // ends the wait for the first renewal

	saveMu sync.Mutex // held while what is below mu is read and stored, so that the newer is stored last

	mu       sync.Mutex
	standing Saved
	fencedAt time.Time // when the verdict on a lost or refused lease came
	doubt    string    // why the start did not get the controller's word; empty once it came
	expiry   *time.Timer
	peers    *lease.Peers
	now      progress
}

// progress is what the loops last did, for the info endpoint and the metrics.
type progress struct {
	renewals, renewalFailures uint64
	renewError                error // of the last renewal
	heard                     time.Time
	asked                     time.Time // when the attempt to hear that is under way began
	hearFailures              uint64
	hearError                 error
	listed                    int // leases of the last list, the host's own among them
	partial                   int // leases of it that could not be used
	restored                  bool
	looked                    time.Time   // when the kernel was last looked at as a whole
	converged                 lease.Lease // what the kernel was last made to agree with
	fenced                    bool        // the kernel was last made to
	convergeError             error
	tuneError                 error
	saveError                 error
	report                    overlay.Report
	peers                     int // other hosts that the kernel has paths to
	mtu                       int
	containers                Containers
	beats                     map[string]time.Time // when a loop last ended a pass
}

// open prepares everything that needs no controller, and changes nothing but the state and endpoint directories.
func open(ctx context.Context, cfg Config, log *slog.Logger) (*daemon, error) {
	d := &daemon{cfg: cfg, log: log, nudged: make(chan struct{}, 1)}
	d.now.beats = map[string]time.Time{}
	if err := d.open(ctx); err != nil {
		d.close()
		return nil, err
	}
	d.convergence = &reconcile.Loop{Name: "convergence", Step: d.beat("convergence", d.converge), Log: log, Resync: cfg.interval(), MinGap: kickGap, Retry: retryGap}
	d.renewal = d.renewalLoop(d.renew)
	d.save = &reconcile.Loop{Name: "state", Step: d.writeState, Log: log, MinGap: saveGap}
	return d, nil
}

func (d *daemon) open(ctx context.Context) error {
	tc, err := d.cfg.certificates().Client()
	if err != nil {
		return fmt.Errorf("create tls config: %w", err)
	}
	client := leasehttp.NewClient(d.cfg.ConnectivityServerURL, tc, leasehttp.ClientOptions{
		Timeout: d.cfg.timeout(), Wait: watchWait/2 + spread(watchWait/2), Traceparent: os.Getenv("TRACEPARENT"),
	})
	d.reg = client
	d.closers = append(d.closers, func() error { client.Close(); return nil })
	if err := d.openState(ctx); err != nil {
		return err
	}
	if d.fabric, err = overlay.Open(nil); err != nil {
		return err
	}
	d.closers = append(d.closers, d.fabric.Close)
	d.seen.datastore = d.cfg.Datastore
	records, err := endpoint.Open(d.cfg.EndpointDir)
	if err != nil { // containers still count by their devices
		d.log.Error("endpoint directory cannot be used", "error", err)
		return portsFree(d.cfg)
	}
	d.seen.records, d.sysctls = records, records.Sysctls()
	d.reaper = endpoint.Reaper{Dir: records, Grace: reapGrace}
	return portsFree(d.cfg)
}

// openState opens the state directory and takes the lock that keeps a second daemon away. Without a directory, as in a
// deployment that does not know of it, the daemon runs but says so.
func (d *daemon) openState(ctx context.Context) error {
	state, err := OpenState(d.cfg.StateDir)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(filepath.Join(d.cfg.StateDir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err != nil {
		d.log.Error("state directory cannot be used: a restart without the controller will not know this host's lease and peers", "error", err)
		if _, err := os.Stat(d.cfg.StateDir); err == nil { // what is there still counts, above all a lease that is lost
			d.state = State{dir: d.cfg.StateDir, frozen: true}
		}
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	if err := kernel.Flock(wait, f); err != nil {
		f.Close()
		return fmt.Errorf("open state directory: is another silk-daemon running with it? %w", err)
	}
	d.state = state
	d.closers = append(d.closers, f.Close)
	return nil
}

// close lets go of everything in reverse order.
func (d *daemon) close() {
	d.mu.Lock()
	if d.expiry != nil {
		d.expiry.Stop()
	}
	d.mu.Unlock()
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

// beat wraps a loop's pass so that the info endpoint can tell whether the loop still turns.
func (d *daemon) beat(name string, step func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		err := step(ctx)
		d.beaten(name)
		return err
	}
}

func (d *daemon) beaten(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now.beats[name] = time.Now()
}

// wall returns the time by the wall clock only, as state and leases are dated.
func wall() time.Time { return time.Now().Round(0) }

// spread returns a random part of d, so that hosts which start together do not stay together.
func spread(d time.Duration) time.Duration { return rand.N(d + 1) }

// watching returns a task that wakes the convergence whenever watch tells that somebody changed what it looks after.
func (d *daemon) watching(watch func(context.Context, func()) error) func(context.Context) error {
	return func(ctx context.Context) error {
		for failures := 1; ctx.Err() == nil; failures++ {
			err := watch(ctx, d.convergence.Kick)
			if ctx.Err() != nil {
				break
			}
			pause := reconcile.Backoff(time.Second, time.Minute, failures)
			d.log.Error("watch on the kernel ended", "error", err, "retry_in", pause)
			d.convergence.Kick()
			reconcile.Sleep(ctx, pause)
		}
		return nil
	}
}
