package leasehttp_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"

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
