package tlsproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/authority/hostca"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

// centre is a controller with a container CA, and a host's silk-dns.
type centre struct {
	t          *testing.T
	controller *httptest.Server
	names      *httptest.Server
	namesPort  int
	table      *registration.Table
	cert, key  string
	ca         string
	state      string
	roots      *x509.CertPool

	mu   sync.Mutex
	away bool
}

var underlay = netip.MustParseAddr("10.0.16.5")

func newCentre(t *testing.T) *centre {
	t.Helper()
	c := &centre{t: t, table: registration.NewTable(), state: filepath.Join(t.TempDir(), "state"), roots: x509.NewCertPool()}
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := authority.NewRoot("root", 365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c.roots.AppendCertsFromPEM(cert)
	root, err := authority.ParseRoot(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	c.controller = httptest.NewUnstartedServer(authorityhttp.Handler(authorityhttp.Source{
		Root: func() (*authority.Root, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.away {
				return nil, os.ErrDeadlineExceeded
			}
			return root, nil
		},
		Subnets: func(context.Context, netip.Addr) ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("10.255.30.0/24")}, nil
		},
		Domains: []registration.Name{"apps.internal"}, TrustDomain: "silk.internal", Validity: authority.MaxIntermediate,
	}, slog.New(slog.DiscardHandler), authorityhttp.HandlerOptions{}))
	serverCert, serverKey, err := ca.Issue("controller", netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	if c.cert, c.key, err = ca.Issue("host", underlay); err != nil {
		t.Fatal(err)
	}
	c.ca = ca.CertFile()
	pair, err := tls.LoadX509KeyPair(serverCert, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	b, err := os.ReadFile(c.ca)
	if err != nil {
		t.Fatal(err)
	}
	pool.AppendCertsFromPEM(b)
	c.controller.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	c.controller.StartTLS()
	c.names = httptest.NewUnstartedServer(registrationhttp.NamesHandler(c.table, func() bool { return true }))
	c.names.Listener.Close()
	c.namesPort = freePort(t)
	if c.names.Listener, err = net.Listen("unix", registrationhttp.NamesSocket(uint16(c.namesPort))); err != nil {
		t.Fatal(err)
	}
	c.names.Start()
	t.Cleanup(c.controller.Close)
	t.Cleanup(c.names.Close)
	return c
}

func (c *centre) setAway(away bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = away
}

// configure makes certificates come from the centre.
func (c *centre) configure(cfg *Config) {
	cfg.Certificates, cfg.CertificateDirectory, cfg.ClientCAFile = FromAuthority, "", ""
	cfg.ServerURL, cfg.CACertFile, cfg.ClientCertFile, cfg.ClientKeyFile = c.controller.URL, c.ca, c.cert, c.key
	cfg.UnderlayIP, cfg.NamesURL, cfg.StateDir = underlay.String(), fmt.Sprintf("http://127.0.0.1:%d", c.namesPort), c.state
}

// called makes silk-dns know a container by a name, or not any more.
func (c *centre) called(m *member, name string, known bool) {
	c.t.Helper()
	r := registration.Registration{Index: -1, Name: registration.Name(name), Address: m.address, Seen: time.Now()}
	if known {
		c.table.Register(r)
	} else {
		c.table.Unregister(r.Name, r.Address)
	}
}

// namesOf returns the names in the certificate that is shown.
func (m *member) namesOf(to *member, c *centre) ([]string, error) {
	conn, _, err := m.secure(to, func(tc *tls.Config) { tc.RootCAs = c.roots })
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	leaf := conn.ConnectionState().PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://silk.internal/group/web" {
		return nil, fmt.Errorf("the certificate is of %v", leaf.URIs)
	}
	return leaf.DNSNames, said(conn, "hello")
}

func TestCertificatesAreIssued(t *testing.T) {
	w, c := newWorld(t), newCentre(t)
	r := w.start(c.configure)
	api, web := w.attachAs("web", standard), w.attach()
	api.listen(8080, echo)
	shows := func(want ...string) {
		t.Helper()
		testkit.Within(t, patience, func() string {
			if got, err := web.namesOf(api, c); err != nil || !slices.Equal(got, want) {
				return fmt.Sprintf("the certificate is for %v, want %v: %v", got, want, err)
			}
			return ""
		})
	}
	shows()
	c.table.Register(registration.Registration{Index: -1, Name: "before.apps.internal", Address: api.address, Group: "another", Seen: time.Now()}) // of who had the address
	testkit.Until(t, patience, "what is another group's is not said", func() bool { return hasText(r.log.String(), "names=[before.apps.internal]") })
	shows()
	c.table.Register(registration.Registration{Index: -1, Name: "before.apps.internal", Address: api.address, Group: "web", Seen: time.Now()})
	shows("before.apps.internal")
	c.called(api, "before.apps.internal", false)
	shows()
	stays, _ := web.mustSecure(api, func(tc *tls.Config) { tc.RootCAs = c.roots })
	c.called(api, "api.apps.internal", true)
	shows("api.apps.internal")
	c.called(api, "0.api.apps.internal", true)
	shows("0.api.apps.internal", "api.apps.internal")
	c.called(api, "api.elsewhere", true) // which the host may not sign for
	testkit.Until(t, patience, "what is left out is said", func() bool { return hasText(r.log.String(), "left_out=[api.elsewhere]") })
	shows("0.api.apps.internal", "api.apps.internal")
	c.called(api, "0.api.apps.internal", false)
	shows("api.apps.internal")
	c.names.CloseClientConnections()
	c.names.Close() // silk-dns is away: names stay
	testkit.Until(t, patience, "it is said", func() bool { return hasText(r.log.String(), "names of containers are not known") })
	shows("api.apps.internal")
	if err := said(stays, "hello"); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(c.state, hostca.RootsFile)); err != nil || !strings.Contains(string(b), "BEGIN CERTIFICATE") {
		t.Errorf("no roots for containers: %v", err)
	}
	c.setAway(true) // a restart without the controller
	r.stop()
	r = w.start(c.configure)
	testkit.Within(t, patience, func() string {
		if _, err := web.namesOf(api, c); err != nil {
			return err.Error()
		}
		return ""
	})
}

