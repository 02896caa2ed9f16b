package registrationhttp_test

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

// oneName is a table with a at 10.255.0.1.
func oneName() *registration.Table {
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	return table
}

func found(t *testing.T, l *registrationhttp.Lookup) {
	t.Helper()
	got, err := l.Resolve(t.Context(), "a")
	if err != nil || len(got) != 1 || got[0] != netip.MustParseAddr("10.255.0.1") {
		t.Errorf("a is at %v, %v", got, err)
	}
}

// silent returns the address of a listener that takes connections and says nothing.
func silent(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return "http://" + ln.Addr().String()
}

func answering(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		w.Write([]byte(body))
	}
}

// TestLookupGoesToTheNextServer, whatever is wrong with the others.
func TestLookupGoesToTheNextServer(t *testing.T) {
	good := serve(t, registrationhttp.Controller(oneName(), yes, nil)).URL
	cold := serve(t, registrationhttp.Controller(oneName(), func() bool { return false }, nil)).URL
	for what, bad := range map[string]string{
		"nobody listens": "http://127.0.0.1:1", "cold": cold, "silent": silent(t), "unknown host": "http://none.invalid:1",
		"elsewhere": serve(t, answering(302, "")).URL, "not found": serve(t, answering(404, "404 page not found\n")).URL, "no JSON": serve(t, answering(200, "<html>")).URL,
		"no list": serve(t, answering(200, `{}`)).URL, "no addresses": serve(t, answering(200, `{"hosts":[{"ip_address":"x"}]}`)).URL,
		"endless": serve(t, answering(200, `{"hosts":[`+strings.Repeat(" ", 5<<20)+`]}`)).URL,
	} {
		t.Run(what, func(t *testing.T) {
			o := patient
			o.Try = 500 * time.Millisecond
			if what == "silent" {
				o.Try = 50 * time.Millisecond
			}
			l := newLookup(t, o, bad, bad, bad, good)
			found(t, l)
			found(t, l)
			if _, err := newLookup(t, soon, bad).Resolve(t.Context(), "a"); !errors.Is(err, fault.Unavailable) {
				t.Errorf("without another server: %v", err)
			}
		})
	}
}

// TestLookupWaitsForAServer: both are away or cold for a moment, as when a deployment replaces them.
func TestLookupWaitsForAServer(t *testing.T) {
	var warm atomic.Bool
	var asked atomic.Int64
	h := registrationhttp.Controller(oneName(), warm.Load, nil)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 3 {
			warm.Store(true)
		}
		h.ServeHTTP(w, r)
	}))
	found(t, newLookup(t, patient, "http://127.0.0.1:1", s.URL))
}

func TestLookupEndsInTime(t *testing.T) {
	start := time.Now()
	_, err := newLookup(t, soon, silent(t), "http://127.0.0.1:1").Resolve(t.Context(), "a")
	if took := time.Since(start); !errors.Is(err, fault.Unavailable) || !errors.Is(err, context.DeadlineExceeded) || took > 10*time.Second {
		t.Errorf("%v after %v", err, took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newLookup(t, patient, silent(t)).Resolve(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want cancelled", err)
	}
}

// TestLookupStaysWithAGoodServer and keeps its connections.
func TestLookupStaysWithAGoodServer(t *testing.T) {
	var opened atomic.Int64
	var asked [2]atomic.Int64
	var urls []string
	for i := range asked {
		h := registrationhttp.Controller(oneName(), yes, nil)
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked[i].Add(1)
			h.ServeHTTP(w, r)
		}))
		s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
			if st == http.StateNew {
				opened.Add(1)
			}
		}
		s.Start()
		defer s.Close()
		urls = append(urls, s.URL)
	}
	l := newLookup(t, patient, urls...)
	for range 50 {
		found(t, l)
	}
	if a, b := asked[0].Load(), asked[1].Load(); min(a, b) != 0 || max(a, b) != 50 || opened.Load() != 1 {
		t.Errorf("the servers were asked %d and %d times over %d connections, want 50 times one, over 1", a, b, opened.Load())
	}
}

// TestLookupKnowsTheAddressesOfAServer: one name stands for two controllers, of which one is dead.
func TestLookupKnowsTheAddressesOfAServer(t *testing.T) {
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("sdc.internal")
	if err != nil {
		t.Fatal(err)
	}
	files := service.Certificates{CA: ca.CertFile(), Cert: cert, Key: key}
	server, err := files.Server()
	if err != nil {
		t.Fatal(err)
	}
	client, err := files.Client()
	if err != nil {
		t.Fatal(err)
	}
	var host atomic.Value
	h := registrationhttp.Controller(oneName(), yes, nil)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host.Store(r.Host)
		h.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = server
	s.StartTLS()
	defer s.Close()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	hosts := map[string][]netip.Addr{"sdc.internal": addrs("127.0.0.9", "127.0.0.1"), "other.internal": addrs("127.0.0.1")}
	o := patient
	o.Hosts = func(_ context.Context, host string) ([]netip.Addr, error) {
		mu.Lock()
		defer mu.Unlock()
		return hosts[host], nil
	}
	l, err := registrationhttp.NewLookup([]string{"https://sdc.internal:" + u.Port()}, client, o)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 5 {
		found(t, l)
	}
	if want := "sdc.internal:" + u.Port(); host.Load() != want {
		t.Errorf("the server was asked as %v, want %s", host.Load(), want)
	}
	mu.Lock()
	delete(hosts, "sdc.internal") // who tells the addresses is away
	mu.Unlock()
	found(t, l)
	o.Timeout = time.Second
	other, err := registrationhttp.NewLookup([]string{"https://other.internal:" + u.Port()}, client, o)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.Resolve(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a server with the certificate of another: %v", err)
	}
}

// TestLookupIsNotLedAstray: whatever is asked for, a request is for one name, and what cannot be one is asked of nobody.
func TestLookupIsNotLedAstray(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RequestURI() != "/v1/registration/a" && r.URL.RequestURI() != "/v1/registration/%2A.a" {
			t.Errorf("asked for %s", r.URL.RequestURI())
		}
		w.Write([]byte(`{"hosts":[]}`))
	}))
	l := newLookup(t, patient, s.URL)
	for _, name := range []string{"a", "A.", "*.a", "../routes", "a?x", "a/b", "a#b", "a b", "%61", "", ".", "..", "a\r\nX: y"} {
		if got, err := l.Resolve(t.Context(), name); err != nil || len(got) != 0 {
			t.Errorf("%q: %v, %v", name, got, err)
		}
	}
}

func TestNewLookupRefuses(t *testing.T) {
	for _, s := range [][]string{nil, {""}, {"sdc:8054"}, {"ftp://a"}, {"https://"}, {"https://a/b"}, {"https://a?b"}, {"https://a", "://"}} {
		if _, err := registrationhttp.NewLookup(s, nil, soon); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
