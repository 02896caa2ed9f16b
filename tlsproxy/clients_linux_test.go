package tlsproxy

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

var mutual = endpoint.TLSListener{Listen: 61443, Forward: 8080, ClientAuth: true}

// agent answers like the policy agent's /peer: every connection is of one group.
type agent struct {
	group   atomic.Value // of string; "" for not known
	asked   atomic.Value // the last question
	address string
}

func newAgent(t *testing.T, group string) *agent {
	a := &agent{}
	a.group.Store(group)
	port := freePort(t)
	l, err := net.Listen("unix", policyhttp.PeerSocket(uint16(port)))
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.asked.Store(r.URL.Query())
		g := a.group.Load().(string)
		if r.URL.Path != "/peer" || g == "" {
			http.NotFound(w, r)
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"tag": "0012", "group": g})
	}))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	a.address = fmt.Sprintf("127.0.0.1:%d", port)
	return a
}

// tries connects with a certificate, and returns why it came to nothing. With TLS 1.3 a client hears of that with its first read.
func (m *member) tries(to *member, change ...func(*tls.Config)) error {
	m.w.t.Helper()
	c, _, err := m.secure(to, change...)
	if c != nil {
		defer c.Close()
	}
	if err != nil {
		return err
	}
	return said(c, "hello")
}

func shows(t *testing.T, p issued) func(*tls.Config) {
	c := p.tls(t)
	return func(tc *tls.Config) { // also one that the server does not ask for
		tc.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
	}
}

func TestClientsProveWhoTheyAre(t *testing.T) {
	w := newWorld(t)
	a := newAgent(t, "web")
	r := w.start(func(c *Config) { c.PolicyAgent, c.TrustDomain = a.address, "silk.internal" })
	api, web := w.attach(mutual), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	other := newIssuer(t)
	spiffe := func(id string) func(*x509.Certificate) {
		return func(x *x509.Certificate) {
			u, err := url.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			x.URIs, x.Subject = []*url.URL{u}, pkix.Name{}
		}
	}
	good := w.ca.issue(t, web.address, "web")
	for _, x := range []struct {
		what  string
		shown issued
		why   reason
		good  bool
	}{
		{"Diego's certificate", good, 0, true},
		{"a SPIFFE id", w.ca.issue(t, web.address, "web", spiffe("spiffe://silk.internal/group/web")), 0, true},
		{"another trust domain", w.ca.issue(t, web.address, "web", spiffe("spiffe://elsewhere/group/web")), badClient, false},
		{"another group", w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.Subject.OrganizationalUnit = []string{"app:api"} }), foreignGroup, false},
		{"no group", w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.Subject.OrganizationalUnit = nil }), badClient, false},
		{"another address", w.ca.issue(t, api.address, "web"), foreignAddress, false},
		{"no address", w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.IPAddresses = nil }), foreignAddress, false},
		{"another authority", other.issue(t, web.address, "web"), badClient, false},
		{"for servers", w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), badClient, false},
		{"expired", w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Minute) }), badClient, false},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			before := r.refusals(api, x.why)
			err := web.tries(api, shows(t, x.shown), func(tc *tls.Config) { tc.MaxVersion = version })
			if x.good != (err == nil) {
				t.Errorf("%s, version %x: %v", x.what, version, err)
			}
			if !x.good {
				testkit.Until(t, patience, x.what+": the refusal is counted as "+x.why.String(), func() bool { return r.refusals(api, x.why) == before+1 })
			}
		}
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := web.tries(api, func(tc *tls.Config) { tc.MaxVersion = version }); err == nil || !strings.Contains(err.Error(), "bad certificate") {
			t.Errorf("no certificate, version %x: %v", version, err)
		}
	}
	q := a.asked.Load().(url.Values)
	from, err := netip.ParseAddrPort(q.Get("source"))
	if err != nil || from.Addr() != web.address || q.Get("destination") != netip.AddrPortFrom(api.address, 61443).String() || q.Get("protocol") != "tcp" {
		t.Errorf("the policy agent was asked %v", q)
	}
	a.group.Store("")
	if err := web.tries(api, shows(t, good)); err == nil {
		t.Error("a connection that the agent does not know got in")
	}
	testkit.Until(t, patience, "the refusal is counted", func() bool { return r.refusals(api, unknownGroup) == 1 })
	testkit.Until(t, patience, "the log says what to do", func() bool { return hasText(r.log.String(), "see that the policy agent runs") })
}

