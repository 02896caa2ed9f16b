package leasehttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/lease"
)

func of(underlay, subnet string) lease.Lease {
	p := netip.MustParsePrefix(subnet)
	return lease.Lease{Underlay: netip.MustParseAddr(underlay), Subnet: p, MAC: lease.MACOf(p)}
}

// answering serves every request with one answer, as a controller of any kind might give it.
func answering(t *testing.T, status int, body string) *Client {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		w.Write([]byte(body))
	}))
	t.Cleanup(s.Close)
	c := NewClient(s.URL+"/", nil, ClientOptions{})
	t.Cleanup(c.Close)
	return c
}

func TestBadLeasesOfAListAreLeftOutAndTold(t *testing.T) {
	c := answering(t, 200, `{"leases":[
		{"underlay_ip":"10.0.0.1","overlay_subnet":"10.255.1.0/24","overlay_hardware_addr":"ee:ee:0a:ff:01:00"},
		{"underlay_ip":"10.0.0.2","overlay_subnet":"10.255.2.0/24","overlay_hardware_addr":"nonsense"},
		{"underlay_ip":"banana","overlay_subnet":"10.255.3.0/24","overlay_hardware_addr":"ee:ee:0a:ff:03:00"},
		{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.5.0/24","overlay_hardware_addr":"ee:ee:0a:ff:05:00","more":1}]}`)
	ls, err := c.Leases(t.Context())
	a, e := of("10.0.0.1", "10.255.1.0/24"), of("10.0.0.5", "10.255.5.0/24")
	if want := []lease.Lease{a, e}; !slices.Equal(ls, want) {
		t.Errorf("leases %v, want %v", ls, want)
	}
	p, ok := errors.AsType[*Partial](err)
	if !ok || len(p.Skipped) != 2 {
		t.Fatalf("%v, want a Partial of two leases", err)
	}
	if errors.Is(err, fault.Invalid) {
		t.Error("the caller is blamed for the answer")
	}
	for l, want := range map[lease.Lease]bool{
		a:                               false, // neither host nor subnet of one left out
		of("10.0.0.2", "10.255.2.0/24"): true,
		of("10.0.0.2", "10.255.9.0/24"): false, // that host has another subnet now
		of("10.0.0.3", "10.255.3.0/24"): true,  // the host could not be read
	} {
		if p.May(l) != want {
			t.Errorf("May(%v) = %v, want %v", l, !want, want)
		}
	}
	if p := (&Partial{[]Skipped{{}}}); !p.May(a) {
		t.Error("a lease of which nothing could be read cannot be any lease")
	}
}

func TestAnAnswerWithoutAListIsNoEmptyList(t *testing.T) {
	for _, body := range []string{`{}`, `null`, `{"leases":null}`, `{"leases":{}}`, `[]`, ``, `<html>`, `{"leases":[]`} {
		if ls, err := answering(t, 200, body).Leases(t.Context()); err == nil {
			t.Errorf("%q was read as %v", body, ls)
		}
	}
	if ls, err := answering(t, 200, `{"leases":[]}`).Leases(t.Context()); err != nil || len(ls) != 0 {
		t.Errorf("the empty list: %v, %v", ls, err)
	}
	for _, body := range []string{`{}`, `{"revision":""}`, `{"revision":"x"}`, `null`, `{"revision":"a.1","gone":["x"]}`} {
		if u, err := answering(t, 200, body).Watch(t.Context(), lease.Revision{}); err == nil {
			t.Errorf("%q was read as %+v", body, u)
		} else if errors.Is(err, fault.Invalid) {
			t.Errorf("%q: the caller is blamed: %v", body, err)
		}
	}
}

func TestWhatStatusesMeanToAClient(t *testing.T) {
	l := of("10.0.0.1", "10.255.1.0/24")
	calls := map[string]func(*Client) error{
		"acquire": func(c *Client) error { _, err := c.Acquire(t.Context(), l.Underlay, lease.Block); return err },
		"renew":   func(c *Client) error { return c.Renew(t.Context(), l) },
		"release": func(c *Client) error { return c.Release(t.Context(), l.Underlay) },
		"list":    func(c *Client) error { _, err := c.Leases(t.Context()); return err },
		"watch":   func(c *Client) error { _, err := c.Watch(t.Context(), lease.Revision{}); return err },
	}
	for _, c := range []struct {
		call   string
		status int
		want   fault.Kind
	}{
		{"acquire", 409, fault.Exhausted}, {"renew", 409, fault.Conflict}, {"watch", 404, fault.NotFound},
		{"renew", 403, fault.Denied}, {"renew", 500, fault.Internal}, {"renew", 503, fault.Unavailable}, {"renew", 502, fault.Unavailable},
		{"acquire", 500, fault.Internal}, {"release", 500, fault.Internal}, {"list", 500, fault.Internal}, {"renew", 307, fault.Internal},
	} {
		err := calls[c.call](answering(t, c.status, `{"error": "why"}`))
		if fault.Of(err) != c.want || errors.Is(err, fault.Conflict) != (c.want == fault.Conflict) {
			t.Errorf("%s answered %d is %v (%v), want %v", c.call, c.status, fault.Of(err), err, c.want)
		}
		if se, ok := errors.AsType[*httpjson.StatusError](err); !ok || se.Status != c.status || se.Text != "why" {
			t.Errorf("%s answered %d: %v does not hold the answer", c.call, c.status, err)
		}
	}
	for name, call := range calls {
		c := NewClient("http://127.0.0.1:1", nil, ClientOptions{})
		if err := call(c); !errors.Is(err, fault.Unavailable) {
			t.Errorf("%s with nobody listening: %v, want unavailable", name, err)
		}
	}
}

