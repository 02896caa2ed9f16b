package lab_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lab"
)

// starts is how many containers the churn test starts: SILK_TEST_STARTS, or a number that suits every run of the tests.
func starts(t *testing.T) int {
	t.Helper()
	text := os.Getenv("SILK_TEST_STARTS")
	if text == "" {
		return 60
	}
	n, err := strconv.Atoi(text)
	do(t, err)
	return n
}

// TestContainersStartUnderPolicyChurn: while policies come and go all the time, no packet that no policy allows arrives, at no instant of a container's
// life, and no allowed connection fails once the container is there.
func TestContainersStartUnderPolicyChurn(t *testing.T) {
	t.Parallel()
	total, batch := starts(t), 20
	l, _ := policed(t, lab.Options{Hosts: 2, Containers: 1})
	for _, h := range []string{"host1", "host2"} {
		_, err := l.AddTo(t.Context(), "evil-"+h, h, "evil")
		do(t, err)
	}
	s := exactly(t, l, "nothing is allowed yet")
	allow(t, l, "web", "fresh")
	allow(t, l, "fresh", "api")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	steady := dialEcho(t, s, "c1", "c2") // from c1 of web on host1 to c2 of api on host2

	var all []netip.AddrPort // every address that a container can have
	for _, h := range s.Hosts {
		for a := h.Lease.Addr().Next().Next(); h.Lease.Contains(a); a = a.Next() {
			all = append(all, netip.AddrPortFrom(a, lab.EchoPort))
		}
	}
	for _, h := range []string{"host1", "host2"} {
		self := container(t, s, "evil-"+h)
		others := without(all, netip.AddrPortFrom(self.Address, lab.EchoPort))
		var pc net.PacketConn
		do(t, nsOf(t, self.Responder.PID).Do(func() (err error) { pc, err = net.ListenPacket("udp4", ":0"); return err }))
		next := 0
		stop := intrudeAt(t, pc, func() []netip.AddrPort { // a few at a time, round and round
			some := make([]netip.AddrPort, 16)
			for i := range some {
				some[i] = others[next%len(others)]
				next++
			}
			return some
		})
		defer stop()
	}
	defer churn(t, l)()

	web := nsOf(t, container(t, s, "c1").Responder.PID)
	begun := time.Now()
	for done := 0; done < total; done += batch {
		startBatch(t, l, web, done, min(batch, total-done))
		steady.check(t, "during the churn")
		if t.Failed() {
			return
		}
	}
	t.Logf("%d containers started and removed in %v", total, time.Since(begun).Round(time.Second))
}

func without(all []netip.AddrPort, one netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range all {
		if a != one {
			out = append(out, a)
		}
	}
	return out
}

// startBatch starts n containers side by side, connects to each as soon as it is there, and removes them.
func startBatch(t *testing.T, l *lab.Lab, web *kernel.NS, first, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			name, host := fmt.Sprintf("x%d", first+i), fmt.Sprintf("host%d", 1+i%2)
			addr, err := l.AddTo(t.Context(), name, host, "fresh")
			if err != nil {
				t.Errorf("start %s: %v", name, err)
				return
			}
			err = web.Do(func() error {
				c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(addr, lab.HTTPPort).String(), 5*time.Second)
				if err == nil {
					c.Close()
				}
				return err
			})
			if err != nil {
				t.Errorf("%s on %s was started, and an allowed connection to it fails: %v", name, host, err)
			}
			if err := l.Remove(t.Context(), name); err != nil {
				t.Errorf("remove %s: %v", name, err)
			}
		})
	}
	wg.Wait()
}

// churn adds and removes policies, of the groups that are used and of others, until stop.
func churn(t *testing.T, l *lab.Lab) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			port := strconv.Itoa(20000 + n%5000)
			for _, args := range [][]string{{"web", "fresh"}, {"fresh", "evil"}, {"other" + port, "api"}, {"evil", "nobody"}} {
				for _, op := range []string{"add", "remove"} {
					if _, err := l.Output(ctx, "policy-server", append([]string{"silk", "policy", op, "--ports", port}, args...)...); err != nil && ctx.Err() == nil {
						t.Errorf("silk policy %s: %v", op, err)
						cancel()
					}
				}
			}
		}
		done <- 8 * n
	}()
	return func() {
		cancel()
		t.Logf("policies changed %d times", <-done)
	}
}
