package tlsproxy

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestAClientThatVanishesIsNoticed when it had ended its side before, so that nothing more is read from it, and the container says nothing.
func TestAClientThatVanishesIsNoticed(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.KeepAlive = 1 })
	for _, x := range []struct {
		name   string
		answer string // of the container, which then says nothing more; it is under way when the client has gone
		vanish func(client *member, raw *net.TCPConn)
	}{
		{"cut off", "", func(client *member, _ *net.TCPConn) { netns.Shell(t, client.ns, "ip link set eth0 down") }},
		{"cut off before it took an answer", "answer", func(client *member, _ *net.TCPConn) { netns.Shell(t, client.ns, "ip link set eth0 down") }},
		{"killed", "", func(_ *member, raw *net.TCPConn) {
			raw.SetLinger(0)
			raw.Close()
		}},
	} {
		api, web := w.attach(standard), w.attach()
		netns.Shell(t, api.ns, "sysctl -qw net.ipv4.tcp_retries2=3") // which is said of what is not acknowledged
		ended, vanished, ends := make(chan error, 1), make(chan bool), make(chan error, 1)
		api.listen(8080, func(c *net.TCPConn) {
			defer c.Close()
			_, err := io.Copy(io.Discard, c)
			ended <- err
			<-vanished
			if x.answer != "" { // an empty write would take the error that hangup waits for
				if _, err := io.WriteString(c, x.answer); err != nil {
					ends <- err
					return
				}
			}
			ends <- hangup(c)
		})
		r.listens(api)
		c, raw := web.mustSecure(api)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		x.vanish(web, raw)
		close(vanished)
		testkit.Until(t, 2*patience, "the connection of a client that was "+x.name+" ends", func() bool { return r.port(api).site.count() == 0 })
		if err := <-ends; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: the container saw %v, want a reset", x.name, err)
		}
	}
}

// hangup waits until a connection whose other side has ended is broken, which a read would not tell, and returns by what.
func hangup(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	code := 0
	if err := raw.Read(func(fd uintptr) bool {
		code, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		return err != nil || code != 0
	}); err != nil {
		return err
	}
	return errors.Join(err, syscall.Errno(code))
}

// TestAClientThatPausesIsKept after it ended its side, for as long as it answers.
func TestAClientThatPausesIsKept(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.KeepAlive = 1 })
	api, web := w.attach(standard), w.attach()
	goOn := make(chan bool)
	api.listen(8080, func(c *net.TCPConn) {
		defer c.Close()
		io.Copy(io.Discard, c)
		<-goOn
		io.WriteString(c, "late")
	})
	r.listens(api)
	c, raw := web.mustSecure(api)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := raw.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	// More questions than it takes to give a client up that does not answer.
	testkit.Until(t, 2*patience, "questions are answered", func() bool {
		return hasText(netns.Shell(t, api.ns, "nstat -asz TcpExtTCPKeepAlive | awk '/KeepAlive/ && $2 >= 6 {print \"enough\"}'"), "enough")
	})
	close(goOn)
	if b, err := io.ReadAll(c); string(b) != "late" || err != nil {
		t.Errorf("after a pause: %q, %v", b, err)
	}
}
