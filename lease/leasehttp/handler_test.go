package leasehttp_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
)

var discard = slog.New(slog.DiscardHandler)

// openSQLite returns a running store over an empty database.
func openSQLite(t *testing.T, network string, bits int) *leasesql.Store {
	t.Helper()
	pool, err := lease.NewPool(netip.MustParsePrefix(network), bits)
	if err != nil {
		t.Fatal(err)
	}
	s, err := leasesql.Open(t.Context(), leasesql.Config{
		DB: sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "leases.db")}, Pool: pool,
		Expiration: time.Hour, Staleness: time.Hour, ReuseDelay: time.Hour,
	}, discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func serve(t *testing.T, reg lease.Registry, o leasehttp.HandlerOptions) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(leasehttp.Handler(reg, discard, o))
	t.Cleanup(s.Close)
	return s
}

// ask sends one request and returns the answer and its body.
func ask(t *testing.T, c *http.Client, method, url, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func TestAnswersAreThoseOfTheDeployedController(t *testing.T) {
	s := serve(t, openSQLite(t, "10.255.0.0/29", 30), leasehttp.HandlerOptions{})
	const l5 = `{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.0.4/30","overlay_hardware_addr":"ee:ee:0a:ff:00:04"}`
	for _, c := range []struct {
		method, path, body string
		status             int
		answer             string // "" for any text
	}{
		{"GET", "/leases", "", 200, `{"leases":[]}`},
		{"PUT", "/leases/acquire", `{"underlay_ip":"10.0.0.5","more":[1]}`, 200, l5},
		{"PUT", "/leases/acquire", `{"underlay_ip":"10.0.0.6"}`, 409, `{"error": "no lease available"}`},
		{"PUT", "/leases/acquire", `{"underlay_ip":"10.0.0.5","single_overlay_ip":true}`, 200, l5},
		{"PUT", "/leases/acquire", `{"underlay_ip":"a\"b"}`, 500, `{"error": "invalid ipv4 address: a\"b"}`},
		{"PUT", "/leases/acquire", `{}`, 500, `{"error": "invalid ipv4 address: "}`},
		{"PUT", "/leases/acquire", `null`, 500, `{"error": "invalid ipv4 address: "}`},
		{"PUT", "/leases/acquire", `{"underlay_ip":"::ffff:10.0.0.7"}`, 500, `{"error": "invalid ipv4 address: ::ffff:10.0.0.7"}`},
		{"PUT", "/leases/acquire", `{"underlay_ip":7}`, 400, ""},
		{"PUT", "/leases/acquire", ``, 400, `{"error": "unmarshal-request: unexpected end of JSON input"}`},
		{"PUT", "/leases/acquire", `{"underlay_ip":"10.0.0.5"} x`, 400, ""},
		{"PUT", "/leases/acquire", `{"x":"` + strings.Repeat("x", 32<<10) + `"}`, 400, ""},
		{"PUT", "/leases/renew", l5, 200, `{}`},
		{"PUT", "/leases/renew", strings.Replace(l5, "0.4/30", "0.0/30", 1), 409, ""},
		{"PUT", "/leases/renew", strings.ReplaceAll(l5, "ee:ee:0a", "ee:ee:0b"), 409, ""},
		{"PUT", "/leases/renew", strings.Replace(l5, "10.0.0.5", "10.0.0.6", 1), 409, ""},
		{"PUT", "/leases/renew", `{"underlay_ip":"10.0.0.9","overlay_subnet":"10.255.0.1/32","overlay_hardware_addr":"ee:ee:0a:ff:00:01"}`, 200, `{}`},
		{"PUT", "/leases/renew", `{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.0.1/32","overlay_hardware_addr":"ee:ee:0a:ff:00:01"}`,
			409, `{"error": "renew-subnet-lease: lease mismatch"}`},
		{"PUT", "/leases/renew", `{}`, 409, ""},
		{"PUT", "/leases/renew", `[`, 400, ""},
		{"PUT", "/leases/release", `{"underlay_ip":"10.0.0.77"}`, 200, `{}`},
		{"PUT", "/leases/release", `{"underlay_ip":"nonsense"}`, 200, `{}`},
		{"PUT", "/leases/release", `{}`, 200, `{}`},
		{"PUT", "/leases/release", `{`, 400, ""},
		{"PUT", "/leases/release", `{"underlay_ip":"10.0.0.9"}`, 200, `{}`},
		{"GET", "/leases", "", 200, `{"leases":[` + l5 + `]}`},
		{"GET", "/v1/leases/watch?wait=-1", "", 400, ""},
		{"GET", "/v1/leases/watch?wait=x", "", 400, ""},
		{"GET", "/v1/leases/watch?since=.1", "", 400, ""},
	} {
		resp, got := ask(t, s.Client(), c.method, s.URL+c.path, c.body)
		if resp.StatusCode != c.status || c.answer != "" && got != c.answer {
			t.Errorf("%s %s %.80s: %d %s, want %d %s", c.method, c.path, c.body, resp.StatusCode, got, c.status, c.answer)
		}
		var e struct{ Error string }
		if err := json.Unmarshal([]byte(got), &e); err != nil || c.status != 200 && e.Error == "" {
			t.Errorf("%s %s %.80s: answer %q is not JSON with an error: %v", c.method, c.path, c.body, got, err)
		}
		if resp.StatusCode == 409 && strings.HasSuffix(c.path, "renew") && !strings.HasPrefix(e.Error, "renew-subnet-lease: ") {
			t.Errorf("renew: answer %q lacks its prefix", e.Error)
		}
	}
}

func TestPathsAndMethodsAreExact(t *testing.T) {
	var seen []string
	s := serve(t, openSQLite(t, "10.255.0.0/16", 24), leasehttp.HandlerOptions{
		Observe: func(path string, status int, _ time.Duration) { seen = append(seen, fmt.Sprint(path, " ", status)) },
	})
	noRedirect := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for _, c := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"HEAD", "/leases", 405, "GET"}, {"PUT", "/leases", 405, "GET"}, {"GET", "/leases/acquire", 405, "PUT"}, {"POST", "/leases/renew", 405, "PUT"},
		{"DELETE", "/leases/release", 405, "PUT"}, {"OPTIONS", "/v1/leases/watch", 405, "GET"}, {"HEAD", "/v1/leases/watch", 405, "GET"},
		{"GET", "/leases/", 404, ""}, {"GET", "//leases", 404, ""}, {"GET", "/leases/../leases", 404, ""}, {"PUT", "/", 404, ""}, {"GET", "/health", 404, ""},
	} {
		resp, _ := ask(t, noRedirect, c.method, s.URL+c.path, "")
		if resp.StatusCode != c.status || resp.Header.Get("Allow") != c.allow {
			t.Errorf("%s %s: %d, Allow %q, want %d, %q", c.method, c.path, resp.StatusCode, resp.Header.Get("Allow"), c.status, c.allow)
		}
	}
	s.Close() // after this nobody observes
	if len(seen) != 12 || seen[0] != "/leases 405" || seen[11] != "other 404" {
		t.Errorf("observed %q", seen)
	}
}