func TestASilentControllerIsUnavailable(t *testing.T) {
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer s.Close()
	defer close(release)
	c := NewClient(s.URL, nil, ClientOptions{Timeout: 20 * time.Millisecond, Wait: time.Second})
	if err := c.Renew(t.Context(), of("10.0.0.1", "10.255.1.0/24")); !errors.Is(err, fault.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("renew: %v, want unavailable for the deadline", err)
	}
	if _, err := c.Watch(t.Context(), lease.Revision{}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("watch: %v, want unavailable", err)
	}
}

func TestAcquireRefusesAnAnswerForAnother(t *testing.T) {
	for _, body := range []string{
		`{"underlay_ip":"10.0.0.2","overlay_subnet":"10.255.1.0/24","overlay_hardware_addr":"ee:ee:0a:ff:01:00"}`,
		`{"underlay_ip":"10.0.0.1","overlay_subnet":"10.255.1.0/24","overlay_hardware_addr":"ee:ee:0a:ff:01:01"}`,
		`{}`,
	} {
		l, err := answering(t, 200, body).Acquire(t.Context(), netip.MustParseAddr("10.0.0.1"), lease.Block)
		if err == nil || fault.Of(err) != fault.Internal {
			t.Errorf("%s: %v, %v, want an internal error", body, l, err)
		}
	}
}

func TestTraceparentIsSent(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	got := make(chan string, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("TRACEPARENT")
		w.Write([]byte("{}"))
	}))
	defer s.Close()
	c := NewClient(s.URL, nil, ClientOptions{Traceparent: parent})
	defer c.Close()
	if err := c.Release(t.Context(), netip.MustParseAddr("10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	if g := <-got; g != parent || !httpjson.IsTraceparent(g) {
		t.Errorf("traceparent %q, want %q", g, parent)
	}
	for _, bad := range []string{"", "00", strings.Replace(parent, "-", "_", 1), strings.ToUpper(parent), parent + "0"} {
		if httpjson.IsTraceparent(bad) {
			t.Errorf("%q passes as a traceparent", bad)
		}
	}
}

// TestEncodingIsWhatEncodingJSONWouldSay holds the hand-written encoders to the standard one.
func TestEncodingIsWhatEncodingJSONWouldSay(t *testing.T) {
	for n := range 3 {
		var ls []lease.Lease
		wire := []wireLease{}
		for i := range n {
			l := of(fmt.Sprintf("10.0.0.%d", i+1), fmt.Sprintf("10.255.%d.0/24", i+1))
			ls, wire = append(ls, l), append(wire, wireOf(l))
		}
		want, err := json.Marshal(map[string]any{"leases": wire})
		if err != nil {
			t.Fatal(err)
		}
		if got := encodeList(ls); string(got) != string(want) {
			t.Errorf("list of %d is %s, want %s", n, got, want)
		}
		u := lease.Update{Revision: lease.Revision{Epoch: "e-1", Counter: 7}, Full: n == 1, Set: ls, Gone: []netip.Prefix{}, Count: n, Sum: lease.Digest(ls)}
		for i := range n {
			u.Gone = append(u.Gone, netip.MustParsePrefix(fmt.Sprintf("10.255.%d.0/24", i+100)))
		}
		got, err := decodeUpdate(encodeUpdate(u))
		if err != nil || got.Revision != u.Revision || got.Full != u.Full || !slices.Equal(got.Set, u.Set) || !slices.Equal(got.Gone, u.Gone) || got.Count != u.Count || got.Sum != u.Sum {
			t.Errorf("%+v came back as %+v, %v", u, got, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"leases":[]}`, `{"leases":[{"underlay_ip":"10.0.0.1","overlay_subnet":"10.255.1.0/24","overlay_hardware_addr":"ee:ee:0a:ff:01:00"}]}`,
		`{"leases":[null,1,"x",[],{}]}`, `{"leases":[{"underlay_ip":7}]}`, `{"leases":[{"underlay_ip":"fe80::1%eth0","overlay_subnet":"fd00::/64"}]}`,
		`{"revision":"a.1","full":true,"set":[{"underlay_ip":"10.0.0.1"}],"gone":["10.255.1.0/24"],"count":1,"sum":"x"}`, `{"revision":1}`, ``, `{`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		ls, err := decodeList(body)
		checkDecoded(t, ls, err)
		u, err := decodeUpdate(body)
		checkDecoded(t, u.Set, err)
		if errors.Is(err, fault.Invalid) {
			t.Fatalf("the caller is blamed: %v", err)
		}
		var w wireLease
		if json.Unmarshal(body, &w) == nil {
			if l, err := w.parse(); err == nil {
				checkDecoded(t, []lease.Lease{l}, nil)
			}
		}
	})
}

func checkDecoded(t *testing.T, ls []lease.Lease, err error) {
	t.Helper()
	p, partial := errors.AsType[*Partial](err)
	if err != nil && !partial && len(ls) > 0 {
		t.Fatalf("%v beside %v", err, ls)
	}
	if partial && (len(p.Skipped) == 0 || p.Error() == "") {
		t.Fatalf("%+v: a partial list without a reason", p)
	}
	for _, l := range ls {
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		if again, err := wireOf(l).parse(); err != nil || again != l {
			t.Fatalf("reading back %v gave %v, %v", l, again, err)
		}
		var w wireLease
		if err := json.Unmarshal(appendLease(nil, l), &w); err != nil || w != wireOf(l) {
			t.Fatalf("encoding %v gave %+v, %v", l, w, err)
		}
	}
}
