package authorityhttp_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
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
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/registration"
)

var discard = slog.New(slog.DiscardHandler)

var (
	own    = netip.MustParseAddr("10.0.16.5")
	idle   = netip.MustParseAddr("10.0.16.7") // speaks for itself, holds no lease
	subnet = netip.MustParsePrefix("10.255.30.0/24")
)

// world is a controller's container CA behind mutual TLS.
type world struct {
	*httptest.Server
	client *authorityhttp.Client
	ca     *pki.CA

	mu       sync.Mutex
	root     *authority.Root
	rootErr  error
	leases   map[netip.Addr][]netip.Prefix
	leaseErr error
	outcomes []authorityhttp.Outcome
}

func newRoot(t testing.TB) *authority.Root {
	t.Helper()
	cert, key, err := authority.NewRoot("root", 365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r, err := authority.ParseRoot(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func serve(t testing.TB) *world {
	t.Helper()
	ca, err := pki.OpenCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{ca: ca, root: newRoot(t), leases: map[netip.Addr][]netip.Prefix{own: {subnet}}}
	src := authorityhttp.Source{
		Root: func() (*authority.Root, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.root, w.rootErr
		},
		Subnets: func(_ context.Context, host netip.Addr) ([]netip.Prefix, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.leases[host], w.leaseErr
		},
		Domains: []registration.Name{"apps.internal"}, TrustDomain: "silk.internal", Validity: authority.MaxIntermediate,
	}
	w.Server = httptest.NewUnstartedServer(authorityhttp.Handler(src, discard, authorityhttp.HandlerOptions{Count: func(o authorityhttp.Outcome) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.outcomes = append(w.outcomes, o)
	}}))
	tc, err := w.pair(t, "controller", netip.MustParseAddr("127.0.0.1")).Server()
	if err != nil {
		t.Fatal(err)
	}
	w.Listener = tls.NewListener(w.Listener, tc) // StartTLS would show a certificate of its own
	w.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	w.Start()
	w.URL = strings.Replace(w.URL, "http:", "https:", 1)
	t.Cleanup(w.Close)
	w.client = w.dial(t, "host", own, idle)
	return w
}

func (w *world) pair(t testing.TB, name string, addrs ...netip.Addr) service.Certificates {
	t.Helper()
	cert, key, err := w.ca.Issue(name, addrs...)
	if err != nil {
		t.Fatal(err)
	}
	return service.Certificates{CA: w.ca.CertFile(), Cert: cert, Key: key}
}

func (w *world) tls(t testing.TB, name string, addrs ...netip.Addr) *tls.Config {
	t.Helper()
	tc, err := w.pair(t, name, addrs...).Client()
	if err != nil {
		t.Fatal(err)
	}
	return tc
}

func (w *world) dial(t testing.TB, name string, addrs ...netip.Addr) *authorityhttp.Client {
	t.Helper()
	c := authorityhttp.NewClient(w.URL, w.tls(t, name, addrs...), authorityhttp.ClientOptions{})
	t.Cleanup(c.Close)
	return c
}

// last returns how the last request ended.
func (w *world) last() authorityhttp.Outcome {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.outcomes) == 0 {
		return ""
	}
	return w.outcomes[len(w.outcomes)-1]
}

func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func request(t testing.TB) (crypto.Signer, []byte) {
	t.Helper()
	k, err := authority.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := authority.NewRequest(k)
	if err != nil {
		t.Fatal(err)
	}
	return k, csr
}

func TestAHostGetsWhatItsLeaseIsFor(t *testing.T) {
	w := serve(t)
	k, csr := request(t)
	g, err := w.client.Intermediate(t.Context(), own, csr)
	if err != nil {
		t.Fatal(err)
	}
	i, err := authority.NewIntermediate(g.Certificate, k)
	if err != nil {
		t.Fatal(err)
	}
	c := i.Constraints()
	if i.TrustedBy(g.Roots) != nil || !g.Roots.Equal(w.root.Bundle()) || !slices.Equal(c.Subnets, []netip.Prefix{subnet}) || c.TrustDomain != "silk.internal" || w.last() != authorityhttp.Issued {
		t.Errorf("%+v with roots %v, outcome %s", c, g.Roots, w.last())
	}
	// A lease of a single address, beside the block.
	single := netip.MustParsePrefix("10.255.0.9/32")
	w.set(func() { w.leases[own] = []netip.Prefix{subnet, single} })
	g, err = w.client.Intermediate(t.Context(), own, csr)
	if err != nil {
		t.Fatal(err)
	}
	if i, err = authority.NewIntermediate(g.Certificate, k); err != nil || !i.Covers(single.Addr(), subnet.Addr().Next()) {
		t.Errorf("%v, %v", i.Constraints().Subnets, err)
	}
	b, err := w.client.Roots(t.Context())
	if err != nil || !b.Equal(w.root.Bundle()) {
		t.Errorf("roots %v, %v", b, err)
	}
	if b, err := w.dial(t, "anybody").Roots(t.Context()); err != nil || !b.Equal(w.root.Bundle()) {
		t.Errorf("roots for anybody: %v, %v", b, err)
	}
}

func TestRefusals(t *testing.T) {
	w := serve(t)
	_, csr := request(t)
	stranger := netip.MustParseAddr("10.0.16.6")
	down := fault.Unavailablef("the database is away at 10.9.9.9")
	for name, c := range map[string]struct {
		client  *authorityhttp.Client
		host    netip.Addr
		csr     string
		before  func()
		kind    fault.Kind
		outcome authorityhttp.Outcome
	}{
		"another host":          {w.client, stranger, string(csr), nil, fault.Denied, authorityhttp.Foreign},
		"no address in its own": {w.dial(t, "nobody"), own, string(csr), nil, fault.Denied, authorityhttp.Foreign},
		"mapped":                {w.client, netip.AddrFrom16(own.As16()), string(csr), nil, fault.Invalid, authorityhttp.Malformed},
		"zone":                  {w.client, netip.MustParseAddr("fe80::1%x"), string(csr), nil, fault.Invalid, authorityhttp.Malformed},
		"no lease":              {w.client, idle, string(csr), nil, fault.Denied, authorityhttp.NoLease},
		"no request":            {w.client, own, "", nil, fault.Invalid, authorityhttp.Malformed},
		"long body":             {w.client, own, strings.Repeat("x", 17<<10), nil, fault.Invalid, authorityhttp.Malformed},
		"lease released":        {w.client, own, string(csr), func() { w.leases = nil }, fault.Denied, authorityhttp.NoLease},
		"database away":         {w.client, own, string(csr), func() { w.leaseErr = down }, fault.Unavailable, authorityhttp.Unavailable},
		"broken files":          {w.client, own, string(csr), func() { w.rootErr = down }, fault.Unavailable, authorityhttp.Unavailable},
	} {
		w.set(func() {
			w.leases, w.leaseErr, w.rootErr = map[netip.Addr][]netip.Prefix{own: {subnet}}, nil, nil
			if c.before != nil {
				c.before()
			}
		})
		g, err := c.client.Intermediate(t.Context(), c.host, []byte(c.csr))
		if !errors.Is(err, c.kind) || g.Certificate != nil || w.last() != c.outcome {
			t.Errorf("%s: %v, outcome %s, want %v and %s", name, err, w.last(), c.kind, c.outcome)
		}
		if err != nil && strings.Contains(err.Error(), "10.9.9.9") {
			t.Errorf("%s: the caller is told %v", name, err)
		}
	}
}

// TestWithoutMutualTLS: even a listener that asks nobody for a certificate gives nothing away.
func TestWithoutMutualTLS(t *testing.T) {
	w := serve(t)
	plain := httptest.NewServer(w.Config.Handler)
	defer plain.Close()
	c := authorityhttp.NewClient(plain.URL, nil, authorityhttp.ClientOptions{})
	defer c.Close()
	_, csr := request(t)
	if _, err := c.Intermediate(t.Context(), own, csr); !errors.Is(err, fault.Denied) {
		t.Errorf("intermediate: %v", err)
	}
	if _, err := c.Roots(t.Context()); !errors.Is(err, fault.Denied) {
		t.Errorf("roots: %v", err)
	}
}

// TestACertificateThatEndsWhileItsConnectionLasts: who keeps a connection busy does not go on as a host whose certificate was not renewed.
func TestACertificateThatEndsWhileItsConnectionLasts(t *testing.T) {
	w := serve(t)
	_, csr := request(t)
	body, err := json.Marshal(map[string]string{"underlay_ip": own.String(), "csr": string(csr)})
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		from, to time.Duration // now
		status   int
		outcome  authorityhttp.Outcome
	}{
		"valid":   {-time.Hour, time.Hour, http.StatusOK, authorityhttp.Issued},
		"ended":   {-time.Hour, -time.Second, http.StatusForbidden, authorityhttp.Foreign},
		"to come": {time.Hour, 2 * time.Hour, http.StatusForbidden, authorityhttp.Foreign},
	} {
		now := time.Now()
		r := httptest.NewRequest(http.MethodPost, authorityhttp.PathIntermediate, bytes.NewReader(body))
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{IPAddresses: []net.IP{own.AsSlice()}, NotBefore: now.Add(c.from), NotAfter: now.Add(c.to)}}}
		rec := httptest.NewRecorder()
		w.Config.Handler.ServeHTTP(rec, r)
		if rec.Code != c.status || w.last() != c.outcome || (rec.Header().Get("Connection") == "close") != (c.status != http.StatusOK) {
			t.Errorf("%s: status %d, outcome %s, Connection %q, want %d and %s", what, rec.Code, w.last(), rec.Header().Get("Connection"), c.status, c.outcome)
		}
	}
}