// TestAStoppedStoreIsNeverAConflict: what an old daemon takes for the end of its lease must not come from a failure.
func TestAStoppedStoreIsNeverAConflict(t *testing.T) {
	pool, err := lease.NewPool(netip.MustParsePrefix("10.255.0.0/16"), 24)
	if err != nil {
		t.Fatal(err)
	}
	store, err := leasesql.Open(t.Context(), leasesql.Config{
		DB: sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "leases.db")}, Pool: pool, Expiration: time.Hour, Staleness: time.Hour,
	}, discard)
	if err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := store.Run(ended); err != nil {
		t.Fatal(err)
	}
	store.Close()
	s := serve(t, store, leasehttp.HandlerOptions{Timeout: time.Second})
	for _, c := range []struct{ method, path, body, prefix string }{
		{"PUT", "/leases/acquire", `{"underlay_ip":"10.0.0.5"}`, "acquire-subnet-lease: "},
		{"PUT", "/leases/renew", `{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.4.0/24","overlay_hardware_addr":"ee:ee:0a:ff:04:00"}`, "renew-subnet-lease: "},
		{"PUT", "/leases/release", `{"underlay_ip":"10.0.0.5"}`, "release lease: "},
	} {
		resp, got := ask(t, s.Client(), c.method, s.URL+c.path, c.body)
		if resp.StatusCode != 500 || !strings.HasPrefix(got, `{"error": "`+c.prefix) {
			t.Errorf("%s: %d %s, want 500 with %q", c.path, resp.StatusCode, got, c.prefix)
		}
	}
	// Readers are served what was known for a second.
	for start := time.Now(); ; {
		resp, got := ask(t, s.Client(), "GET", s.URL+"/leases", "")
		if resp.StatusCode == 500 && strings.HasPrefix(got, `{"error": "all-routable-leases: getting all leases: `) {
			break
		}
		if resp.StatusCode != 200 || time.Since(start) > 10*time.Second {
			t.Fatalf("list: %d %s, want 500 soon", resp.StatusCode, got)
		}
	}
}

