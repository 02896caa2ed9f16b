package policyhttp_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"

	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// TestAConnectionThatEndsBetweenRequests: a server, or a proxy before it, that stops or is restarted closes the connections that it takes for idle, perhaps just when
// a request is on its way. What was asked is asked again, since twice is the same as once.
func TestAConnectionThatEndsBetweenRequests(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	served := make(chan int, 10) // requests that each connection answered
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			b := bufio.NewReader(c)
			for n := 0; ; n++ {
				r, err := http.ReadRequest(b)
				if err != nil || n == 1 {
					served <- n
					c.Close()
					break
				}
				io.Copy(io.Discard, r.Body)
				if r.Header.Values("X-Idempotency-Key") != nil {
					t.Error("a header was sent that is for the client only")
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
			}
		}
	}()
	c := client(t, "http://"+ln.Addr().String())
	for n := range 3 {
		if err := c.Create(t.Context(), []policy.Policy{policytest.Of(t, "a b tcp 1")}); err != nil {
			t.Fatalf("request %d: %v", n+1, err)
		}
	}
	if n := <-served; n != 1 {
		t.Errorf("the first connection answered %d requests, want one", n)
	}
}