// TestALoopIsHarmless: a host that asks without pause is put off, and others are not.
func TestALoopIsHarmless(t *testing.T) {
	w := serve(t)
	_, csr := request(t)
	var refused error
	for range 20 {
		if _, refused = w.client.Intermediate(t.Context(), own, csr); refused != nil {
			break
		}
	}
	if !errors.Is(refused, fault.Unavailable) || w.last() != authorityhttp.TooOften {
		t.Errorf("20 requests at once: %v, outcome %s", refused, w.last())
	}
	if _, err := w.client.Intermediate(t.Context(), idle, csr); !errors.Is(err, fault.Denied) {
		t.Errorf("another host: %v", err)
	}
}

func TestPathsAndMethodsAreExact(t *testing.T) {
	w := serve(t)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: w.tls(t, "host", own)}}
	defer c.CloseIdleConnections()
	for _, x := range []struct {
		method, path, allow string
		status              int
	}{
		{"GET", "/container-ca/intermediate", "POST", 405}, {"HEAD", "/container-ca/roots", "GET", 405}, {"POST", "/container-ca/roots", "GET", 405},
		{"GET", "/container-ca/", "", 404}, {"GET", "/container-ca/roots/", "", 404}, {"POST", "/container-ca/../container-ca/intermediate", "", 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), x.method, w.URL+x.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != x.status || resp.Header.Get("Allow") != x.allow {
			t.Errorf("%s %s: %d, Allow %q", x.method, x.path, resp.StatusCode, resp.Header.Get("Allow"))
		}
	}
}

