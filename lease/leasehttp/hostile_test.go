package leasehttp_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// TestASlowBodyTakesNobodysPlace has clients that send headers and no body, as many as there are places.
func TestASlowBodyTakesNobodysPlace(t *testing.T) {
	s := serve(t, openSQLite(t, "10.255.0.0/16", 24), leasehttp.HandlerOptions{Changes: 2})
	for range 4 {
		c, err := net.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "PUT /leases/renew HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n")
		if _, err := c.Read(make([]byte, 1)); err != nil { // the server is waiting for the body when it says that it may come
			t.Fatal(err)
		}
	}
	if resp, body := ask(t, http.DefaultClient, "PUT", s.URL+"/leases/acquire", `{"underlay_ip":"10.0.0.5"}`); resp.StatusCode != 200 {
		t.Errorf("acquire beside slow clients: %d %s", resp.StatusCode, body)
	}
}

// TestAWatcherFromTheFutureGetsEverything is what follows a database that was restored to an earlier revision of the same epoch while no controller ran.
func TestAWatcherFromTheFutureGetsEverything(t *testing.T) {
	reg := openSQLite(t, "10.255.0.0/16", 24)
	s := serve(t, reg, leasehttp.HandlerOptions{})
	c := leasehttp.NewClient(s.URL, nil, leasehttp.ClientOptions{Wait: 1})
	l, err := c.Acquire(t.Context(), netip.MustParseAddr("10.0.0.5"), lease.Block)
	if err != nil {
		t.Fatal(err)
	}
	now, err := c.Watch(t.Context(), lease.Revision{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := c.Watch(t.Context(), lease.Revision{Epoch: now.Revision.Epoch, Counter: now.Revision.Counter + 1000})
	if err != nil || !u.Full || len(u.Set) != 1 || u.Set[0] != l {
		t.Errorf("watch from the future = %+v, %v, want everything", u, err)
	}
}

// failing is a registry whose every answer is one error.
type failing struct {
	lease.Registry
	err error
}

func (f failing) Renew(context.Context, lease.Lease) error { return f.err }
func (f failing) Acquire(context.Context, netip.Addr, lease.Kind) (lease.Lease, error) {
	return lease.Lease{}, f.err
}

const renewal = `{"underlay_ip":"10.0.0.5","overlay_subnet":"10.255.4.0/24","overlay_hardware_addr":"ee:ee:0a:ff:04:00"}`

// TestOnlyAConflictEndsALease: a 409 ends an old daemon. Of all that a registry may say, one kind is worth that.
func TestOnlyAConflictEndsALease(t *testing.T) {
	for kind := fault.Internal; kind <= fault.Unavailable; kind++ {
		s := serve(t, failing{err: fault.New(kind, fmt.Errorf("the reason"))}, leasehttp.HandlerOptions{})
		resp, body := ask(t, http.DefaultClient, "PUT", s.URL+"/leases/renew", renewal)
		if got := resp.StatusCode == http.StatusConflict; got != (kind == fault.Conflict) {
			t.Errorf("a renewal that ends with %v is answered %d %s", kind, resp.StatusCode, body)
		}
	}
}

// TestAnOutageIsNotLoggedForEveryRequest counts the lines that a thousand failing requests leave.
func TestAnOutageIsNotLoggedForEveryRequest(t *testing.T) {
	for _, kind := range []fault.Kind{fault.Internal, fault.Unavailable, fault.Conflict, fault.Exhausted} {
		var buf bytes.Buffer
		var mu sync.Mutex
		log := slog.New(slog.NewTextHandler(writer(func(b []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return buf.Write(b)
		}), nil))
		h := leasehttp.Handler(failing{err: fault.New(kind, fmt.Errorf("the reason"))}, log, leasehttp.HandlerOptions{})
		for range 500 {
			for path, body := range map[string]string{"/leases/renew": renewal, "/leases/acquire": `{"underlay_ip":"10.0.0.5"}`, "/leases/release": `{`} {
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("PUT", path, strings.NewReader(body)))
			}
		}
		if n := strings.Count(buf.String(), "\n"); n == 0 || n > 60 {
			t.Errorf("1500 requests, of which 1000 ended with %v, left %d lines, want a few", kind, n)
		}
		if !strings.Contains(buf.String(), "the reason") {
			t.Errorf("the reason is not in the log: %s", buf.String())
		}
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }
