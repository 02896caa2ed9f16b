// Package tlsbench measures silk-tls beside haproxy of the distribution, which ends the same TLS in the same container: a client in one container, the
// proxy's port and the application in another, both attached to a host by package endpoint. Both proxies have the same certificate (ECDSA P-256), the
// same suite (AES-128-GCM), the same curve and all CPUs; haproxy has as many threads as there are CPUs. Client and application are the same for both, and share the
// CPUs with them, so what a proxy itself computes is shown as well.
package tlsbench

import (
	"context"
	"crypto/tls"
	"fmt"
	"math"
	"os"
	"os/exec"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/bench"
)

const (
	rounds    = 5
	streamFor = 2 * time.Second
	shakeFor  = 2 * time.Second
	callers   = 4 // that do handshakes at once
	idle      = 10_000
)

// Run adds the room's figures to r.
func Run(ctx context.Context, r *bench.Report) error {
	w, err := newWorld(ctx)
	if w != nil {
		defer w.close()
	}
	if err != nil {
		return err
	}
	for _, m := range []struct {
		name, unit, cpu, cpuUnit string
		do                       func(context.Context, *proxy) (sample, error)
	}{
		{"tls.stream.down", "MiB/s", "tls.stream.down.cpu", "ms/GiB", w.stream('d')},
		{"tls.stream.up", "MiB/s", "tls.stream.up.cpu", "ms/GiB", w.stream('u')},
		{"tls.handshakes.1.3", "1/s", "tls.handshakes.1.3.cpu", "ms", w.handshakes(tls.VersionTLS13, tls.X25519)},
		{"tls.handshakes.1.2", "1/s", "tls.handshakes.1.2.cpu", "ms", w.handshakes(tls.VersionTLS12, tls.CurveP256)},
	} {
		ours, theirs, err := w.alternate(ctx, m.do)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		r.Add(m.name, median(ours, sample.rate), m.unit, median(theirs, sample.rate))
		r.Add(m.cpu, median(ours, sample.cost), m.cpuUnit, median(theirs, sample.cost))
	}
	// What clients get that can: haproxy's library has no such key exchange.
	var hybrid []sample
	for range rounds {
		s, err := w.handshakes(tls.VersionTLS13, tls.X25519MLKEM768)(ctx, w.silk)
		if err != nil {
			return err
		}
		hybrid = append(hybrid, s)
	}
	r.Add("tls.handshakes.1.3.mlkem", median(hybrid, sample.rate), "1/s", math.NaN())
	return w.idle(ctx, r)
}

// sample is what one round found: how much was done, in what time, and what the proxy computed for it.
type sample struct {
	done float64 // MiB or handshakes
	took time.Duration
	cpu  time.Duration
	unit float64 // what cpu is shown for: 1024 MiB, or one handshake
}

func (s sample) rate() float64 { return s.done / s.took.Seconds() }
func (s sample) cost() float64 { return float64(s.cpu) / 1e6 / s.done * s.unit }

func median(list []sample, of func(sample) float64) float64 {
	values := make([]float64, 0, len(list))
	for _, s := range list {
		values = append(values, of(s))
	}
	return bench.Median(values)
}

// alternate measures both proxies by turns, after a round that does not count.
func (w *world) alternate(ctx context.Context, do func(context.Context, *proxy) (sample, error)) (ours, theirs []sample, err error) {
	for n := range rounds + 1 {
		for _, p := range []*proxy{w.silk, w.haproxy} {
			s, err := do(ctx, p)
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w", p.name, err)
			}
			switch {
			case n == 0:
			case p == w.silk:
				ours = append(ours, s)
			default:
				theirs = append(theirs, s)
			}
		}
	}
	return ours, theirs, nil
}

