package tlsproxy

import (
	"net"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestAListenerThatIsDestroyed: who administers a container's network may end its sockets, ours too (ss -K). The port listens again.
func TestAListenerThatIsDestroyed(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	c, _ := web.mustSecure(api)
	if err := said(c, "hello"); err != nil {
		t.Fatal(err)
	}
	p := r.port(api)
	p.mu.Lock()
	raw, err := p.listener.(*net.TCPListener).SyscallConn()
	p.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = syscall.Shutdown(int(fd), syscall.SHUT_RD) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	testkit.Until(t, patience, "it listens again", func() bool {
		c, _, err := web.secure(api)
		if err != nil {
			return false
		}
		defer c.Close()
		return said(c, "hello") == nil
	})
	if err := said(c, "hello"); err != nil {
		t.Errorf("a connection of before: %v", err)
	}
}
