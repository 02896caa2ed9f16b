package policybench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

const (
	agents    = 2000
	perAgent  = 30    // groups on a host
	fleetHeld = 60000 // policies
	changes   = 40
	idle      = 65 * time.Second // more than a watch lasts
)

// fleetVariable makes Fleet turn a process into the fleet; it holds the setup.
const fleetVariable = "SILK_BENCH_POLICY_FLEET"

// Fleet does what a child process that Run starts must do, if this is one, and reports whether it was. main calls it first.
func Fleet() bool {
	text := os.Getenv(fleetVariable)
	if text == "" {
		return false
	}
	var s setup
	var r bench.Report
	err := json.Unmarshal([]byte(text), &s)
	if err == nil {
		err = s.measure(context.Background(), &r)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(r)
	return true
}

// fleet measures the agents in a child process, in a network namespace of its own.
func (b *run) fleet(ctx context.Context, r *bench.Report) error {
	if err := b.newDatabase(ctx); err != nil {
		return err
	}
	text, err := json.Marshal(b.setup)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), fleetVariable+"="+string(text))
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	var got bench.Report
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	r.Results = append(r.Results, got.Results...)
	return nil
}

// loopbackUp turns on the loopback device of the namespace, which is new.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// traffic returns the bytes that the loopback device has carried, headers included.
func traffic() (float64, error) {
	b, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if name, rest, _ := strings.Cut(strings.TrimSpace(line), ":"); name == "lo" {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, errors.New("no loopback device")
}

func (s *setup) measure(ctx context.Context, r *bench.Report) (err error) {
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("turn on loopback: %w", err)
	}
	p, err := s.start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	person, err := s.person(p)
	if err != nil {
		return err
	}
	defer person.Close()
	all := policies(fleetHeld)
	if err := fill(ctx, person, all); err != nil {
		return err
	}
	f, err := s.newFleet(p, all)
	if err != nil {
		return err
	}
	begun := time.Now()
	f.start()
	defer func() { f.end() }()
	if err := f.await(time.Minute); err != nil {
		return err
	}
	r.Add("policy.fleet.first", time.Since(begun).Seconds(), "s", math.NaN())
	if err := f.change(ctx, r, person); err != nil {
		return err
	}
	rss, err := p.resident()
	r.Add("policy.fleet.resident", rss, "MiB", math.NaN())
	return errors.Join(err, f.quiet(r), f.restart(ctx, r, person))
}

// fleet is agents that watch.
type fleet struct {
	agents []*agent
	wg     sync.WaitGroup
}

// agent is one host's: it follows the policies that touch its groups.
type agent struct {
	c    *policyhttp.Client
	host string
	gs   []identity.Group

	mu     sync.Mutex
	stop   context.CancelFunc
	held   []policy.Rule
	want   int                // policies that it is to have
	moved  func(at time.Time) // called when it has them
	faults atomic.Int64
	fault  error // the last
}

// everywhere is a group that has a container on every host.
const everywhere identity.Group = "ffffffff-everywhere"

func (s *setup) newFleet(p *process, all []policy.Policy) (*fleet, error) {
	rnd := rand.New(rand.NewPCG(5, 6))
	f := &fleet{}
	touching := map[identity.Group][]int{}
	for i, q := range all {
		touching[q.Source] = append(touching[q.Source], i)
		if q.Destination != q.Source {
			touching[q.Destination] = append(touching[q.Destination], i)
		}
	}
	for n := range agents {
		tc, err := service.Certificates{CA: s.CA, Cert: s.Cert, Key: s.Key}.Client()
		if err != nil {
			return nil, err
		}
		a := &agent{host: fmt.Sprintf("10.1.%d.%d", n/250, n%250), gs: []identity.Group{everywhere}}
		a.c = policyhttp.NewClient([]string{"https://" + p.Internal}, tc, policyhttp.ClientOptions{Timeout: 30 * time.Second})
		for range perAgent {
			a.gs = append(a.gs, app(rnd.IntN(apps)))
		}
		slices.Sort(a.gs)
		a.gs = slices.Compact(a.gs)
		mine := map[int]bool{}
		for _, g := range a.gs {
			for _, i := range touching[g] {
				mine[i] = true
			}
		}
		a.want = len(mine)
		f.agents = append(f.agents, a)
	}
	return f, nil
}

// start runs all agents, from nothing.
func (f *fleet) start() {
	for _, a := range f.agents {
		f.run(a)
	}
}

func (f *fleet) run(a *agent) {
	ctx, cancel := context.WithCancel(context.Background())
	a.mu.Lock()
	a.stop, a.held = cancel, nil
	a.mu.Unlock()
	f.wg.Go(func() { a.follow(ctx) })
}

// end stops all agents.
func (f *fleet) end() {
	for _, a := range f.agents {
		a.mu.Lock()
		a.stop()
		a.mu.Unlock()
	}
	f.wg.Wait()
	for _, a := range f.agents {
		a.c.Close()
	}
}