// stream sends bytes over one connection, from the application ('d') or to it ('u').
func (w *world) stream(way byte) func(context.Context, *proxy) (sample, error) {
	return func(ctx context.Context, p *proxy) (sample, error) {
		c, err := w.secure(ctx, p, tls.VersionTLS13, tls.X25519)
		if err != nil {
			return sample{}, err
		}
		defer c.Close()
		if _, err := c.Write([]byte{way}); err != nil {
			return sample{}, err
		}
		before, err := p.cpu()
		if err != nil {
			return sample{}, err
		}
		b := make([]byte, 256<<10)
		start, done := time.Now(), 0
		for time.Since(start) < streamFor {
			var n int
			if way == 'd' {
				n, err = c.Read(b)
			} else {
				n, err = c.Write(b)
			}
			if err != nil {
				return sample{}, err
			}
			done += n
		}
		took := time.Since(start)
		after, err := p.cpu()
		return sample{done: float64(done) / (1 << 20), took: took, cpu: after - before, unit: 1024}, err
	}
}

// handshakes makes connections, each with a full handshake, and breaks them off.
func (w *world) handshakes(version uint16, curve tls.CurveID) func(context.Context, *proxy) (sample, error) {
	return func(ctx context.Context, p *proxy) (sample, error) {
		before, err := p.cpu()
		if err != nil {
			return sample{}, err
		}
		start := time.Now()
		done, errs := make([]int, callers), make([]error, callers)
		var wg sync.WaitGroup
		for k := range callers {
			wg.Go(func() {
				for time.Since(start) < shakeFor && errs[k] == nil {
					c, err := w.secure(ctx, p, version, curve)
					if err == nil { // one byte there and back: the whole way stands
						if _, err = c.Write([]byte{'e'}); err == nil {
							_, err = c.Read(make([]byte, 1))
						}
						breakOff(c)
					}
					errs[k] = err
					done[k]++
				}
			})
		}
		wg.Wait()
		took := time.Since(start)
		sum := 0
		for k := range callers {
			if errs[k] != nil {
				return sample{}, errs[k]
			}
			sum += done[k]
		}
		after, err := p.cpu()
		return sample{done: float64(sum), took: took, cpu: after - before, unit: 1}, err
	}
}

// idle measures what connections take over which nothing moves, of which there are as many as this process may have.
func (w *world) idle(ctx context.Context, r *bench.Report) error {
	n := min(idle, descriptors()/2-200)
	each := map[*proxy]float64{}
	for _, p := range []*proxy{w.silk, w.haproxy} {
		if err := p.settle(); err != nil {
			return err
		}
		before, err := p.resident()
		if err != nil {
			return err
		}
		conns := make([]*tls.Conn, n)
		errs := make([]error, callers)
		var wg sync.WaitGroup
		for k := range callers {
			wg.Go(func() {
				for i := k; i < n && errs[k] == nil; i += callers {
					if conns[i], errs[k] = w.secure(ctx, p, tls.VersionTLS13, tls.X25519); errs[k] == nil {
						if _, errs[k] = conns[i].Write([]byte{'e'}); errs[k] == nil {
							_, errs[k] = conns[i].Read(make([]byte, 1))
						}
					}
				}
			})
		}
		wg.Wait()
		if err := p.settle(); err != nil {
			return err
		}
		after, err := p.resident()
		for _, c := range conns {
			if c != nil {
				breakOff(c)
			}
		}
		for _, e := range append(errs, err) {
			if e != nil {
				return fmt.Errorf("%s: %d idle connections: %w", p.name, n, e)
			}
		}
		each[p] = float64(after-before) / 1024 / float64(n)
	}
	r.Add("tls.idle.connections", float64(n), "", math.NaN())
	r.Add("tls.idle.resident.each", each[w.silk], "KiB", each[w.haproxy])
	return nil
}

// childVariable makes Child turn a process into a part of a measurement.
const childVariable = "SILK_BENCH_TLS_CHILD"

// Child is to be called first by main: it reports whether the process was a part of a measurement.
func Child() bool {
	var role, what string
	if _, err := fmt.Sscan(os.Getenv(childVariable), &role, &what); err != nil {
		return false
	}
	serve := application
	if role == "proxy" {
		serve = silk
	}
	if err := serve(what); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// needHaproxy reports that there is nothing to compare with.
func needHaproxy() (string, error) {
	path, err := exec.LookPath("haproxy")
	if err != nil {
		return "", fmt.Errorf("haproxy is the baseline of this room: install it with make deps: %w", err)
	}
	return path, nil
}
