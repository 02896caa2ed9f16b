package registrationhttp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

func parse(t testing.TB, s string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return v
}

// dnsAnswer spells an answer of the adapter.
func dnsAnswer(status, name, kind string, addrs ...string) string {
	var list []string
	for _, a := range addrs {
		list = append(list, `{"name":`+name+`,"type":1,"TTL":0,"data":"`+a+`"}`)
	}
	return `{"Status":` + status + `,"TC":false,"RD":false,"RA":false,"AD":false,"CD":false,"Question":[{"name":` + name + `,"type":` + kind +
		`}],"Answer":[` + strings.Join(list, ",") + `],"Additional":[],"edns_client_subnet":"0.0.0.0/0"}`
}

func TestAnswersAreThoseOfTheDeployedAdapter(t *testing.T) {
	table := registration.NewTable()
	register(table, "a.apps.internal", "10.255.0.5", 0)
	register(table, "a.apps.internal", "fd00::5", 1) // no A record can say so
	h := registrationhttp.Adapter(registrationhttp.OfTable(table, yes), discard, registrationhttp.AdapterOptions{})
	for _, c := range []struct {
		target string
		status int
		body   string
	}{
		{"/?name=a.apps.internal.&type=1", 200, dnsAnswer("0", `"a.apps.internal."`, "1", "10.255.0.5")},
		{"/?name=A.apps.internal", 200, dnsAnswer("0", `"A.apps.internal"`, "1", "10.255.0.5")},
		{"/any/path?type=1&name=0.a.apps.internal", 200, dnsAnswer("0", `"0.a.apps.internal"`, "1", "10.255.0.5")},
		{"/?name=none.apps.internal.&type=1", 200, dnsAnswer("0", `"none.apps.internal."`, "1")},
		{"/?name=a.apps.internal.&type=28", 200, dnsAnswer("0", `"a.apps.internal."`, "28")},
		{"/?name=a.apps.internal.&type=A", 200, dnsAnswer("0", `"a.apps.internal."`, "0")},
		{"/?name=a.apps.internal.&type=1,%22x%22:1", 200, dnsAnswer("0", `"a.apps.internal."`, "0")},
		{"/?name=a.apps.internal.&type=65536", 200, dnsAnswer("0", `"a.apps.internal."`, "0")},
		{"/?type=28", 200, dnsAnswer("0", `""`, "28")},
		{"/?name=&type=1", 400, dnsAnswer("2", `""`, "1")},
		{"/", 400, dnsAnswer("2", `""`, "1")},
		{"/?name=%22%3C%00", 200, dnsAnswer("0", `"\"\u003c\u0000"`, "1")},
		{"/?name=%ff", 200, dnsAnswer("0", `"\ufffd"`, "1")},
		{"/health", 200, ""},
		{"/health?name=a.apps.internal.", 200, ""},
	} {
		for _, method := range []string{"GET", "POST"} {
			w := ask(t, h, method, c.target)
			if w.Code != c.status || w.Body.String() != c.body {
				t.Errorf("%s %s: %d %s, want %d %s", method, c.target, w.Code, w.Body, c.status, c.body)
			}
			if c.body != "" {
				parse(t, w.Body.String())
			}
		}
	}
}

func TestAdapterShuffles(t *testing.T) {
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	register(table, "a", "10.255.0.2", -1)
	h := registrationhttp.Adapter(registrationhttp.OfTable(table, yes), discard, registrationhttp.AdapterOptions{})
	first := map[bool]int{}
	for range 200 {
		first[strings.Contains(ask(t, h, "GET", "/?name=a").Body.String(), `0.1"},`)]++
	}
	if first[true] < 50 || first[false] < 50 {
		t.Errorf("of 200 answers %d began with one address and %d with the other", first[true], first[false])
	}
}

// TestAdapterFailsInTime: who asks the adapter is told that it does not know, and the log why.
func TestAdapterFailsInTime(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	hangs := func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, fault.New(fault.Unavailable, errors.New("secret cause"))
	}
	w := ask(t, registrationhttp.Adapter(hangs, log, registrationhttp.AdapterOptions{Timeout: 10 * time.Millisecond}), "GET", "/?name=a")
	if w.Code != 500 || !strings.Contains(w.Body.String(), "unavailable") || strings.Contains(w.Body.String(), "secret") {
		t.Errorf("answer %d %s", w.Code, w.Body)
	}
	if !strings.Contains(out.String(), "secret cause") {
		t.Errorf("the log does not say why: %s", out.String())
	}
}

func FuzzAdapter(f *testing.F) {
	for _, s := range []string{"name=a&type=1", "name=%22&type=x", "name=a;b", "type=28", "", "%zz", "name=a&name=b", "name=" + strings.Repeat("a.", 200)} {
		f.Add(s)
	}
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	h := registrationhttp.Adapter(registrationhttp.OfTable(table, yes), discard, registrationhttp.AdapterOptions{})
	f.Fuzz(func(t *testing.T, query string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.RawQuery = query
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var answer struct {
			Status   *int
			Question []struct{ Name string }
			Answer   []struct{ Name, Data string }
		}
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Status == nil || len(answer.Question) != 1 {
			t.Fatalf("%q: %s: %v", query, w.Body, err)
		}
		values, _ := url.ParseQuery(query)
		if want := values.Get("name"); utf8.ValidString(want) && answer.Question[0].Name != want {
			t.Fatalf("%q: asked for %q, the answer is to %q", query, want, answer.Question[0].Name)
		}
		if w.Code != 200 && (w.Code != 400 || values.Get("name") != "" || *answer.Status != 2) {
			t.Fatalf("%q: %d %s", query, w.Code, w.Body)
		}
	})
}

func FuzzController(f *testing.F) {
	for _, s := range []string{"a", "A.", "x/a", "%00", "", "..", "a?b", "*"} {
		f.Add(s)
	}
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	h := registrationhttp.Controller(table, yes, nil)
	f.Fuzz(func(t *testing.T, name string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = registrationhttp.PathRegistration + name
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if got := w.Body.String(); w.Code != 200 || got != hosts() && got != hosts("10.255.0.1") {
			t.Fatalf("%q: %d %s", name, w.Code, got)
		}
	})
}
