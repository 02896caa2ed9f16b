package dnsbench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"code.cloudfoundry.org/silk/bench"
)

// process is a server.
type process struct {
	at   netip.AddrPort
	cmd  *exec.Cmd
	said *bytes.Buffer
	gone chan struct{}
}

// start runs a program in the namespace on some processors, until stop, and returns when it answers.
func (b *run) start(ctx context.Context, cpus []int, at netip.AddrPort, cmd *exec.Cmd) (*process, error) {
	p, err := b.begin(cpus, at, cmd)
	if err != nil {
		return nil, err
	}
	if err := b.ready(ctx, p); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// begin is start that does not wait for answers.
func (b *run) begin(cpus []int, at netip.AddrPort, cmd *exec.Cmd) (*process, error) {
	p := &process{at: at, cmd: cmd, said: &bytes.Buffer{}, gone: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.said, p.said
	cmd.SysProcAttr = &unix.SysProcAttr{}
	if err := b.pinned(cpus, cmd.Start); err != nil {
		return nil, err
	}
	go func() { cmd.Wait(); close(p.gone) }()
	return p, nil
}

// ready waits until the server answers, and warms it up.
func (b *run) ready(ctx context.Context, p *process) error {
	if err := b.await(ctx, p); err != nil {
		return fmt.Errorf("%w: %s", err, p.said)
	}
	if _, err := b.dnsperf(ctx, p.at, time.Second); err != nil { // one thread of several may come late
		fmt.Fprintf(os.Stderr, "%v while it starts: %v\n", p.at, err)
	}
	return nil
}

// pinned calls f in the namespace on a thread that has these processors; what it starts has them as well.
func (b *run) pinned(cpus []int, f func() error) error {
	return b.ns.Do(func() error {
		var set unix.CPUSet
		for _, c := range cpus {
			set.Set(c)
		}
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("choose processors: %w", err)
		}
		return f()
	})
}

// await returns when the server answers a question.
func (b *run) await(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if answered, err := b.pace(ctx, p.at, 100, 50*time.Millisecond); err == nil && answered.Rate > 0 && answered.Lost == 0 {
			tick.Stop()
			return nil
		}
		select {
		case <-tick.C:
		case <-p.gone:
			tick.Stop()
			return errors.New("the server ended")
		case <-ctx.Done():
			tick.Stop()
			return fmt.Errorf("the server does not answer: %w", ctx.Err())
		}
	}
}

func (p *process) stop() {
	p.cmd.Process.Kill()
	<-p.gone
}

// cpu returns the seconds that the server has computed.
func (p *process) cpu() (float64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^p.cmd.Process.Pid<<3|2), &ts); err != nil {
		return 0, fmt.Errorf("clock of the server: %w", err)
	}
	return float64(ts.Nano()) / 1e9, nil
}

// memory returns a size from /proc/PID/status in MiB.
func (p *process) memory(key string) (float64, error) { return bench.Memory(p.cmd.Process.Pid, key) }

// unbound starts unbound with the better of the numbers of threads that make sense here.
func (b *run) unbound(ctx context.Context) (*process, error) {
	best, most := 0, 0.0
	begin := func(threads int) (*process, error) {
		file := filepath.Join(b.dir, fmt.Sprintf("unbound-%d.conf", threads))
		if err := writeUnbound(file, theirsAt, threads); err != nil {
			return nil, err
		}
		return b.start(ctx, b.serverCPUs, theirsAt, exec.Command("unbound", "-d", "-c", file))
	}
	for threads := range map[int]bool{1: true, 2: true, len(b.serverCPUs): true} {
		p, err := begin(threads)
		if err != nil {
			return nil, fmt.Errorf("unbound: %w", err)
		}
		qps, err := b.dnsperf(ctx, theirsAt, tryTime)
		p.stop()
		if err != nil {
			return nil, err
		}
		if qps > most {
			best, most = threads, qps
		}
	}
	fmt.Fprintf(os.Stderr, "unbound with %d threads\n", best)
	return begin(best)
}

var (
	perSecond = regexp.MustCompile(`Queries per second:\s+([0-9.]+)`)
	counted   = regexp.MustCompile(`Queries (sent|completed|lost):\s+([0-9]+)`)
	codes     = regexp.MustCompile(`Response codes:\s+NOERROR [0-9]+ \(100.00%\)\n`)
)

// dnsperf asks as fast as it is answered and returns how many answers a second came.
func (b *run) dnsperf(ctx context.Context, at netip.AddrPort, length time.Duration) (float64, error) {
	cmd := exec.CommandContext(ctx, "dnsperf", "-s", at.Addr().String(), "-p", strconv.Itoa(int(at.Port())), "-d", b.queries,
		"-l", strconv.Itoa(int(length/time.Second)),
		"-T", strconv.Itoa(len(b.loadCPUs)), "-c", strconv.Itoa(8*len(b.loadCPUs)), "-q", "400", "-b", "1024", "-t", "2")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := b.pinned(b.loadCPUs, cmd.Start); err != nil {
		return 0, err
	}
	if err := cmd.Wait(); err != nil {
		return 0, fmt.Errorf("dnsperf: %w: %s", err, &out)
	}
	n := map[string]float64{}
	for _, m := range counted.FindAllStringSubmatch(out.String(), -1) {
		n[m[1]], _ = strconv.ParseFloat(m[2], 64)
	}
	m := perSecond.FindStringSubmatch(out.String())
	if m == nil || !codes.MatchString(out.String()) || n["lost"] > lost*n["sent"] {
		_, statistics, _ := strings.Cut(out.String(), "Statistics:")
		return 0, fmt.Errorf("not all was answered well: %s", statistics)
	}
	return strconv.ParseFloat(m[1], 64)
}

// peak measures how much the server answers at most.
func (s *sample) peak(ctx context.Context, b *run) error {
	before, err := s.server.cpu()
	if err != nil {
		return err
	}
	begin := time.Now()
	qps, err := b.dnsperf(ctx, s.server.at, peakTime)
	if err != nil {
		return err
	}
	took := time.Since(begin).Seconds()
	after, err := s.server.cpu()
	s.qps, s.cpu, s.busy = append(s.qps, qps), append(s.cpu, (after-before)/(qps*peakTime.Seconds())*1e6), append(s.busy, (after-before)/took)
	return err
}

// paced measures how long answers take at a rate. Who gets no answer waits for all of the measurement.
func (s *sample) paced(ctx context.Context, b *run, rate float64) error {
	p, err := b.pace(ctx, s.server.at, rate, pacedTime)
	for tries := 1; err == nil && p.Rate < 0.75*rate; tries++ { // the machine stood still, which says nothing of a server
		if tries == 5 {
			return fmt.Errorf("only %.0f questions a second were sent of %.0f", p.Rate, rate)
		}
		fmt.Fprintf(os.Stderr, "%.0f questions a second were sent of %.0f: once more\n", p.Rate, rate)
		p, err = b.pace(ctx, s.server.at, rate, pacedTime)
	}
	if err != nil {
		return err
	}
	for range int(p.Lost) {
		p.Millis = append(p.Millis, float64(pacedTime)/1e6)
	}
	s.rate = append(s.rate, p.Rate)
	s.p99 = append(s.p99, bench.Percentile(p.Millis, 0.99))
	return nil
}