// TestNamesOfRecords: what a record wants to be called does not wait for silk-dns.
func TestNamesOfRecords(t *testing.T) {
	index := 3
	l := leaf{called: []string{"b.apps.internal", "a.apps.internal"}, record: endpoint.Record{Advertise: &endpoint.Advertisement{Names: []string{"API.apps.internal.", "a.apps.internal"}, Index: &index}}}
	want := []string{"3.a.apps.internal", "3.api.apps.internal", "a.apps.internal", "api.apps.internal", "b.apps.internal"}
	if got := l.wanted(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestWhenACertificateIsDue(t *testing.T) {
	now := time.Now()
	names := []string{"a"}
	begun := func(at time.Time) *credential {
		return &credential{pair: tls.Certificate{Leaf: &x509.Certificate{NotBefore: at}}}
	}
	good := leaf{made: begun(now.Add(-time.Hour)), names: names, renew: now.Add(time.Hour), got: now.Add(-time.Hour), first: now.Add(-24 * time.Hour)}
	for what, x := range map[string]struct {
		change func(*leaf)
		names  []string
		want   bool
	}{
		"nothing changed":      {func(*leaf) {}, names, false},
		"there is none":        {func(l *leaf) { l.made = nil }, names, true},
		"half its life":        {func(l *leaf) { l.renew = now }, names, true},
		"another intermediate": {func(l *leaf) { l.stale = true }, names, true},
		"another name":         {func(*leaf) {}, []string{"b"}, true},
		"a name less":          {func(*leaf) {}, nil, true},
		"the clock was ahead":  {func(l *leaf) { l.made, l.renew = begun(now.Add(36*time.Hour)), now.Add(48*time.Hour) }, names, true},
		"the clock was behind": {func(l *leaf) { l.got = now.Add(-authority.LeafLife / 2) }, names, true},
		"the clock is behind the controller's": {func(l *leaf) {
			l.made, l.renew, l.first = begun(now.Add(time.Minute)), now.Add(12*time.Hour), now.Add(time.Minute)
		}, names, false},
	} {
		l := good
		x.change(&l)
		if got := l.due(x.names, now); got != x.want {
			t.Errorf("%s: due %t", what, got)
		}
	}
}

// TestContainersOfTwoKindsProveThemselves with what the host issued.
func TestIssuedCertificatesProveClients(t *testing.T) {
	w, c := newWorld(t), newCentre(t)
	a := newAgent(t, "web")
	r := w.start(c.configure, func(cfg *Config) { cfg.PolicyAgent = a.address })
	api, web := w.attachAs("web", mutual), w.attachAs("web", mutual)
	api.listen(8080, echo)
	r.listens(api)
	r.listens(web)
	testkit.Until(t, patience, "both have certificates", func() bool {
		return r.stands(api).Certificate.Serial != "" && r.stands(web).Certificate.Serial != ""
	})
	mine, err := r.certificates.show(r.port(web).site.record) // as the container's own client would have it
	if err != nil {
		t.Fatal(err)
	}
	with := func(tc *tls.Config) {
		tc.RootCAs = c.roots
		tc.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &mine.pair, nil }
	}
	if err := web.tries(api, with); err != nil {
		t.Error(err)
	}
	if err := api.tries(api, with); err == nil {
		t.Error("another container got in with it")
	}
}

// TestWithoutAnAuthorityHandshakesAreRefused, and it is said why.
func TestWithoutAnAuthorityHandshakesAreRefused(t *testing.T) {
	w, c := newWorld(t), newCentre(t)
	c.setAway(true)
	r := w.start(c.configure)
	api, web := w.attachAs("web", standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	if err := web.tries(api); err == nil {
		t.Error("there is no certificate, and it gets in")
	}
	testkit.Until(t, patience, "status says why", func() bool { return hasText(r.stands(api).Certificate.Error, "no intermediate for") })
	c.setAway(false)
	testkit.Within(t, 3*patience, func() string {
		if _, err := web.namesOf(api, c); err != nil {
			return err.Error()
		}
		return ""
	})
}

// TestOneProcessHasTheStateDirectory: a second one ends instead of replacing the intermediate of the first, and can begin when that has ended.
func TestOneProcessHasTheStateDirectory(t *testing.T) {
	w, c := newWorld(t), newCentre(t)
	r := w.start(c.configure)
	cfg := w.config()
	c.configure(&cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	second, err := open(ctx, cfg, w.ns, slog.New(slog.DiscardHandler))
	if err == nil {
		second.close()
	}
	if err == nil || !strings.Contains(err.Error(), "is another silk-tls running with it?") {
		t.Errorf("a second process: %v", err)
	}
	r.stop()
	third, err := open(t.Context(), cfg, w.ns, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	third.close()
	// What cannot be locked is no reason to leave containers without TLS.
	if err := errors.Join(os.Remove(filepath.Join(c.state, lockFile)), os.Mkdir(filepath.Join(c.state, lockFile), 0o700)); err != nil {
		t.Fatal(err)
	}
	if r := w.start(c.configure); !hasText(r.log.String(), "state directory cannot be locked") {
		t.Errorf("nothing is said of it: %s", r.log)
	}
}
