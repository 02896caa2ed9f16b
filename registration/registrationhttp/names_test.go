package registrationhttp_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

func addrs(texts ...string) (list []netip.Addr) {
	for _, s := range texts {
		list = append(list, netip.MustParseAddr(s))
	}
	return list
}

// counted counts the answers of a status.
func counted(h http.Handler, status int) (http.Handler, *atomic.Int64) {
	var n atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code == status {
			n.Add(1)
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes())
	}), &n
}

func TestNames(t *testing.T) {
	table := registration.NewTable()
	h, unchanged := counted(registrationhttp.NamesHandler(table, yes), http.StatusNotModified)
	c := registrationhttp.NewNames(serve(t, h).URL, 0)
	defer c.Close()
	asked := addrs("10.255.0.1", "10.255.0.2", "fd00::1")
	last := ""
	expect := func(want string, changed bool) {
		t.Helper()
		names, revision, err := c.Of(t.Context(), asked)
		if got := fmt.Sprint(names); err != nil || got != want || (revision != last) != changed {
			t.Errorf("%s, revision %q after %q, %v; want %s, changed %v", got, revision, last, err, want, changed)
		}
		last = revision
	}
	expect("map[]", true)
	register(table, "b.apps.internal", "10.255.0.1", -1)
	register(table, "a.apps.internal", "10.255.0.1", -1)
	register(table, "six", "fd00::1", -1)
	expect("map[10.255.0.1:[a.apps.internal b.apps.internal] fd00::1:[six]]", true)
	register(table, "a.apps.internal", "10.255.0.9", -1) // nobody asks for it
	expect("map[10.255.0.1:[a.apps.internal b.apps.internal] fd00::1:[six]]", false)
	expect("map[10.255.0.1:[a.apps.internal b.apps.internal] fd00::1:[six]]", false)
	if n := unchanged.Load(); n != 2 {
		t.Errorf("%d answers were sent only as unchanged, want 2", n)
	}
	asked = addrs("::ffff:10.255.0.9")
	expect("map[10.255.0.9:[a.apps.internal]]", true)
	table.Unregister("a.apps.internal", netip.MustParseAddr("10.255.0.9"))
	expect("map[]", true)
}

// TestNamesOfOwners: a name is not that of who has the address by now, if it was registered for another group.
func TestNamesOfOwners(t *testing.T) {
	table := registration.NewTable()
	c := registrationhttp.NewNames(serve(t, registrationhttp.NamesHandler(table, yes)).URL, 0)
	defer c.Close()
	at := netip.MustParseAddr("10.255.0.1")
	for name, group := range map[registration.Name]string{"old": "one", "new": "two", "some": ""} {
		table.Register(registration.Registration{Name: name, Address: at, Index: -1, Group: group})
	}
	for group, want := range map[string]string{"one": "[old some] [new]", "two": "[new some] [old]", "three": "[some] [new old]"} {
		names, others, err := c.OfOwners(t.Context(), []registrationhttp.Owner{{Address: netip.MustParseAddr("::ffff:10.255.0.1"), Group: group}})
		if got := fmt.Sprint(names[at], others[at]); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", group, got, err, want)
		}
	}
	_, before, err := c.Of(t.Context(), []netip.Addr{at})
	if err != nil {
		t.Fatal(err)
	}
	table.Register(registration.Registration{Name: "old", Address: at, Index: -1, Group: "two"})
	if _, after, err := c.Of(t.Context(), []netip.Addr{at}); err != nil || after == before {
		t.Errorf("a name that is another group's by now has the revision %q, as before: %v", after, err)
	}
	names, others, err := c.OfOwners(t.Context(), []registrationhttp.Owner{{Address: at, Group: "two"}})
	if err != nil || len(names[at]) != 3 || len(others[at]) != 0 {
		t.Errorf("%v, %v, %v", names, others, err)
	}
	if _, _, err := c.OfOwners(t.Context(), make([]registrationhttp.Owner, registrationhttp.MaxAddresses+1)); !errors.Is(err, fault.Invalid) {
		t.Errorf("too many addresses: %v", err)
	}
}