// TestAnswersThatCannotBeUsed: a client meets whatever a server may say.
func TestAnswersThatCannotBeUsed(t *testing.T) {
	root := string(newRoot(t).Bundle().PEM())
	say := func(a map[string]any) string {
		b, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, c := range map[string]struct {
		status int
		body   string
		kind   fault.Kind
	}{
		"not JSON":       {200, "<html>", fault.Internal},
		"nothing":        {200, "{}", fault.Internal},
		"no roots":       {200, say(map[string]any{"certificates": root, "roots": "", "expires": time.Now()}), fault.Internal},
		"bad time":       {200, say(map[string]any{"certificates": root, "roots": root, "expires": "soon"}), fault.Internal},
		"too long":       {200, strings.Repeat(" ", 2<<20) + "{}", fault.Internal},
		"not configured": {404, "404 page not found", fault.NotFound},
		"a redirect":     {307, "", fault.Internal},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(c.status)
			io.WriteString(w, c.body)
		}))
		k := authorityhttp.NewClient(s.URL, nil, authorityhttp.ClientOptions{})
		if _, err := k.Intermediate(t.Context(), own, nil); err == nil || fault.Of(err) != c.kind {
			t.Errorf("%s: intermediate: %v, want %v", name, err, c.kind)
		}
		if _, err := k.Roots(t.Context()); err == nil || fault.Of(err) != c.kind {
			t.Errorf("%s: roots: %v, want %v", name, err, c.kind)
		}
		k.Close()
		s.Close()
	}
	k := authorityhttp.NewClient("http://127.0.0.1:1", nil, authorityhttp.ClientOptions{Timeout: time.Second})
	if _, err := k.Roots(t.Context()); !errors.Is(err, fault.Unavailable) {
		t.Errorf("nobody there: %v", err)
	}
}

func FuzzRequest(f *testing.F) {
	w := serve(f)
	_, csr := request(f)
	body, err := json.Marshal(map[string]string{"underlay_ip": own.String(), "csr": string(csr)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{"underlay_ip":"::ffff:10.0.16.5","csr":null}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", authorityhttp.PathIntermediate, strings.NewReader(string(body)))
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}
		rec := httptest.NewRecorder()
		w.Config.Handler.ServeHTTP(rec, r)
		if rec.Code != 400 && rec.Code != 403 { // nobody's certificate
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
	})
}
