// Package dnsbench measures what answers DNS for containers beside unbound with the same names: both have the same processors, which
// whoever asks does not have, and are asked in turns.
package dnsbench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/internal/kernel"
)

const (
	names       = 100_000
	rounds      = 5
	peakTime    = 3 * time.Second // of each round and server
	pacedRounds = 9               // more, since one stall of the machine for 30 ms is a round's 99th percentile
	pacedTime   = 3 * time.Second
	tryTime     = 2 * time.Second // to find the better number of threads
	lost        = 0.001           // the part of its questions that a measurement may lose
)

var (
	oursAt   = netip.MustParseAddrPort("127.0.0.1:5300")
	theirsAt = netip.MustParseAddrPort("127.0.0.1:5301")
)

// run is one run of the benchmark.
type run struct {
	dir, queries string
	ns           *kernel.NS
	serverCPUs   []int // of both servers
	loadCPUs     []int // of who asks
}

// Run measures.
func Run(ctx context.Context, r *bench.Report) error {
	b, err := prepare()
	if err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	defer b.ns.Close()
	ours, stop, err := b.serve(ctx)
	if err != nil {
		return err
	}
	defer stop()
	theirs, err := b.unbound(ctx)
	if err != nil {
		return err
	}
	defer theirs.stop()
	return b.measure(ctx, r, ours, theirs)
}

// prepare makes the namespace and the files.
func prepare() (*run, error) {
	for _, program := range []string{"unbound", "dnsperf", "nats-server"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%w: install Debian's package of that name", err)
		}
	}
	dir, err := os.MkdirTemp("", "silk-bench-")
	if err != nil {
		return nil, err
	}
	b := &run{dir: dir, queries: filepath.Join(dir, "queries")}
	n := runtime.NumCPU()
	if n < 2 {
		return nil, errors.Join(errors.New("one processor: who asks and who answers need one each"), os.RemoveAll(dir))
	}
	for i := range n {
		if i < n/2 {
			b.serverCPUs = append(b.serverCPUs, i)
		} else {
			b.loadCPUs = append(b.loadCPUs, i)
		}
	}
	if b.ns, err = kernel.NewNS(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if err := errors.Join(loopback(b.ns), writeQueries(b.queries)); err != nil {
		return nil, errors.Join(err, b.ns.Close(), os.RemoveAll(dir))
	}
	return b, nil
}

// loopback brings the loopback device up.
func loopback(ns *kernel.NS) error {
	c, err := kernel.Dial(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b kernel.Batch
	b.Add(syscall.RTM_NEWLINK, 0, kernel.IfInfo(1, syscall.IFF_UP, syscall.IFF_UP))
	refused, err := c.Do(&b)
	for _, r := range refused {
		err = errors.Join(err, r)
	}
	return err
}

// sample is what the rounds with one server gave.
type sample struct {
	server        *process
	qps, cpu, p99 []float64 // 1/s; us of the server's for an answer; ms
	busy          []float64 // the part of its processors that the server used
	rate          []float64 // 1/s, at which p99 was measured
}

// measure asks both servers in turns: for all that they can answer, then both for half of what unbound can.
func (b *run) measure(ctx context.Context, r *bench.Report, ours, theirs *process) error {
	o, t := &sample{server: ours}, &sample{server: theirs}
	for range rounds {
		for _, s := range []*sample{o, t} {
			if err := s.peak(ctx, b); err != nil {
				return err
			}
		}
	}
	stop, err := b.awake(ctx)
	if err != nil {
		return err
	}
	defer stop()
	for range pacedRounds {
		for _, s := range []*sample{o, t} {
			if err := s.paced(ctx, b, bench.Median(t.qps)/2); err != nil {
				return err
			}
		}
	}
	r.RatioAtLeast("dns.qps", bench.Median(o.qps), "1/s", bench.Median(t.qps), 0.5)
	r.Add("dns.cpu", bench.Median(o.cpu), "us/answer", bench.Median(t.cpu))
	r.Add("dns.busy", bench.Median(o.busy), "cpus", bench.Median(t.busy))
	r.Bar("dns.p99", bench.Median(o.p99), "ms", bench.Median(t.p99), "<= 2 ms", bench.Median(o.p99) <= 2)
	r.Add("dns.p99.rate", bench.Median(o.rate), "1/s", bench.Median(t.rate))
	now, err := ours.memory("VmRSS")
	if err != nil {
		return err
	}
	most, err := ours.memory("VmHWM")
	if err != nil {
		return err
	}
	unbound, err := theirs.memory("VmRSS")
	if err != nil {
		return err
	}
	r.Bar("dns.resident", now, "MiB", unbound, "<= 120 MiB", now <= 120)
	r.Add("dns.resident.most", most, "MiB", math.NaN())
	return nil
}