func TestWatchTellsOfAChangeAndOfNone(t *testing.T) {
	store := openSQLite(t, "10.255.0.0/16", 24)
	// A listener whose limits are shorter than the waits.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lim := service.Limits{Header: time.Second, Body: 50 * time.Millisecond, Write: 50 * time.Millisecond, Idle: time.Second}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- service.Run(ctx, discard, service.HTTP("api", ln, nil, leasehttp.Handler(store, discard, leasehttp.HandlerOptions{}), lim, discard))
	}()
	c := leasehttp.NewClient("http://"+ln.Addr().String(), nil, leasehttp.ClientOptions{Wait: time.Second})
	defer c.Close()

	first, err := c.Watch(t.Context(), lease.Revision{})
	if err != nil || !first.Full || first.Count != 0 {
		t.Fatalf("first watch: %+v, %v", first, err)
	}
	start := time.Now()
	same, err := c.Watch(t.Context(), first.Revision)
	if err != nil || same.Changes() || same.Revision != first.Revision || same.Count != first.Count || same.Sum != first.Sum {
		t.Errorf("watch without news: %+v, %v, want the seal of %+v", same, err, first)
	}
	if took := time.Since(start); took < 900*time.Millisecond {
		t.Errorf("watch without news answered after %v, want its wait of a second", took)
	}
	told := make(chan lease.Update, 1)
	go func() {
		u, err := c.Watch(t.Context(), first.Revision)
		if err != nil {
			t.Error(err)
		}
		told <- u
	}()
	l, err := c.Acquire(t.Context(), netip.MustParseAddr("10.0.0.1"), lease.Block)
	if err != nil {
		t.Fatal(err)
	}
	u := <-told
	after, err := u.Apply(nil)
	if err != nil || !slices.Equal(after, []lease.Lease{l}) {
		t.Errorf("told %+v, which makes %v, %v, want %v", u, after, err, l)
	}

	// A stopping controller lets its watchers go to another one.
	go func() {
		_, err := c.Watch(t.Context(), u.Revision)
		if !errors.Is(err, fault.Unavailable) {
			t.Errorf("watch of a stopping controller: %v, want unavailable", err)
		}
		told <- lease.Update{}
	}()
	stop()
	<-told
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// waiting is a registry whose watches tell when they wait.
type waiting struct {
	*leasesql.Store
	entered chan struct{}
}

func (w waiting) Watch(ctx context.Context, since lease.Revision) (lease.Update, error) {
	w.entered <- struct{}{}
	return w.Store.Watch(ctx, since)
}

