package registrationhttp_test

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
	"code.cloudfoundry.org/silk/registration/registrationtest"
)

var discard = slog.New(slog.DiscardHandler)

func yes() bool { return true }

func register(table *registration.Table, name, address string, index int) {
	table.Register(registration.Registration{Name: registration.Name(name), Address: netip.MustParseAddr(address), Index: index})
}

func serve(t testing.TB, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func newLookup(t testing.TB, o registrationhttp.LookupOptions, servers ...string) *registrationhttp.Lookup {
	t.Helper()
	l, err := registrationhttp.NewLookup(servers, nil, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// soon lets tests of what fails end early.
var soon = registrationhttp.LookupOptions{Timeout: 300 * time.Millisecond, Try: 100 * time.Millisecond}

// patient is for what must succeed however busy the machine is.
var patient = registrationhttp.LookupOptions{Timeout: 30 * time.Second, Try: 10 * time.Second}

func TestTableResolves(t *testing.T) {
	registrationtest.Run(t, func(_ testing.TB, table *registration.Table, warm func() bool) registrationtest.Resolve {
		return registrationhttp.OfTable(table, warm)
	})
}

func TestLookupResolves(t *testing.T) {
	registrationtest.Run(t, func(t testing.TB, table *registration.Table, warm func() bool) registrationtest.Resolve {
		o := patient
		if !warm() {
			o.Timeout = time.Second
		}
		return newLookup(t, o, serve(t, registrationhttp.Controller(table, warm, nil)).URL).Resolve
	})
}

// ask sends one request as it is written: http.Client would clean the path.
func ask(t *testing.T, h http.Handler, method, target string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func hosts(addrs ...string) string {
	var list []string
	for _, a := range addrs {
		list = append(list, `{"ip_address":"`+a+`","last_check_in":"","port":0,"revision":"","service":"","service_repo_name":"","tags":{}}`)
	}
	return `{"hosts":[` + strings.Join(list, ",") + `],"env":"","service":""}`
}

func TestAnswersAreThoseOfTheDeployedController(t *testing.T) {
	table, warm := registration.NewTable(), true
	var seen []string
	h := registrationhttp.Controller(table, func() bool { return warm }, func(path string, status int, _ time.Duration) { seen = append(seen, fmt.Sprint(path, " ", status)) })
	check := func(method, target string, status int, body string) {
		t.Helper()
		if w := ask(t, h, method, target); w.Code != status || w.Body.String() != body {
			t.Errorf("%s %s: %d %s, want %d %s", method, target, w.Code, w.Body, status, body)
		}
	}
	check("GET", "/routes", 200, `{"addresses":[]}`)
	register(table, "b.apps.internal", "10.255.0.9", -1)
	register(table, "a.apps.internal", "10.255.0.7", -1)
	register(table, "a.apps.internal", "10.255.0.5", -1)
	for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PURGE"} {
		check(method, "/v1/registration/a.apps.internal", 200, hosts("10.255.0.7", "10.255.0.5"))
		check(method, "/routes", 200, `{"addresses":[{"hostname":"a.apps.internal.","ips":["10.255.0.7","10.255.0.5"]},{"hostname":"b.apps.internal.","ips":["10.255.0.9"]}]}`)
	}
	check("GET", "/v1/registration/A.apps.Internal.", 200, hosts("10.255.0.7", "10.255.0.5"))
	check("GET", "/v1/registration/x/a.apps.internal", 200, hosts("10.255.0.7", "10.255.0.5"))
	check("GET", "/v1/registration/none.apps.internal?a.apps.internal", 200, hosts())
	check("GET", "/v1/registration/", 200, hosts())
	check("GET", "/v1/registration/%3f%22", 200, hosts())
	check("GET", "/v1/registration", 404, "404 page not found\n")
	check("GET", "/routes/", 404, "404 page not found\n")
	check("GET", "/", 404, "404 page not found\n")
	warm, seen = false, nil
	check("GET", "/v1/registration/a.apps.internal", 500, "address table is not warm\n")
	table.Unregister("b.apps.internal", netip.MustParseAddr("10.255.0.9"))
	check("GET", "/routes", 200, `{"addresses":[{"hostname":"a.apps.internal.","ips":["10.255.0.7","10.255.0.5"]}]}`) // no names without addresses
	check("GET", "/x", 404, "404 page not found\n")
	if got, want := fmt.Sprint(seen), "[/v1/registration/ 500 /routes 200 other 404]"; got != want {
		t.Errorf("observed %s, want %s", got, want)
	}
}

// TestADumpOfAllNames is as large as a deployment, and as valid.
func TestADumpOfAllNames(t *testing.T) {
	table := registration.NewTable()
	for i := range 20_000 {
		register(table, fmt.Sprintf("app-%d.apps.internal", i), netip.AddrFrom4([4]byte{10, 255, byte(i >> 8), byte(i)}).String(), -1)
	}
	s := serve(t, registrationhttp.Controller(table, yes, nil))
	resp, err := http.Get(s.URL + "/routes")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	v := parse(t, string(b)).(map[string]any)
	if n := len(v["addresses"].([]any)); n != 20_000 {
		t.Errorf("%d names, want 20,000", n)
	}
}
