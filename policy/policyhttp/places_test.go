package policyhttp_test

import (
	"bufio"
	"context"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// raw opens a connection from an address and sends the beginning of a request.
func raw(t *testing.T, s *httptest.Server, from, text string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.(*net.TCPConn).SetReadBuffer(4 << 10)
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return c
}

// statusOf reads the status of the answer on a connection.
func statusOf(t *testing.T, c net.Conn) int {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

// TestWhoReadsSlowlyKeepsNobodyOut has one address ask for long lists, and wait, more often than it may, and read nothing.
func TestWhoReadsSlowlyKeepsNobodyOut(t *testing.T) {
	b := backendOf(openStore(t, 0))
	asked := make(chan struct{}, 100)
	rule := policy.Rule{Policy: policytest.Of(t, "a b tcp 1"), SourceTag: 1, DestinationTag: 2}
	long := true
	b.Rules = func(context.Context, policy.Filter) (iter.Seq[policy.Rule], int, error) {
		n := 1
		if long {
			n = 200000 // more than fits in the buffers of a connection
		}
		asked <- struct{}{}
		return func(yield func(policy.Rule) bool) {
			for range n {
				if !yield(rule) {
					return
				}
			}
		}, n, nil
	}
	s := serve(t, b, externalOptions(), policyhttp.InternalOptions{Lists: 8, Watchers: 8})
	const list = "GET " + policyhttp.PathPolicies + " HTTP/1.1\r\nHost: x\r\n\r\n"
	for range 2 {
		raw(t, s, "127.0.0.1", list)
		<-asked
	}
	if code := statusOf(t, raw(t, s, "127.0.0.1", list)); code != 503 {
		t.Errorf("a third list at once for one address: %d, want 503", code)
	}
	long = false
	if code := statusOf(t, raw(t, s, "127.0.0.2", list)); code != 200 {
		t.Errorf("a list for another address: %d", code)
	}
	body := watchBody(`,"wait":60`, "a")
	first := raw(t, s, "127.0.0.1", fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", policyhttp.PathWatch, len(body), body))
	if code := statusOf(t, first); code != 200 { // which says what there is
		t.Fatalf("watch: %d", code)
	}
}

// refused counts the connections on which 503 comes until there are as many as wanted, and for a moment longer.
func refused(all []net.Conn, wanted int) (n int) {
	told := make(chan bool, len(all))
	for _, c := range all {
		go func() {
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			told <- err == nil && resp.StatusCode == 503
		}()
	}
	for end := time.After(20 * time.Second); ; {
		select {
		case is := <-told:
			if is {
				n++
			}
			if n == wanted {
				end = time.After(500 * time.Millisecond)
			}
		case <-end:
			return n
		}
	}
}

// TestLargeBodiesTakeTurns has callers begin large bodies and stop half way.
func TestLargeBodiesTakeTurns(t *testing.T) {
	o := externalOptions()
	o.Bodies = 8
	s := serve(t, backendOf(openStore(t, 0)), o, policyhttp.InternalOptions{Bodies: 8})
	ok := body(item("my-a", "my-b", "tcp", "1"))
	head := func(line, as string, n int) string {
		return fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nAuthorization: bearer %s\r\nContent-Length: %d\r\n\r\n", line, as, n)
	}
	const post, watch = "POST " + policies, "POST " + policyhttp.PathWatch
	large := strings.Repeat(" ", 100<<10)
	var stalled []net.Conn
	for range 6 {
		stalled = append(stalled, raw(t, s, "127.0.0.1", head(post, "dev", 200<<10)+large))
	}
	if full := refused(stalled, 4); full != 4 {
		t.Errorf("%d of six large bodies of one caller were turned away, want all but two", full)
	}
	if code := statusOf(t, raw(t, s, "127.0.0.1", head(post, "dev", len(ok))+ok)); code != 200 {
		t.Errorf("a small body of the same caller: %d", code)
	}
	if code := statusOf(t, raw(t, s, "127.0.0.1", head(post, "admin", len(large)+len(ok))+large+ok)); code != 200 {
		t.Errorf("a large body of another caller: %d", code)
	}
	stalled = stalled[:0]
	for range 3 {
		stalled = append(stalled, raw(t, s, "127.0.0.1", head(watch, "", 200<<10)+large))
	}
	if full := refused(stalled, 1); full != 1 {
		t.Errorf("%d of three large bodies of one agent were turned away, want one", full)
	}
	groups := make([]string, 3000)
	for i := range groups {
		groups[i] = fmt.Sprintf("group-of-a-large-host-%04d", i)
	}
	text := watchBody(`,"wait":0`, groups...)
	if code := statusOf(t, raw(t, s, "127.0.0.2", head(watch, "", len(text))+text)); code != 200 || len(text) < 64<<10 {
		t.Errorf("a large body of another agent: %d", code)
	}
}

// TestManyItemsTakeLittleMemory sends a million items, of which the first is none.
func TestManyItemsTakeLittleMemory(t *testing.T) {
	s := start(t).Server
	text := `{"policies":[` + strings.TrimSuffix(strings.Repeat("{},", 1<<20), ",") + `]}`
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got := ask(t, s, "admin", "POST "+policies, text)
	runtime.ReadMemStats(&after)
	want(t, "a million items", got, 400, `{"error": "mapper: validate policies: missing source id"}`)
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > 60 {
		t.Errorf("a body of %d MiB took %d MiB", len(text)>>20, grown)
	}
}

// TestPlacesAreGivenBack asks in turn, more often than there are places.
func TestPlacesAreGivenBack(t *testing.T) {
	o := externalOptions()
	o.Places, o.Waiting, o.Bodies = 1, 1, 1
	s := serve(t, backendOf(openStore(t, 0)), o, policyhttp.InternalOptions{Lists: 1, Watchers: 1, Bodies: 1})
	large := strings.Repeat(" ", 100<<10)
	for n := range 5 {
		want(t, "create", ask(t, s, "admin", "POST "+policies, large+body(item("a", "b", "tcp", fmt.Sprint(n+1)))), 200, "{}")
		for _, line := range []string{"GET " + policies, "POST " + policies + "?wait=in-force", "GET " + policyhttp.PathPolicies} {
			if got := ask(t, s, "admin", line, body(item("a", "b", "tcp", fmt.Sprint(n+1)))); got.code != 200 {
				t.Errorf("%s: %d %s", line, got.code, got.body)
			}
		}
		want(t, "what is no json", ask(t, s, "admin", "POST "+policies, large+"{"), 400, `{"error": "mapper: unmarshal json: unexpected end of JSON input"}`)
		if got := ask(t, s, "", "POST "+policyhttp.PathWatch, large+watchBody(`,"wait":0`, fmt.Sprint(identity.Group("a"), n))); got.code != 200 {
			t.Errorf("watch: %d %s", got.code, got.body)
		}
	}
}