func TestTooManyWatchersAreTurnedAway(t *testing.T) {
	store := openSQLite(t, "10.255.0.0/16", 24)
	w := waiting{store, make(chan struct{}, 8)}
	s := serve(t, w, leasehttp.HandlerOptions{Watchers: 2})
	full, err := store.Watch(t.Context(), lease.Revision{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var left atomic.Int32
	done := make(chan struct{})
	for range 2 {
		go func() {
			c := leasehttp.NewClient(s.URL, nil, leasehttp.ClientOptions{Wait: time.Minute})
			defer c.Close()
			c.Watch(ctx, full.Revision)
			if left.Add(1) == 2 {
				close(done)
			}
		}()
		<-w.entered
	}
	resp, body := ask(t, s.Client(), "GET", s.URL+"/v1/leases/watch?since="+full.Revision.String(), "")
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("third watcher: %d %s, want 503 with Retry-After", resp.StatusCode, body)
	}
	// Others are served meanwhile.
	if resp, body := ask(t, s.Client(), "PUT", s.URL+"/leases/acquire", `{"underlay_ip":"10.0.0.1"}`); resp.StatusCode != 200 {
		t.Errorf("acquire beside watchers: %d %s", resp.StatusCode, body)
	}
	cancel()
	<-done
}

// serveTLS serves h as the controller does and returns the URL.
func serveTLS(t *testing.T, c service.Certificates, h http.Handler) string {
	t.Helper()
	tc, err := c.Server()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- service.Run(ctx, discard, service.HTTP("api", ln, tc, h, service.DefaultLimits, discard))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "https://" + ln.Addr().String()
}

// TestWholeListsTakeTurns: a watch that is answered with a long list needs a place among the lists.
func TestWholeListsTakeTurns(t *testing.T) {
	store := openSQLite(t, "10.0.0.0/8", 24)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for n := w; n < 400; n += 8 {
				if _, err := store.Acquire(t.Context(), netip.AddrFrom4([4]byte{172, 16, byte(n >> 8), byte(n)}), lease.Block); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for u := (lease.Update{}); u.Count < 400; { // watchers are shown changes a little later
		var err error
		if u, err = store.Watch(t.Context(), u.Revision); err != nil {
			t.Fatal(err)
		}
	}
	l := listing{store, make(chan struct{}), make(chan struct{})}
	s := serve(t, l, leasehttp.HandlerOptions{Lists: 1})
	done := make(chan struct{})
	go func() {
		defer close(done)
		ask(t, s.Client(), "GET", s.URL+leasehttp.PathLeases, "")
	}()
	<-l.entered
	if resp, body := ask(t, s.Client(), "GET", s.URL+leasehttp.PathWatch, ""); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("whole list beside another: %d %.100s, want 503 with Retry-After", resp.StatusCode, body)
	}
	close(l.leave)
	<-done
	if _, body := ask(t, s.Client(), "GET", s.URL+leasehttp.PathWatch, ""); strings.Count(body, "underlay_ip") != 400 {
		t.Errorf("watch answered %.200s, want 400 leases", body)
	}
}

// listing is a registry whose lists tell when they are asked for, and wait.
type listing struct {
	*leasesql.Store
	entered, leave chan struct{}
}

func (l listing) Leases(ctx context.Context) ([]lease.Lease, error) {
	l.entered <- struct{}{}
	<-l.leave
	return l.Store.Leases(ctx)
}

func TestACertificateSpeaksOnlyForItsHost(t *testing.T) {
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	certs := func(name string, addr string) service.Certificates {
		cert, key, err := ca.Issue(name, netip.MustParseAddr(addr))
		if err != nil {
			t.Fatal(err)
		}
		return service.Certificates{CA: ca.CertFile(), Cert: cert, Key: key}
	}
	url := serveTLS(t, certs("controller", "127.0.0.1"), leasehttp.Handler(openSQLite(t, "10.255.0.0/16", 24), discard, leasehttp.HandlerOptions{BindUnderlay: true}))
	client := func(c *tls.Config, err error) *leasehttp.Client {
		if err != nil {
			t.Fatal(err)
		}
		k := leasehttp.NewClient(url, c, leasehttp.ClientOptions{})
		t.Cleanup(k.Close)
		return k
	}
	a, b := client(certs("a", "10.0.0.1").Client()), client(certs("b", "10.0.0.2").Client())
	hostA := netip.MustParseAddr("10.0.0.1")
	l, err := a.Acquire(t.Context(), hostA, lease.Block)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Acquire(t.Context(), hostA, lease.Block)
	for what, err := range map[string]error{"acquire": err, "renew": b.Renew(t.Context(), l), "release": b.Release(t.Context(), hostA)} {
		if !errors.Is(err, fault.Denied) || !strings.Contains(err.Error(), `"b"`) || !strings.Contains(err.Error(), "10.0.0.2") {
			t.Errorf("%s for another host: %v, want denied, naming the certificate and its address", what, err)
		}
	}
	if err := a.Renew(t.Context(), l); err != nil {
		t.Error(err)
	}
	if ls, err := b.Leases(t.Context()); err != nil || !slices.Equal(ls, []lease.Lease{l}) {
		t.Errorf("leases seen by another host: %v, %v, want %v", ls, err, l)
	}
	if err := a.Release(t.Context(), hostA); err != nil {
		t.Error(err)
	}
	none, err := (service.Certificates{CA: ca.CertFile(), Cert: filepath.Join(filepath.Dir(ca.CertFile()), "a.crt"), Key: filepath.Join(filepath.Dir(ca.CertFile()), "a.key")}).Client()
	if err != nil {
		t.Fatal(err)
	}
	none.GetClientCertificate = nil
	if err := client(none, nil).Release(t.Context(), hostA); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without a certificate: %v, want no connection", err)
	}
}