// TestNamesOfManyAddresses fit into a request.
func TestNamesOfManyAddresses(t *testing.T) {
	table := registration.NewTable()
	c := registrationhttp.NewNames(serve(t, registrationhttp.NamesHandler(table, yes)).URL, 0)
	defer c.Close()
	var asked []netip.Addr
	for i := range registrationhttp.MaxAddresses {
		a := netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x12, 4: 0x34, 6: 0x56, 8: 0x78, 10: 0x9a, 13: 1, 14: byte(i >> 8), 15: byte(i)})
		asked = append(asked, a)
		register(table, "a", a.String(), -1)
	}
	if names, _, err := c.Of(t.Context(), asked); err != nil || len(names) != len(asked) {
		t.Errorf("names of %d addresses, %v, want %d", len(names), err, len(asked))
	}
	if _, _, err := c.Of(t.Context(), append(asked, asked[0])); !errors.Is(err, fault.Invalid) {
		t.Errorf("too many addresses: %v", err)
	}
}

func TestNamesAreNotKnown(t *testing.T) {
	h := registrationhttp.NamesHandler(registration.NewTable(), func() bool { return false })
	s := serve(t, h)
	c := registrationhttp.NewNames(s.URL, time.Second)
	defer c.Close()
	if _, _, err := c.Of(t.Context(), addrs("10.255.0.1")); !errors.Is(err, fault.Unavailable) {
		t.Errorf("of a cold table: %v", err)
	}
	s.Close()
	if _, _, err := c.Of(t.Context(), addrs("10.255.0.1")); !errors.Is(err, fault.Unavailable) {
		t.Errorf("of a server that is gone: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := c.Of(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want cancelled", err)
	}
}

func TestNamesHandlerRefuses(t *testing.T) {
	h := registrationhttp.NamesHandler(registration.NewTable(), yes)
	for target, status := range map[string]int{
		"/v1/names": 200, "/v1/names?address=10.0.0.1": 200, "/v1/names/": 404, "/": 404, "/v1/names?address=x": 400, "/v1/names?address=": 400,
		"/v1/names?address=fe80::1%25eth0": 400, "/v1/names?" + strings.Repeat("address=10.0.0.1&", registrationhttp.MaxAddresses+1): 400,
	} {
		if w := ask(t, h, "GET", target); w.Code != status {
			t.Errorf("%.60s: %d %s, want %d", target, w.Code, w.Body, status)
		}
	}
	if w := ask(t, h, "HEAD", "/v1/names"); w.Code != 405 || w.Header().Get("Allow") != "GET" {
		t.Errorf("HEAD: %d, %v", w.Code, w.Header())
	}
	tag := ask(t, h, "GET", "/v1/names").Header().Get("ETag")
	for header, status := range map[string]int{tag: 304, "W/" + tag: 304, `"x", ` + tag: 304, "*": 304, `"x"`: 200, "": 200} {
		if w := ask(t, h, "GET", "/v1/names", "If-None-Match", header); w.Code != status {
			t.Errorf("If-None-Match %s: %d, want %d", header, w.Code, status)
		}
	}
}

func FuzzNamesHandler(f *testing.F) {
	for _, s := range []string{"address=10.255.0.1", "address=10.255.0.1&address=x", "%", "address=::1%25a"} {
		f.Add(s, `"x"`)
	}
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	h := registrationhttp.NamesHandler(table, yes)
	f.Fuzz(func(t *testing.T, query, match string) {
		r := httptest.NewRequest("GET", "/v1/names", nil)
		r.URL.RawQuery = query
		r.Header.Set("If-None-Match", match)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == 304 {
			return
		}
		parse(t, w.Body.String())
		q, _ := url.ParseQuery(query)
		if w.Code != 200 && w.Code != 400 || w.Code == 400 && len(q["address"]) == 0 {
			t.Fatalf("%q: %d %s", query, w.Code, w.Body)
		}
	})
}
