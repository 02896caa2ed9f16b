// Package overlay measures how fast the overlay's paths get into the kernel and what keeping them there costs.
//
// Everything happens in namespaces of its own. The baseline is the same objects sent packed by a program that knows
// what to send and looks at nothing.
package overlay

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// Run measures the bars of the overlay: from nothing to 10,000 and 65,000 peers, one peer more or less, an unchanged
// cycle, the memory of a process that holds an overlay, and how soon a deleted route is back.
func Run(ctx context.Context, r *bench.Report) error {
	for _, m := range []func(context.Context, *bench.Report) error{
		func(ctx context.Context, r *bench.Report) error { return fromNothing(ctx, r, 10_000, 5, 400) },
		func(ctx context.Context, r *bench.Report) error { return fromNothing(ctx, r, 65_000, 3, 2500) },
		steady,
		memory,
	} {
		if err := m(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// config is a host in an overlay of 10.0.0.0/8 with n peers that hold a /26 each.
func config(n int) overlay.Config {
	c := overlay.Config{
		Device: "silk-vtep", VNI: 1, Port: 4789,
		Underlay: netip.MustParseAddr("192.168.16.15"),
		Network:  netip.MustParsePrefix("10.0.0.0/8"),
		Local:    lease.Lease{Underlay: netip.MustParseAddr("192.168.16.15"), Subnet: netip.MustParsePrefix("10.255.30.0/26")},
		Peers:    make([]lease.Lease, n),
	}
	c.Local.MAC = lease.MACOf(c.Local.Subnet)
	for i := range c.Peers {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte((i + 4) >> 10), byte((i + 4) >> 2), byte((i + 4) << 6)}), 26)
		c.Peers[i] = lease.Lease{Underlay: netip.AddrFrom4([4]byte{172, 16 + byte(i>>16), byte(i >> 8), byte(i)}), Subnet: p, MAC: lease.MACOf(p)}
	}
	return c
}

// fromNothing times the Set that makes everything, with a Watch listening as in the daemon.
func fromNothing(ctx context.Context, r *bench.Report, n, rounds int, limit float64) error {
	c := config(n)
	var ours, raw []float64
	for range rounds {
		for _, m := range []struct {
			times *[]float64
			run   func(context.Context, *kernel.NS, overlay.Config) (float64, error)
		}{{&raw, timeRaw}, {&ours, timeSet}} {
			ns, err := host()
			if err != nil {
				return err
			}
			ms, err := m.run(ctx, ns, c)
			ns.Close()
			if err != nil {
				return err
			}
			*m.times = append(*m.times, ms)
		}
	}
	value := bench.Median(ours)
	r.Bar(fmt.Sprintf("overlay.set.%d.from_nothing", n), value, "ms", bench.Median(raw), fmt.Sprintf("<= %g ms", limit), value <= limit)
	return nil
}

func timeSet(ctx context.Context, ns *kernel.NS, c overlay.Config) (ms float64, err error) {
	f, err := overlay.Open(ns)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	stop, err := watch(ctx, f, func() {})
	if err != nil {
		return 0, err
	}
	ms, err = bench.Millis(func() error { _, err := f.Set(ctx, c); return err })
	// Taken away at once, so that the kernel is not still at it during the next round.
	return ms, errors.Join(err, stop(), f.Remove(ctx, c.Device))
}

// watch runs a Watch until stop is called.
func watch(ctx context.Context, f *overlay.Fabric, changed func()) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	listening, done := make(chan struct{}), make(chan error, 1)
	var once sync.Once
	go func() {
		done <- f.Watch(ctx, func() { once.Do(func() { close(listening) }); changed() })
	}()
	select {
	case <-listening:
		return func() error { cancel(); return <-done }, nil
	case err := <-done:
		cancel()
		return nil, err
	}
}

// steady measures what is asked of a host with 10,000 peers all day.
func steady(ctx context.Context, r *bench.Report) error {
	const n = 10_000
	ns, err := host()
	if err != nil {
		return err
	}
	defer ns.Close()
	f, err := overlay.Open(ns)
	if err != nil {
		return err
	}
	defer f.Close()
	c := config(n + 1)
	less := c
	less.Peers = append(c.Peers[:n/2:n/2], c.Peers[n/2+1:]...)
	for range 2 { // the second proves that all is right
		if _, err := f.Set(ctx, less); err != nil {
			return err
		}
	}
	if err := oneMoreOrLess(ctx, r, f, ns, c, less); err != nil {
		return err
	}
	if err := unchanged(ctx, r, f, ns, less); err != nil {
		return err
	}
	if err := repair(ctx, r, f, ns, less); err != nil {
		return err
	}
	return f.Remove(ctx, c.Device)
}

