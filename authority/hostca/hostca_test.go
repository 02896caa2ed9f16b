package hostca_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/authority/hostca"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/registration"
)

var (
	discard = slog.New(slog.DiscardHandler)
	own     = netip.MustParseAddr("10.0.16.5")
	subnet  = netip.MustParsePrefix("10.255.30.0/24")
	inside  = netip.MustParseAddr("10.255.30.7")
	spec    = authority.Spec{Names: []string{"api.apps.internal"}, Addresses: []netip.Addr{inside}, Group: "g"}
)

// fleet is what controllers share: the authority of hosts, leases, the files of the container CA.
type fleet struct {
	dir string
	ca  *pki.CA

	mu      sync.Mutex
	root    *authority.Root
	leases  map[netip.Addr][]netip.Prefix
	domains []registration.Name
	asked   int // intermediates given
}

func newRoot(t testing.TB, name string) (cert, key []byte) {
	t.Helper()
	cert, key, err := authority.NewRoot(name, 10*365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func parseRoot(t testing.TB, key []byte, certs ...[]byte) *authority.Root {
	t.Helper()
	r, err := authority.ParseRoot(slices.Concat(certs...), key)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newFleet(t testing.TB) *fleet {
	t.Helper()
	f := &fleet{dir: t.TempDir(), leases: map[netip.Addr][]netip.Prefix{own: {subnet}}, domains: []registration.Name{"apps.internal"}}
	var err error
	if f.ca, err = pki.OpenCA(filepath.Join(f.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	cert, key := newRoot(t, "root")
	f.root = parseRoot(t, key, cert)
	return f
}

func (f *fleet) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fleet) given() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

func (f *fleet) pair(t testing.TB, name string, a netip.Addr) service.Certificates {
	t.Helper()
	cert, key, err := f.ca.Issue(name, a)
	if err != nil {
		t.Fatal(err)
	}
	return service.Certificates{CA: f.ca.CertFile(), Cert: cert, Key: key}
}

// controller serves the fleet's container CA, at addr if that is not "".
func (f *fleet) controller(t testing.TB, addr string) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(authorityhttp.Handler(authorityhttp.Source{
		Root: func() (*authority.Root, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.root, nil
		},
		Subnets: func(_ context.Context, host netip.Addr) ([]netip.Prefix, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.leases[host], nil
		},
		Domains: f.domains, TrustDomain: "silk.internal", Validity: authority.MaxIntermediate,
	}, discard, authorityhttp.HandlerOptions{Count: func(o authorityhttp.Outcome) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if o == authorityhttp.Issued {
			f.asked++
		}
	}}))
	tc, err := f.pair(t, "controller", netip.MustParseAddr("127.0.0.1")).Server()
	if err != nil {
		t.Fatal(err)
	}
	if addr != "" {
		s.Listener.Close()
		if s.Listener, err = net.Listen("tcp", addr); err != nil {
			t.Fatal(err)
		}
	}
	s.Listener = tls.NewListener(s.Listener, tc)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.Start()
	s.URL = strings.Replace(s.URL, "http:", "https:", 1)
	t.Cleanup(s.Close)
	return s
}

func (f *fleet) config(t testing.TB, url, dir string) hostca.Config {
	t.Helper()
	tc, err := f.pair(t, "host", own).Client()
	if err != nil {
		t.Fatal(err)
	}
	c := authorityhttp.NewClient(url, tc, authorityhttp.ClientOptions{Timeout: 5 * time.Second})
	t.Cleanup(c.Close)
	return hostca.Config{Dir: dir, Underlay: own, Client: c, Log: discard}
}

// start opens an issuer and runs it until the test ends or stop is called.
func start(t testing.TB, cfg hostca.Config) (i *hostca.Issuer, stop func()) {
	t.Helper()
	i, err := hostca.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return i, stop
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func leaf(t testing.TB, i *hostca.Issuer, s authority.Spec) *authority.Leaf {
	t.Helper()
	l, err := i.Leaf(within(t, 20*time.Second), s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// rootsOf reads what containers read.
func rootsOf(t testing.TB, dir string) authority.Bundle {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, hostca.RootsFile))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := authority.ParseBundle(b)
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

func verify(t testing.TB, l *authority.Leaf, roots authority.Bundle) {
	t.Helper()
	if err := authority.Verify(l.Chain(), roots, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
		t.Error(err)
	}
}

func TestLeavesOfAHost(t *testing.T) {
	f := newFleet(t)
	dir := filepath.Join(t.TempDir(), "tls")
	i, stop := start(t, f.config(t, f.controller(t, "").URL, dir))
	l := leaf(t, i, spec)
	verify(t, l, rootsOf(t, dir))
	if p, err := authority.PeerOf(l.Certificate, i.TrustDomain()); err != nil || p.Is(inside, "g") != nil {
		t.Errorf("%+v, %v", p, err)
	}
	for path, want := range map[string]os.FileMode{".": 0o700, "roots": 0o755, hostca.RootsFile: 0o644, "intermediate.json": 0o600} {
		if st, err := os.Stat(filepath.Join(dir, path)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", path, st.Mode(), err, want)
		}
	}
	for range 5 {
		leaf(t, i, spec)
	}
	if st := i.Status(); f.given() != 1 || st.Leaves != 6 || !slices.Equal(st.Subnets, []netip.Prefix{subnet}) || st.Expires.IsZero() {
		t.Errorf("%d intermediates, %+v", f.given(), st)
	}
	stop()
	// Another process goes on with it, and asks for none.
	again, _ := start(t, f.config(t, f.controller(t, "").URL, dir))
	if b := leaf(t, again, spec); !b.Chain()[1].Equal(l.Chain()[1]) || f.given() != 1 {
		t.Errorf("%d intermediates after a restart", f.given())
	}
}

func TestTheControllerIsAway(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	c := f.controller(t, "")
	cfg := f.config(t, c.URL, dir)
	i, stop := start(t, cfg)
	leaf(t, i, spec)
	addr := c.Listener.Addr().String()
	c.CloseClientConnections()
	c.Close()
	verify(t, leaf(t, i, spec), rootsOf(t, dir)) // it goes on
	stop()
	i, stop = start(t, cfg) // after a restart too
	verify(t, leaf(t, i, spec), rootsOf(t, dir))
	// What it has no intermediate for it refuses, soon and with the reason.
	other := authority.Spec{Addresses: []netip.Addr{netip.MustParseAddr("10.255.77.1")}, Group: "g"}
	if _, err := i.Leaf(within(t, 30*time.Second), other); !errors.Is(err, fault.Denied) || !strings.Contains(err.Error(), "ask for an intermediate: ") {
		t.Errorf("an address that is not covered: %v", err) // refused, or EOF by a connection that was kept
	}
	stop()
	fresh, _ := start(t, f.config(t, c.URL, t.TempDir()))
	if _, err := fresh.Leaf(within(t, 30*time.Second), spec); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without an intermediate: %v", err)
	}
	// It comes back by itself.
	f.controller(t, addr)
	testkit.Within(t, 30*time.Second, func() string {
		if _, err := fresh.Leaf(t.Context(), spec); err != nil {
			return err.Error()
		}
		return ""
	})
}

// TestNeedDoesNotStormAController: whatever containers need, a controller that does not answer is asked with growing pauses.
func TestNeedDoesNotStormAController(t *testing.T) {
	f := newFleet(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var came atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			came.Add(1)
			c.Close()
		}
	}()
	i, stop := start(t, f.config(t, "https://"+ln.Addr().String(), t.TempDir()))
	ctx, tick := within(t, 5*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		i.Need(inside)
		if _, err := i.Leaf(ctx, spec); err == nil {
			t.Fatal("a leaf without an intermediate")
		}
		<-tick.C
	}
	stop()
	ln.Close()
	<-done
	if n := came.Load(); n < 1 || n > 4 {
		t.Errorf("asked %d times in 5 s", n)
	}
}

func TestAnotherSubnetIsAskedForAtOnce(t *testing.T) {
	f := newFleet(t)
	i, _ := start(t, f.config(t, f.controller(t, "").URL, t.TempDir()))
	leaf(t, i, spec)
	changed := i.Changed()
	f.set(func() { f.leases[own] = []netip.Prefix{netip.MustParsePrefix("10.255.40.0/24")} })
	moved := authority.Spec{Addresses: []netip.Addr{netip.MustParseAddr("10.255.40.9")}, Group: "g"}
	verify(t, leaf(t, i, moved), i.Roots())
	select {
	case <-changed:
	default:
		t.Error("nobody was told of the change")
	}
	if i.Need(inside) || !i.Need(moved.Addresses...) {
		t.Error("it covers what it should not, or not what it should")
	}
	// A container whose address the lease does not cover is refused at once, and does not make the host ask without end.
	given := f.given()
	for range 50 {
		if _, err := i.Leaf(within(t, 20*time.Second), spec); !errors.Is(err, fault.Denied) {
			t.Fatal(err)
		}
	}
	if n := f.given() - given; n > 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestASavedIntermediateOfAnotherSubnet is a host that got another subnet while silk-tls was down.
func TestASavedIntermediateOfAnotherSubnet(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	c := f.controller(t, "")
	i, stop := start(t, f.config(t, c.URL, dir))
	leaf(t, i, spec)
	stop()
	f.set(func() { f.leases[own] = []netip.Prefix{netip.MustParsePrefix("10.255.40.0/24")} })
	i, _ = start(t, f.config(t, c.URL, dir))
	verify(t, leaf(t, i, authority.Spec{Addresses: []netip.Addr{netip.MustParseAddr("10.255.40.9")}, Group: "g"}), rootsOf(t, dir))
}

func TestManyAskAtOnce(t *testing.T) {
	f := newFleet(t)
	i, _ := start(t, f.config(t, f.controller(t, "").URL, t.TempDir()))
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := i.Leaf(within(t, 20*time.Second), spec); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := f.given(); n > 2 {
		t.Errorf("asked %d times for 50 leaves", n)
	}
}

// saved returns what is left of a host's CA that has issued and ended: its state, in a directory, and the fleet and controller that it had.
func saved(t *testing.T) (*fleet, *httptest.Server, string) {
	t.Helper()
	f, dir := newFleet(t), t.TempDir()
	c := f.controller(t, "")
	i, stop := start(t, f.config(t, c.URL, dir))
	leaf(t, i, spec)
	stop()
	return f, c, dir
}

func TestStateThatMakesNoSense(t *testing.T) {
	f, c, dir := saved(t)
	state := filepath.Join(dir, "intermediate.json")
	good, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(good) / 97 {
		if err := os.WriteFile(state, good[:n*97], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := hostca.Open(f.config(t, c.URL, dir)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(state + ".broken"); err != nil || string(b) != string(good[:n*97]) {
			t.Fatalf("torn at %d: %d bytes set aside, %v", n*97, len(b), err)
		}
	}
	i, _ := start(t, f.config(t, c.URL, dir))
	verify(t, leaf(t, i, spec), rootsOf(t, dir))
}

func TestStateOfAnotherHost(t *testing.T) {
	f, c, dir := saved(t)
	cfg := f.config(t, c.URL, dir)
	cfg.Underlay = netip.MustParseAddr("10.0.16.99")
	i, err := hostca.Open(cfg)
	if err != nil || i.Need(inside) {
		t.Errorf("it speaks for another host: %v", err)
	}
}

func TestFilesThatGoAreBack(t *testing.T) {
	f, c, dir := saved(t)
	if err := os.RemoveAll(filepath.Join(dir, "roots")); err != nil {
		t.Fatal(err)
	}
	c.CloseClientConnections()
	c.Close() // nobody tells it again
	start(t, f.config(t, c.URL, dir))
	testkit.Until(t, 20*time.Second, "no roots", func() bool {
		_, err := os.Stat(filepath.Join(dir, hostca.RootsFile))
		return err == nil
	})
	if !rootsOf(t, dir).Equal(f.root.Bundle()) {
		t.Error("other roots")
	}
}

// TestNoPlaceForState: it issues, and says that it cannot save.
func TestNoPlaceForState(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	i, err := hostca.Open(f.config(t, f.controller(t, "").URL, dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	verify(t, leaf(t, i, spec), f.root.Bundle())
	testkit.Until(t, 10*time.Second, "the failure is not told", func() bool { return i.Status().Err != nil })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