// follow is the loop of an agent.
func (a *agent) follow(ctx context.Context) {
	ask := policy.Ask{Host: a.host, Groups: a.gs}
	var held []policy.Rule
	for failures := 0; ctx.Err() == nil; {
		u, err := a.c.Watch(ctx, ask)
		if err == nil && u.Changes() {
			var rules []policy.Rule
			if rules, err = u.Apply(held); errors.Is(err, fault.Invalid) {
				ask.Since = ask.InForce
				ask.Since.Counter, ask.Since.Epoch = 0, ""
			}
			if err == nil {
				held = rules
				a.told(rules)
			}
		}
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			a.faults.Add(1)
			a.mu.Lock()
			a.fault = err
			a.mu.Unlock()
			failures++
			pause(ctx, reconcile.Backoff(200*time.Millisecond, 5*time.Second, failures))
			continue
		}
		failures = 0
		ask.Since, ask.InForce = u.Revision, u.Revision
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (a *agent) told(rules []policy.Rule) {
	at := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.held = rules
	if len(rules) == a.want && a.moved != nil {
		a.moved(at)
		a.moved = nil
	}
}

// expect makes all agents wait for more policies than they were to have; what it returns is closed when they have them, and says when the last
// of them did.
func (f *fleet) expect(more int) (<-chan struct{}, *atomic.Int64) {
	done := make(chan struct{})
	var left, last atomic.Int64
	left.Store(int64(len(f.agents)))
	for _, a := range f.agents {
		a.mu.Lock()
		a.want += more
		a.moved = func(at time.Time) {
			for was := last.Load(); was < at.UnixNano() && !last.CompareAndSwap(was, at.UnixNano()); was = last.Load() {
			}
			if left.Add(-1) == 0 {
				close(done)
			}
		}
		if a.held != nil && len(a.held) == a.want {
			a.moved(time.Now())
			a.moved = nil
		}
		a.mu.Unlock()
	}
	return done, &last
}

// await waits until all agents have what they are to have.
func (f *fleet) await(limit time.Duration) error {
	done, _ := f.expect(0)
	return f.within(done, limit)
}

func (f *fleet) within(done <-chan struct{}, limit time.Duration) error {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-done:
		return nil
	case <-t.C:
	}
	lack, faults := 0, int64(0)
	var one error
	for _, a := range f.agents {
		a.mu.Lock()
		if len(a.held) != a.want {
			lack++
		}
		if a.fault != nil {
			one = a.fault
		}
		a.mu.Unlock()
		faults += a.faults.Load()
	}
	return fmt.Errorf("after %v %d of %d agents do not have the policies that they are to have, %d requests failed, one of them: %v", limit, lack, len(f.agents), faults, one)
}

// change measures the time from the API's answer to the last of all agents.
func (f *fleet) change(ctx context.Context, r *bench.Report, person *policyhttp.Client) error {
	var last []float64
	for n := range changes {
		q := []policy.Policy{{Source: app(n), Destination: everywhere, Protocol: policy.UDP, Ports: policy.Ports{First: 53, Last: 53}}}
		for _, add := range []bool{true, false} {
			more, do := 1, person.Create
			if !add {
				more, do = -1, person.Delete
			}
			done, at := f.expect(more)
			if err := do(ctx, q); err != nil {
				return err
			}
			answered := time.Now().UnixNano()
			if err := f.within(done, time.Minute); err != nil {
				return err
			}
			last = append(last, max(0, float64(at.Load()-answered)/1e9))
		}
	}
	r.AtMost("policy.fleet.last.p99", bench.Percentile(last, 0.99), "s", 1)
	r.Add("policy.fleet.last.p50", bench.Median(last), "s", math.NaN())
	return nil
}

// quiet measures what the fleet says when nothing changes.
func (f *fleet) quiet(r *bench.Report) error {
	before, err := traffic()
	if err != nil {
		return err
	}
	start := time.Now()
	pause(context.Background(), idle)
	after, err := traffic()
	r.AtMost("policy.fleet.idle", (after-before)/1000/time.Since(start).Seconds(), "KB/s", 50)
	return err
}

// restart ends all agents and starts them at once from nothing, each tenth of them twice, and measures until all have everything.
func (f *fleet) restart(ctx context.Context, r *bench.Report, person *policyhttp.Client) error {
	f.end()
	for _, a := range f.agents {
		a.mu.Lock()
		a.held = nil
		a.mu.Unlock()
	}
	done, _ := f.expect(0)
	start := time.Now()
	f.start()
	var kills sync.WaitGroup
	for i, a := range f.agents {
		if i%10 != 0 {
			continue
		}
		kills.Go(func() {
			pause(ctx, rand.N(3*time.Second))
			a.mu.Lock()
			a.stop()
			a.mu.Unlock()
			a.c.Close()
			f.run(a)
		})
	}
	kills.Wait()
	err := f.within(done, 2*time.Minute)
	r.AtMost("policy.fleet.restart", time.Since(start).Seconds(), "s", 60)
	if err != nil {
		return err
	}
	if err := f.await(time.Minute); err != nil { // those that were killed after they had everything
		return err
	}
	all, _ := f.expect(1) // nobody was lost
	if err := person.Create(ctx, []policy.Policy{{Source: app(1), Destination: everywhere, Protocol: policy.UDP, Ports: policy.Ports{First: 54, Last: 54}}}); err != nil {
		return err
	}
	err = f.within(all, time.Minute)
	lost := 0.0
	if err != nil {
		lost = 1
	}
	r.AtMost("policy.fleet.lost", lost, "", 0)
	return err
}