func oneMoreOrLess(ctx context.Context, r *bench.Report, f *overlay.Fabric, ns *kernel.NS, more, less overlay.Config) error {
	raw, err := newSender(ns)
	if err != nil {
		return err
	}
	defer raw.close()
	if err := raw.find(more.Device); err != nil {
		return err
	}
	extra := more.Peers[len(less.Peers)/2 : len(less.Peers)/2+1]
	var up, down, rawUp, rawDown []float64
	for range 50 {
		for _, m := range []struct {
			times *[]float64
			run   func() error
		}{
			{&up, func() error { _, err := f.Set(ctx, more); return err }},
			{&down, func() error { _, err := f.Set(ctx, less); return err }},
			{&rawUp, func() error { return raw.paths(more, extra, true) }},
			{&rawDown, func() error { return raw.paths(more, extra, false) }},
		} {
			ms, err := bench.Millis(m.run)
			if err != nil {
				return err
			}
			*m.times = append(*m.times, ms)
		}
		for range 2 { // the baseline was somebody else's change: look, and find all well
			if _, err := f.Set(ctx, less); err != nil {
				return err
			}
		}
	}
	for _, m := range []struct {
		name      string
		ours, raw []float64
	}{{"one_more", up, rawUp}, {"one_less", down, rawDown}} {
		v := bench.Median(m.ours)
		r.Bar("overlay.set.10000."+m.name, v, "ms", bench.Median(m.raw), "<= 5 ms", v <= 5)
		r.Add("overlay.set.10000."+m.name+".p95", bench.Percentile(m.ours, 0.95), "ms", math.NaN())
	}
	return nil
}

// unchanged measures the CPU time, the kernel's included, of a Set that looks at everything and finds nothing to do, and
// of one that knows that nothing was touched.
func unchanged(ctx context.Context, r *bench.Report, f *overlay.Fabric, ns *kernel.NS, c overlay.Config) error {
	raw, err := newSender(ns)
	if err != nil {
		return err
	}
	defer raw.close()
	if err := raw.find(c.Device); err != nil {
		return err
	}
	cycle := func(look bool) func() error {
		return func() error {
			if look {
				f.Forget()
			}
			rep, err := f.Set(ctx, c)
			if err == nil && (rep.Changed != 0 || rep.Full != look) {
				err = fmt.Errorf("an unchanged cycle did %d requests, full %v", rep.Changed, rep.Full)
			}
			return err
		}
	}
	var looks, dumps, knows []float64
	for range 15 {
		for _, m := range []struct {
			times *[]float64
			run   func() error
		}{{&looks, cycle(true)}, {&dumps, raw.dumps}, {&knows, cycle(false)}} {
			before := cpu()
			if err := m.run(); err != nil {
				return err
			}
			*m.times = append(*m.times, cpu()-before)
		}
	}
	v := bench.Median(looks)
	r.Bar("overlay.set.10000.unchanged.cpu", v, "ms", bench.Median(dumps), "<= 50 ms", v <= 50)
	r.Add("overlay.set.10000.undisturbed.cpu", bench.Median(knows), "ms", math.NaN())
	return nil
}

// cpu returns the CPU time that this process has used, in milliseconds.
func cpu() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return math.NaN()
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6
}

// repair measures how long a deleted route is away while a loop keeps the overlay.
func repair(ctx context.Context, r *bench.Report, f *overlay.Fabric, ns *kernel.NS, c overlay.Config) error {
	raw, err := newSender(ns)
	if err != nil {
		return err
	}
	defer raw.close()
	if err := raw.find(c.Device); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	passed := make(chan overlay.Report, 1)
	loop := &reconcile.Loop{Name: "overlay", Step: func(ctx context.Context) error {
		rep, err := f.Set(ctx, c)
		if err == nil && rep.Changed > 0 {
			passed <- rep
		}
		return err
	}}
	stop, err := watch(ctx, f, loop.Kick)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- loop.Run(ctx) }()
	var away []float64
	for i := range 20 {
		ms, err := bench.Millis(func() error {
			if err := raw.dropRoute(c, c.Peers[i*7]); err != nil {
				return err
			}
			select {
			case <-passed:
				return nil
			case <-time.After(10 * time.Second):
				return errors.New("a deleted route did not come back within 10 s")
			}
		})
		if err != nil {
			return err
		}
		away = append(away, ms)
	}
	cancel()
	v := bench.Percentile(away, 1)
	r.AtMost("overlay.repair.10000.worst", v, "ms", 1000)
	return errors.Join(stop(), <-done)
}

// holderVariable makes Hold turn a process into one that holds an overlay.
const holderVariable = "SILK_BENCH_OVERLAY_HOLD"

// Hold does what a child process that Run starts must do, if this is one, and reports whether it was. main calls it first.
func Hold() bool {
	n := 0
	if _, err := fmt.Sscan(os.Getenv(holderVariable), &n); err != nil {
		return false
	}
	if err := hold(n); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}