// TestNoTicketStandsForAClient: whoever comes back proves who it is again.
func TestNoTicketStandsForAClient(t *testing.T) {
	w := newWorld(t)
	a := newAgent(t, "web")
	r := w.start(func(c *Config) { c.PolicyAgent = a.address })
	api, plain, web := w.attach(mutual), w.attach(standard), w.attach()
	api.listen(8080, echo)
	plain.listen(8080, echo)
	r.listens(api)
	r.listens(plain)
	good := shows(t, w.ca.issue(t, web.address, "web"))
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		a.group.Store("web")
		cache := tls.NewLRUClientSessionCache(10)
		use := func(tc *tls.Config) { tc.MaxVersion, tc.ClientSessionCache, tc.ServerName = version, cache, "" }
		name := func(n string) func(*tls.Config) { return func(tc *tls.Config) { tc.ServerName = n } }
		for n, x := range []*member{plain, plain} {
			c, _ := web.mustSecure(x, use, name(plain.address.String()))
			if err := said(c, "hello"); err != nil || c.ConnectionState().DidResume != (n == 1) {
				t.Errorf("version %x: connection %d, resumed %t: %v", version, n, c.ConnectionState().DidResume, err)
			}
		}
		for range 2 {
			c, _ := web.mustSecure(api, use, good, name(api.address.String()))
			if err := said(c, "hello"); err != nil || c.ConnectionState().DidResume {
				t.Errorf("version %x: resumed %t: %v", version, c.ConnectionState().DidResume, err)
			}
		}
		a.group.Store("other") // what the first connections stood for holds no more
		if err := web.tries(api, use, good, name(api.address.String())); err == nil {
			t.Errorf("version %x: whoever was there before got in as another group", version)
		}
	}
}

// TestTheAgentIsAway: then nobody can say who a client is, and none gets in.
func TestTheAgentIsAway(t *testing.T) {
	w := newWorld(t)
	port := freePort(t)
	silent, err := net.Listen("unix", policyhttp.PeerSocket(uint16(port))) // takes questions and answers none
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	api, web := w.attach(mutual), w.attach()
	api.listen(8080, echo)
	good := shows(t, w.ca.issue(t, web.address, "web"))
	for _, at := range []string{"127.0.0.1:1", fmt.Sprintf("127.0.0.1:%d", port)} {
		r := w.start(func(c *Config) { c.PolicyAgent = at })
		r.listens(api)
		if err := web.tries(api, good); err == nil {
			t.Errorf("agent at %s: it got in", at)
		}
		testkit.Until(t, patience, "the refusal is counted", func() bool { return r.refusals(api, unknownGroup) == 1 })
		r.stop()
	}
}

// TestWithoutAnAgent: address and authority alone count.
func TestWithoutAnAgent(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web, third := w.attach(mutual), w.attach(), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	good := shows(t, w.ca.issue(t, web.address, "web", func(x *x509.Certificate) { x.Subject.OrganizationalUnit = nil }))
	if err := web.tries(api, good); err != nil {
		t.Error(err)
	}
	if err := third.tries(api, good); err == nil {
		t.Error("another container's certificate was good")
	}
	testkit.Until(t, patience, "the refusal is counted", func() bool { return r.refusals(api, foreignAddress) == 1 })
	if err := third.tries(api); err == nil {
		t.Error("without any certificate")
	}
}
