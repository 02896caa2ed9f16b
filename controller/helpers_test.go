package controller_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// each runs f on the embedded engine and on a server.
func each(t *testing.T, f func(t *testing.T, db sqldb.Config)) {
	for _, engine := range []string{sqldb.SQLite, sqldb.Postgres} {
		t.Run(engine, func(t *testing.T) { f(t, testkit.Database(t, engine)) })
	}
}

// certs are the certificates of one test: an authority, a controller on the loopback address, a host.
type certs struct {
	ca                 *pki.CA
	controller, client service.Certificates
}

func issue(t testing.TB) *certs {
	t.Helper()
	ca, err := pki.OpenCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	c := &certs{ca: ca}
	c.controller = c.pair(t, "controller")
	c.client = c.pair(t, "client")
	return c
}

func (c *certs) pair(t testing.TB, name string) service.Certificates {
	t.Helper()
	cert, key, err := c.ca.Issue(name, netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	return service.Certificates{CA: c.ca.CertFile(), Cert: cert, Key: key}
}

// config returns the configuration of a controller over db on free ports.
func (c *certs) config(db sqldb.Config) controller.Config {
	cfg := controller.Defaults()
	cfg.ListenHost, cfg.ListenPort, cfg.HealthCheckPort, cfg.DebugServerPort = "127.0.0.1", 0, 0, 0
	cfg.CACertFile, cfg.ServerCertFile, cfg.ServerKeyFile = c.controller.CA, c.controller.Cert, c.controller.Key
	cfg.Database = &db
	cfg.MetricsEmit = 1
	return cfg
}

func (c *certs) tls(t testing.TB) *tls.Config {
	t.Helper()
	tc, err := c.client.Client()
	if err != nil {
		t.Fatal(err)
	}
	return tc
}

// running is a controller in this process.
type running struct {
	controller.Addresses
	certs *certs
	stop  func() error // ends it and returns what Run returned; safe to call again
}

// start runs a controller until the test ends, and returns when it serves.
func start(t testing.TB, c *certs, cfg controller.Config, log *slog.Logger) *running {
	t.Helper()
	return begin(t, c, cfg, log)()
}

// begin is start in two steps: what it returns waits until the controller serves.
func begin(t testing.TB, c *certs, cfg controller.Config, log *slog.Logger) func() *running {
	t.Helper()
	started := make(chan controller.Addresses, 1)
	cfg.Started = func(a controller.Addresses) { started <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- controller.Run(ctx, cfg, log) }()
	stopped := false
	r := &running{certs: c, stop: func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("controller ended with %v", err)
		}
	})
	return func() *running {
		t.Helper()
		select {
		case r.Addresses = <-started:
		case err := <-done:
			stopped = true
			t.Fatalf("controller ended with %v before it served", err)
		case <-time.After(time.Minute):
			t.Fatal("controller does not serve")
		}
		return r
	}
}

// quiet logs what a human must look at into the test's output.
func quiet(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
}

func (r *running) client(t testing.TB) *leasehttp.Client { return dial(t, r.certs, r.API) }

func dial(t testing.TB, c *certs, addr string) *leasehttp.Client {
	t.Helper()
	k := leasehttp.NewClient("https://"+addr, c.tls(t), leasehttp.ClientOptions{Timeout: 15 * time.Second, Wait: 2 * time.Second})
	t.Cleanup(k.Close)
	return k
}

// get fetches from the health or debug listener.
func get(t testing.TB, addr, path string) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// metric returns the value of a sample of GET /metrics, such as silk_controller_leases{kind="block"}, or -1 if there is none.
func metric(t testing.TB, r *running, sample string) float64 {
	t.Helper()
	_, text := get(t, r.Health, "/metrics")
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(sample) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return -1
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// eventually polls until ok returns true, at most for half a minute.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	testkit.Until(t, 30*time.Second, what, ok)
}

func host(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }

func acquire(t testing.TB, c *leasehttp.Client, n int, kind lease.Kind) lease.Lease {
	t.Helper()
	l, err := c.Acquire(t.Context(), host(n), kind)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func leases(t testing.TB, c *leasehttp.Client) []lease.Lease {
	t.Helper()
	ls, err := c.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ls
}

func networks(ls []lease.Lease) string {
	var b strings.Builder
	for _, l := range ls {
		fmt.Fprintf(&b, "%v %v\n", l.Underlay, l.Subnet)
	}
	return b.String()
}

// newDatabase returns another empty database of the PostgreSQL server that tests share.
func newDatabase(t testing.TB) sqldb.Config { return testkit.Database(t, sqldb.Postgres) }

func post(t testing.TB, addr, path, body string) int {
	t.Helper()
	resp, err := http.Post("http://"+addr+path, "text/plain", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}
