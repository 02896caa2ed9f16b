package tlsproxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// What this test binary is when it is started again: silk-tls with a configuration, or an application that holds connections.
const (
	asProgram     = "SILK_TLS_TEST_CONFIG"
	asApplication = "SILK_TLS_TEST_HOLD"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(asProgram); path != "" {
		ctx, stop := service.Signals()
		defer stop()
		cfg, _, err := Load(path)
		if err == nil {
			log, level := service.Logger("silk-tls", 0)
			err = Run(ctx, cfg, level, log)
		}
		service.Exit("silk-tls", err)
	}
	if address := os.Getenv(asApplication); address != "" {
		l, err := net.Listen("tcp4", address)
		if err != nil {
			service.Exit("application", err)
		}
		for {
			c, err := l.Accept()
			if err != nil {
				service.Exit("application", err)
			}
			go func() { // answers each byte, and holds on to nothing
				var b [1]byte
				for {
					if _, err := c.Read(b[:]); err != nil {
						c.Close()
						return
					}
					c.Write(b[:])
				}
			}()
		}
	}
	os.Exit(m.Run())
}

// program is silk-tls as a process, with what would start it again.
type program struct {
	w      *world
	config string

	mu     sync.Mutex
	cmd    *exec.Cmd
	starts int
	ended  bool
	done   chan struct{}
}

// launch starts silk-tls in the host's namespace, and again 100 ms after each end, as its unit does.
func (w *world) launch(change ...func(*Config)) *program {
	w.t.Helper()
	c := w.config()
	c.DebugPort = 8057
	for _, f := range change {
		f(&c)
	}
	b, err := json.Marshal(c)
	if err != nil {
		w.t.Fatal(err)
	}
	p := &program{w: w, config: filepath.Join(w.t.TempDir(), "tls.json"), done: make(chan struct{})}
	if err := os.WriteFile(p.config, b, 0o600); err != nil {
		w.t.Fatal(err)
	}
	go p.supervise()
	w.t.Cleanup(func() {
		p.mu.Lock()
		p.ended = true
		if p.cmd != nil {
			p.cmd.Process.Kill()
		}
		p.mu.Unlock()
		<-p.done
	})
	return p
}

func (p *program) supervise() {
	defer close(p.done)
	runtime.LockOSThread() // the kernel ends the program when this thread ends
	defer runtime.UnlockOSThread()
	for {
		cmd := exec.Command("nsenter", "--net=/proc/"+strconv.Itoa(os.Getpid())+"/fd/"+strconv.Itoa(p.w.ns.FD()), "--", os.Args[0])
		cmd.Env = append(os.Environ(), asProgram+"="+p.config)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		p.mu.Lock()
		if p.ended {
			p.mu.Unlock()
			return
		}
		err := cmd.Start()
		p.cmd, p.starts = cmd, p.starts+1
		p.mu.Unlock()
		if err != nil {
			return
		}
		cmd.Wait()
		pause := time.NewTimer(100 * time.Millisecond) // RestartSec
		<-pause.C
	}
}

func (p *program) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd.Process.Signal(s)
}

func (p *program) pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// get asks the debug listener in the host's namespace.
func (p *program) get(path string) (string, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return tcp.Dial(ctx, p.w.ns, netip.MustParseAddrPort("127.0.0.1:8057"))
	}}}
	resp, err := client.Get("http://127.0.0.1:8057" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// TestTheProgramComesBack: killed or stopped, it listens again in all namespaces within a second.
func TestTheProgramComesBack(t *testing.T) {
	w := newWorld(t)
	n := 250
	if testing.Short() {
		n = 20
	}
	var all []*member
	for range n {
		all = append(all, w.attachAs("web", standard))
	}
	first, last := all[0], all[n-1]
	for _, m := range []*member{first, last} {
		m.install(w.ca.issue(t, m.address, "x"))
		m.listen(8080, echo)
	}
	web := w.attach()
	p := w.launch()
	testkit.Within(t, 2*patience, func() string {
		if left := silent(t, all); len(left) > 0 {
			return fmt.Sprintf("%d do not listen", len(left))
		}
		return ""
	})
	fastest := map[syscall.Signal]time.Duration{}
	for round := range 8 {
		for _, s := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			if round > 1 && fastest[s] <= time.Second {
				continue // shown; otherwise the machine may have had other things to do
			}
			took := p.comesBack(t, s, web, all)
			if best, ok := fastest[s]; !ok || took < best {
				fastest[s] = took
			}
		}
	}
	for s, took := range fastest {
		if took > time.Second && !raced {
			t.Errorf("%v: it took %v", s, took)
		}
	}
}

