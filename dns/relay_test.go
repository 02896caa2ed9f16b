package dns_test

import (
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// relay lets a host reach a NATS server outside its namespace at a port of its loopback interface, until the test ends.
func relay(t testing.TB, h host, port int, n *testkit.NATS) {
	t.Helper()
	var ln net.Listener
	if err := h.ns.Do(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { ln.Close() })
	wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", n.Address())
			if err != nil {
				in.Close()
				continue
			}
			for _, c := range [][2]net.Conn{{in, out}, {out, in}} {
				wg.Go(func() {
					io.Copy(c[0], c[1])
					c[0].Close()
				})
			}
		}
	})
}
