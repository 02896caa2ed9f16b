package leasehttp_test

import (
	"fmt"
	"net"
	"net/http"
	"testing"

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
