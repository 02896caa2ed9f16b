package tcp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

// newNS returns a namespace whose loopback interface is up.
func newNS(t testing.TB) *kernel.NS {
	t.Helper()
	ns := netns.New(t)
	c, err := kernel.Dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(1, unix.IFF_UP, unix.IFF_UP))
	if refused, err := c.Do(&b); err != nil || len(refused) > 0 {
		t.Fatal(refused, err)
	}
	return ns
}

func listen(t testing.TB, ns *kernel.NS, addr string) net.Listener {
	t.Helper()
	l, err := tcp.Listen(ns, netip.MustParseAddrPort(addr), 128)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func addrOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// echo sends back what it is sent, until the listener is closed.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // not by pipes, of which package net keeps some
		}()
	}
}

func TestSocketsStayInTheirNamespace(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0"} {
		ns := newNS(t)
		l := listen(t, ns, address)
		go echo(l)
		to := netip.AddrPortFrom(netip.MustParseAddr(strings.Replace(addrOf(l).Addr().String(), "0.0.0.0", "127.0.0.1", 1)), addrOf(l).Port())
		c, err := tcp.Dial(t.Context(), ns, to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got := c.RemoteAddr().String(); got != to.String() {
			t.Errorf("connection to %v says it is to %s", to, got)
		}
		if _, err := io.WriteString(c, "hello"); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
			t.Errorf("%s: read %q, %v", address, got, err)
		}
		for name, other := range map[string]*kernel.NS{"the process's namespace": nil, "another namespace": newNS(t)} {
			if c, err := tcp.Dial(t.Context(), other, to); !errors.Is(err, syscall.ECONNREFUSED) {
				if c != nil {
					c.Close()
				}
				t.Errorf("%s: from %s: %v, want refused", address, name, err)
			}
		}
	}
}

func TestAnIPv4ListenerLeavesIPv6Alone(t *testing.T) {
	ns := newNS(t)
	four := listen(t, ns, "0.0.0.0:0")
	listen(t, ns, netip.AddrPortFrom(netip.IPv6Unspecified(), addrOf(four).Port()).String())
}

func TestErrors(t *testing.T) {
	ns := newNS(t)
	l := listen(t, ns, "127.0.0.1:0")
	for _, c := range []struct {
		addr netip.AddrPort
		want error
	}{
		{addrOf(l), syscall.EADDRINUSE},
		{netip.MustParseAddrPort("192.0.2.1:80"), syscall.EADDRNOTAVAIL},
		{netip.MustParseAddrPort("[fe80::1%eth0]:80"), syscall.EINVAL},
		{netip.AddrPort{}, syscall.EINVAL},
	} {
		if l, err := tcp.Listen(ns, c.addr, 1); !errors.Is(err, c.want) {
			t.Errorf("listen on %v: %v, %v, want %v", c.addr, l, err, c.want)
		}
	}
	if _, err := tcp.Dial(t.Context(), ns, netip.MustParseAddrPort("192.0.2.1:80")); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dial where no route leads: %v", err)
	}
	closed, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	closed.Close()
	if _, err := tcp.Listen(closed, netip.MustParseAddrPort("127.0.0.1:0"), 1); err == nil {
		t.Error("listened in a namespace that is closed")
	}
}

