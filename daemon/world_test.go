package daemon_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/daemon"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// These tests run the real daemon as processes in network namespaces of their own, against the real controller. The test
// process itself lives in a namespace that is the underlay network: a bridge that every host hangs on, with the
// controller at its address.

const (
	programKey = "SILK_DAEMON_TEST_PROGRAM" // makes the test binary be silk-daemon or silk-teardown
	insideKey  = "SILK_DAEMON_TEST_INSIDE"  // set when the namespace is there, or cannot be made (its value says why)
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(programKey) != "":
		program(os.Getenv(programKey), os.Args[1:])
	case os.Getenv(insideKey) != "":
		os.Exit(m.Run())
	}
	// The whole process has to live in the namespace, so it starts itself again there.
	run := func(flags uintptr, inside string) error {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), insideKey+"="+inside)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		return cmd.Run()
	}
	err := run(syscall.CLONE_NEWNET, "yes")
	if errors.Is(err, syscall.EPERM) {
		err = run(0, err.Error())
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(max(exit.ExitCode(), 1))
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// program is what cmd/silk-daemon and cmd/silk-teardown do.
func program(name string, args []string) {
	ctx, stop := service.Signals()
	defer stop()
	cfg, _, err := daemon.Load(args[0])
	if err != nil {
		service.Exit(name, err)
	}
	log, level := service.Logger(name, slog.LevelDebug)
	if name == "silk-teardown" {
		service.Exit(name, daemon.Teardown(ctx, cfg, len(args) > 1 && args[1] == "-force", log))
	}
	service.Exit(name, daemon.Run(ctx, cfg, level, log))
}

const (
	controllerIP = "10.0.16.1"
	bridgeName   = "underlay0"
)

// world is an underlay network with a controller on it.
type world struct {
	t    *testing.T
	ca   *pki.CA
	cert [2]string // the controller's and the test's own
	dir  string
	nl   *netlink.Handle

	mu   sync.Mutex
	stop func()
}

func newWorld(t *testing.T) *world {
	t.Helper()
	var err error
	if why := os.Getenv(insideKey); why != "yes" {
		err = errors.New(why)
	}
	testkit.Require(t, "netns", err)
	w := &world{t: t, dir: t.TempDir()}
	if w.ca, err = pki.OpenCA(filepath.Join(w.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	if w.cert[0], w.cert[1], err = w.ca.Issue("controller", netip.MustParseAddr(controllerIP)); err != nil {
		t.Fatal(err)
	}
	if w.nl, err = netlink.NewHandle(); err != nil {
		t.Fatal(err)
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
	must(t, w.nl.LinkAdd(br))
	must(t, w.nl.AddrAdd(br, address(controllerIP+"/24")))
	must(t, w.nl.LinkSetUp(br))
	lo, err := w.nl.LinkByName("lo")
	must(t, err)
	must(t, w.nl.LinkSetUp(lo))
	t.Cleanup(func() {
		w.away()
		w.nl.LinkDel(br)
		w.nl.Close()
	})
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func address(s string) *netlink.Addr {
	a, err := netlink.ParseAddr(s)
	if err != nil {
		panic(err)
	}
	return a
}

// controller starts the real controller on the database db of this world, until away.
func (w *world) controller(db string, change ...func(*controller.Config)) {
	w.t.Helper()
	cfg := controller.Defaults()
	cfg.ListenHost, cfg.ListenPort, cfg.HealthCheckPort, cfg.DebugServerPort = controllerIP, 4103, 0, 0
	cfg.CACertFile, cfg.ServerCertFile, cfg.ServerKeyFile = w.ca.CertFile(), w.cert[0], w.cert[1]
	cfg.Database = &sqldb.Config{Type: "sqlite", Path: filepath.Join(w.dir, db)}
	started := make(chan struct{})
	cfg.Started = func(controller.Addresses) { close(started) }
	for _, c := range change {
		c(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	log := slog.New(slog.NewTextHandler(newLines(w.t, "controller"), nil))
	go func() { done <- controller.Run(ctx, cfg, log) }()
	w.mu.Lock()
	w.stop = func() { cancel(); <-done }
	w.mu.Unlock()
	select {
	case <-started:
	case err := <-done:
		w.t.Fatalf("controller: %v", err)
	case <-time.After(20 * time.Second):
		w.t.Fatal("controller did not start within 20 s")
	}
}

// serve answers at the controller's address with h, until away.
func (w *world) serve(h http.Handler) {
	w.t.Helper()
	tc, err := service.Certificates{CA: w.ca.CertFile(), Cert: w.cert[0], Key: w.cert[1]}.Server()
	must(w.t, err)
	ln, err := tls.Listen("tcp", controllerIP+":4103", tc)
	must(w.t, err)
	s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	done := make(chan struct{})
	go func() { s.Serve(ln); close(done) }()
	w.mu.Lock()
	w.stop = func() { s.Close(); <-done }
	w.mu.Unlock()
}

// away stops the controller.
func (w *world) away() {
	w.mu.Lock()
	stop := w.stop
	w.stop = nil
	w.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// api returns a client of the controller.
func (w *world) api() *leasehttp.Client {
	w.t.Helper()
	tc, err := service.Certificates{CA: w.ca.CertFile(), Cert: w.cert[0], Key: w.cert[1]}.Client()
	must(w.t, err)
	c := leasehttp.NewClient("https://"+controllerIP+":4103", tc, leasehttp.ClientOptions{})
	w.t.Cleanup(c.Close)
	return c
}

// host is a namespace with an underlay device and the files of a daemon.
type host struct {
	w      *world
	t      *testing.T
	ns     *kernel.NS
	nl     *netlink.Handle
	ip     string
	dir    string
	config map[string]any
	client *http.Client

	proc *process
}

// host adds a host with the underlay address 10.0.16.N.
func (w *world) host(n int) *host {
	w.t.Helper()
	t := w.t
	h := &host{w: w, t: t, ip: fmt.Sprintf("10.0.16.%d", n), dir: filepath.Join(w.dir, fmt.Sprintf("host%d", n))}
	must(t, os.MkdirAll(h.dir, 0o700))
	var err error
	h.ns, err = kernel.NewNS()
	must(t, err)
	must(t, h.ns.Do(func() error { // its link-local addresses come late and would differ between two dumps
		return kernel.SetSysctl("net/ipv6/conf/default/disable_ipv6", "1")
	}))
	h.nl, err = netlink.NewHandleAt(netns.NsHandle(h.ns.FD()))
	must(t, err)
	br, err := w.nl.LinkByName(bridgeName)
	must(t, err)
	port := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("port%d", n), MasterIndex: br.Attrs().Index},
		PeerName: "eth0", PeerNamespace: netlink.NsFd(h.ns.FD())}
	must(t, w.nl.LinkAdd(port))
	must(t, w.nl.LinkSetUp(port))
	eth, err := h.nl.LinkByName("eth0")
	must(t, err)
	must(t, h.nl.AddrAdd(eth, address(h.ip+"/24")))
	must(t, h.nl.LinkSetUp(eth))
	lo, err := h.nl.LinkByName("lo")
	must(t, err)
	must(t, h.nl.LinkSetUp(lo))
	cert, key, err := w.ca.Issue("host-"+h.ip, netip.MustParseAddr(h.ip))
	must(t, err)
	h.config = map[string]any{
		"underlay_ip": h.ip, "connectivity_server_url": "https://" + controllerIP + ":4103", "log_level": "debug",
		"ca_cert_file": w.ca.CertFile(), "client_cert_file": cert, "client_key_file": key, "poll_interval": 1, "client_timeout_seconds": 2,
		"datastore": filepath.Join(h.dir, "store.json"), "state_dir": filepath.Join(h.dir, "state"), "endpoint_dir": filepath.Join(h.dir, "endpoints"),
		"resolv_conf": filepath.Join(h.dir, "resolv.conf"),
	}
	h.client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = h.ns.Do(func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		}}}
	t.Cleanup(func() {
		h.kill()
		h.nl.Close()
		h.ns.Close()
		w.nl.LinkDel(port)
	})
	return h
}

// process is a running daemon.
type process struct {
	cmd  *exec.Cmd
	out  *lines
	done chan struct{}
	err  error // valid when done is closed
}

// run starts the test binary as a program in the host's namespace.
func (h *host) run(name string, args ...string) *process {
	h.t.Helper()
	b, err := json.Marshal(h.config)
	must(h.t, err)
	file := filepath.Join(h.dir, "config.json")
	must(h.t, os.WriteFile(file, b, 0o600))
	p := &process{cmd: exec.Command("/proc/self/exe", append([]string{file}, args...)...), out: newLines(h.t, name+" "+h.ip), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), programKey+"="+name)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	must(h.t, h.ns.Do(p.cmd.Start))
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	return p
}

// start starts the daemon.
func (h *host) start() {
	h.t.Helper()
	h.proc = h.run("silk-daemon")
}

// kill ends the daemon at once.
func (h *host) kill() {
	if h.proc != nil {
		h.proc.cmd.Process.Kill()
		<-h.proc.done
		h.proc = nil
	}
}

// term asks the daemon to end and expects that it does so in peace.
func (h *host) term() {
	h.t.Helper()
	must(h.t, h.proc.cmd.Process.Signal(syscall.SIGTERM))
	if code, _ := h.proc.wait(h.t); code != 0 {
		h.t.Errorf("exit code %d after SIGTERM, want 0", code)
	}
	h.proc = nil
}

// wait returns the exit code and the output of a process that ends by itself.
func (p *process) wait(t *testing.T) (int, string) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
		t.Fatal("process did not end within 30 s")
	}
	return p.cmd.ProcessState.ExitCode(), p.out.String()
}

// get asks the info endpoint.
func (h *host) get(path string) (int, string, error) {
	resp, err := h.client.Get("http://127.0.0.1:23954" + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// network asks for /v1/network, the zero Network if nobody answers.
func (h *host) network() daemon.Network {
	var n daemon.Network
	if _, body, err := h.get("/v1/network"); err == nil {
		json.Unmarshal([]byte(body), &n)
	}
	return n
}

// aside returns what the daemon tells beside its port.
func (h *host) aside() (daemon.Network, error) {
	var n daemon.Network
	err := h.ns.Do(func() error {
		conn, err := kernel.DialBeside(23954, 5*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		return json.NewDecoder(conn).Decode(&n)
	})
	return n, err
}

// becomes waits for a status, and for both ways to ask to tell it.
func (h *host) becomes(want daemon.Status) daemon.Network {
	h.t.Helper()
	var n daemon.Network
	eventually(h.t, 20*time.Second, "status "+string(want), func() error {
		if n = h.network(); n.Status != want {
			return fmt.Errorf("%+v", n)
		}
		if a, err := h.aside(); err != nil || a != n {
			return fmt.Errorf("beside the port: %+v %w", a, err)
		}
		return nil
	})
	return n
}

// ready waits until /ready is 200 and returns the network.
func (h *host) ready() daemon.Network {
	h.t.Helper()
	eventually(h.t, 20*time.Second, "ready", func() error {
		if code, body, err := h.get("/ready"); err != nil || code != 200 {
			return fmt.Errorf("%d %s %w", code, body, err)
		}
		return nil
	})
	return h.network()
}

// eventually polls until check returns nil and fails the test when it does not in time.
func eventually(t testing.TB, within time.Duration, what string, check func() error) {
	t.Helper()
	testkit.Within(t, within, func() string {
		if err := check(); err != nil {
			return what + ": " + err.Error()
		}
		return ""
	})
}

// container makes what a plugin of any kind leaves in the host's namespace: a device named after the address, with a route.
func (h *host) container(ip string) (remove func()) {
	h.t.Helper()
	var o [4]int
	fmt.Sscanf(ip, "%d.%d.%d.%d", &o[0], &o[1], &o[2], &o[3])
	name := fmt.Sprintf("s-%03d%03d%03d%03d", o[0], o[1], o[2], o[3])
	ns, err := kernel.NewNS()
	must(h.t, err)
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.FD())}
	must(h.t, h.nl.LinkAdd(v))
	link, err := h.nl.LinkByName(name)
	must(h.t, err)
	must(h.t, h.nl.LinkSetUp(link))
	a := address("169.254.0.1/32")
	a.Peer = address(ip + "/32").IPNet
	must(h.t, h.nl.AddrAdd(link, a))
	var once sync.Once
	remove = func() { once.Do(func() { h.nl.LinkDel(link); ns.Close() }) }
	h.t.Cleanup(remove)
	return remove
}

// lines keeps what a process writes, and shows it when the test fails.
type lines struct {
	t    *testing.T
	name string

	mu  sync.Mutex
	buf bytes.Buffer
}

// newLines returns lines that t shows when it has failed.
func newLines(t *testing.T, name string) *lines {
	l := &lines{t: t, name: name}
	t.Cleanup(func() {
		if t.Failed() {
			s := l.String()
			t.Logf("%s wrote:\n%s", name, s[max(0, len(s)-6000):])
		}
	})
	return l
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

const (
	stopSignal = syscall.SIGSTOP
	contSignal = syscall.SIGCONT
)

var discard = slog.New(slog.DiscardHandler)

// store opens a database of this world without a controller, until the test ends.
func (w *world) store(db string) *leasesql.Store {
	w.t.Helper()
	pool, err := lease.NewPool(netip.MustParsePrefix("10.255.0.0/16"), 24)
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	s, err := leasesql.Open(ctx, leasesql.Config{DB: sqldb.Config{Type: "sqlite", Path: filepath.Join(w.dir, db)}, Pool: pool,
		Expiration: time.Hour, Staleness: time.Hour, ReuseDelay: time.Hour}, discard)
	must(w.t, err)
	done := make(chan struct{})
	go func() { s.Run(ctx); close(done) }()
	w.t.Cleanup(func() { cancel(); <-done; s.Close() })
	return s
}

type controllerConfig = controller.Config

func leaseOf(underlay netip.Addr, subnet netip.Prefix) lease.Lease {
	return lease.Lease{Underlay: underlay, Subnet: subnet, MAC: lease.MACOf(subnet)}
}