// silent returns those on whose port nobody listens.
func silent(t *testing.T, all []*member) []*member {
	return slices.DeleteFunc(slices.Clone(all), func(m *member) bool {
		c, err := tcp.Dial(t.Context(), m.ns, addressPort(m))
		if err == nil {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		return err == nil
	})
}

// comesBack ends the program and returns after how long it listens again for all.
func (p *program) comesBack(t *testing.T, s syscall.Signal, web *member, all []*member) time.Duration {
	t.Helper()
	first, last := all[0], all[len(all)-1]
	open, _ := web.mustSecure(first) // one that would rather stay
	if err := said(open, "hello"); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	before := p.starts
	p.mu.Unlock()
	start := time.Now()
	p.signal(s)
	started := time.Duration(0)
	testkit.Within(t, 2*patience, func() string {
		p.mu.Lock()
		again := p.starts > before
		p.mu.Unlock()
		if !again {
			return "it was not started again"
		}
		if started == 0 {
			started = time.Since(start)
		}
		if left := silent(t, all); len(left) > 0 {
			return fmt.Sprintf("%d do not listen", len(left))
		}
		return ""
	})
	took := time.Since(start)
	t.Logf("%v: started again after %v, %d namespaces listened to again after %v", s, started, len(all), took)
	if err := said(open, "hello"); err == nil {
		t.Error("a connection outlived its process")
	}
	for _, m := range []*member{first, last} {
		if err := web.tries(m); err != nil {
			t.Errorf("after %v: %v", s, err)
		}
	}
	return took
}

// TestStoppingLeavesAMoment to connections that are about to end.
func TestStoppingLeavesAMoment(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.Drain = 60_000 })
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	c, _ := web.mustSecure(api)
	if err := said(c, "hello"); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.stop()
	}()
	testkit.Until(t, patience, "no more connections are taken", func() bool {
		raw, err := web.reach(api, 61443)
		if err == nil {
			raw.Close()
		}
		return err != nil
	})
	if err := said(c, "hello"); err != nil {
		t.Errorf("while it stops: %v", err)
	}
	select {
	case <-stopped:
		t.Error("it did not wait for the connection")
	default:
	}
	c.Close()
	select {
	case <-stopped:
	case <-time.After(patience):
		t.Error("it waits though the last connection has ended")
	}
}

// TestManyIdleConnections: what each costs.
func TestManyIdleConnections(t *testing.T) {
	w := newWorld(t)
	api, web := w.attach(standard), w.attach()
	app := exec.Command("nsenter", "--net="+api.path, "--", os.Args[0])
	app.Env = append(os.Environ(), asApplication+"=0.0.0.0:8080")
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { app.Process.Kill(); app.Wait() }()
	p := w.launch(func(c *Config) { c.ConnectTimeout = 10_000 }) // of a machine that is busy
	testkit.Until(t, patience, "the container is reached", func() bool { return web.tries(api) == nil })
	n := 2000 // that the figure is of one, and what 10,000 take, is for the benchmark to show
	if testing.Short() {
		n = 500
	}
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	if most := (int(min(l.Cur, 1<<20))-spareFiles-filesContainer)/2 - 1; n > most {
		t.Logf("this process may have %d descriptors: %d connections instead of %d", l.Cur, most, n)
		n = most
	}
	before := p.memory(t)
	conns := make([]net.Conn, n)
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			for i := k; i < n; i += 8 {
				c, _, err := web.secure(api)
				if err != nil {
					t.Error(err)
					return
				}
				conns[i] = c
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	testkit.Within(t, patience, func() string {
		text, err := p.get("/metrics")
		if want := fmt.Sprintf("\nsilk_tls_connections %d\n", n); err != nil || !hasText(text, want) {
			return "not all are open"
		}
		return ""
	})
	after := p.memory(t)
	each := float64(after-before) / float64(n) / 1024
	t.Logf("%d idle connections: %.1f MiB resident before, %.1f MiB after, %.1f KiB each", n, float64(before)/(1<<20), float64(after)/(1<<20), each)
	if each > 40 && !raced {
		t.Errorf("an idle connection takes %.1f KiB, want at most 40", each)
	}
	for i := 0; i < n; i += n / 100 {
		conns[i].SetDeadline(time.Now().Add(patience)) // that of its handshake may be over
		if _, err := conns[i].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conns[i], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
}

// memory returns the bytes that the program has resident after a garbage collection.
func (p *program) memory(t *testing.T) int64 {
	t.Helper()
	for range 3 { // stacks shrink by half each time
		if _, err := p.get("/debug/pprof/heap?gc=1"); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