// A process that is started again must listen while connections of the one before linger.
func TestListensAgainBesideOldConnections(t *testing.T) {
	ns := newNS(t)
	l := listen(t, ns, "127.0.0.1:0")
	at := addrOf(l)
	lingering, err := tcp.Dial(t.Context(), ns, at)
	if err != nil {
		t.Fatal(err)
	}
	defer lingering.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	waiting, err := tcp.Dial(t.Context(), ns, at)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	second, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	server.Close()                     // closed here, open there: FIN-WAIT-2
	second.(*net.TCPConn).CloseWrite() // and one in TIME-WAIT:
	if _, err := io.ReadAll(waiting); err != nil {
		t.Fatal(err)
	}
	waiting.Close()
	if _, err := io.ReadAll(second); err != nil {
		t.Fatal(err)
	}
	second.Close()
	again := listen(t, ns, at.String())
	go echo(again)
	c, err := tcp.Dial(t.Context(), ns, at)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// A full queue of connections nobody accepts answers no more SYNs, so connecting waits.
func TestDialHonoursItsContext(t *testing.T) {
	ns := newNS(t)
	l, err := tcp.Listen(ns, netip.MustParseAddrPort("127.0.0.1:0"), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for {
		short, done := context.WithTimeout(ctx, 200*time.Millisecond)
		c, err := tcp.Dial(short, ns, addrOf(l))
		done()
		if err == nil {
			open = append(open, c)
			continue
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("dial of a full listener: %v, want context.DeadlineExceeded", err)
		}
		break
	}
	cancelled, stop := context.WithCancel(ctx)
	result := make(chan error, 1)
	go func() {
		_, err := tcp.Dial(cancelled, ns, addrOf(l))
		result <- err
	}()
	stop()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled dial: %v", err)
	}
	if _, err := tcp.Dial(cancelled, ns, addrOf(l)); !errors.Is(err, context.Canceled) {
		t.Errorf("dial with a context that has ended: %v", err)
	}
}

func TestAcceptEndsWithItsListener(t *testing.T) {
	l := listen(t, newNS(t), "127.0.0.1:0")
	result := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		result <- err
	}()
	l.Close()
	if err := <-result; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept on a closed listener: %v", err)
	}
}

// many opens and closes sockets in namespaces from many goroutines at once.
func many(t *testing.T, n int) {
	t.Helper()
	ns := []*kernel.NS{newNS(t), newNS(t)}
	var listeners []net.Listener
	for _, n := range ns {
		l := listen(t, n, "127.0.0.1:0")
		listeners = append(listeners, l)
		go echo(l)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range n {
				c, err := tcp.Dial(t.Context(), ns[(i+w)%2], addrOf(listeners[(i+w)%2]))
				if err != nil {
					t.Error(err)
					return
				}
				c.(*net.TCPConn).CloseWrite()
				io.ReadAll(c) // or there would soon be more that nobody has accepted than the queue holds
				c.Close()
			}
		})
	}
	wg.Wait()
	for _, l := range listeners {
		l.Close()
	}
	for _, n := range ns {
		n.Close()
	}
}

func count(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestNothingLeaks(t *testing.T) {
	home, err := kernel.CurrentID()
	if err != nil {
		t.Fatal(err)
	}
	many(t, 50)
	files, threads := count(t, "/proc/self/fd"), count(t, "/proc/self/task")
	many(t, 200)
	// Threads are given up only when no way leads back, so all that there may be is what the scheduler likes.
	testkit.Within(t, 10*time.Second, func() string {
		if f, n := count(t, "/proc/self/fd"), count(t, "/proc/self/task"); f > files || n > threads+20 {
			return fmt.Sprintf("%d descriptors and %d threads, before %d and %d", f, n, files, threads)
		}
		return ""
	})
	testkit.Within(t, 10*time.Second, func() string { // those that are given up take a moment to go
		for _, task := range tasks(t) {
			var st unix.Stat_t
			if err := unix.Stat("/proc/self/task/"+task+"/ns/net", &st); err == nil && (kernel.NSID{Dev: uint64(st.Dev), Ino: st.Ino}) != home {
				return "thread " + task + " is left in another namespace"
			}
		}
		return ""
	})
}

func tasks(t *testing.T) (names []string) {
	t.Helper()
	list, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func BenchmarkDial(b *testing.B) {
	ns := newNS(b)
	l := listen(b, ns, "127.0.0.1:0")
	go echo(l)
	for _, c := range []struct {
		name string
		dial func() (net.Conn, error)
	}{
		{"namespace", func() (net.Conn, error) { return tcp.Dial(b.Context(), ns, addrOf(l)) }},
		{"thread", func() (c net.Conn, err error) {
			err = ns.Do(func() error {
				c, err = net.Dial("tcp", l.Addr().String())
				return err
			})
			return c, err
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				c, err := c.dial()
				if err != nil {
					b.Fatal(err)
				}
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		})
	}
}
