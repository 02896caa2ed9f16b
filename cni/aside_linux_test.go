package cni_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/service"
	"golang.org/x/sys/unix"
)

// beside listens on the socket beside the daemon's port, as the user of that number.
func (h *host) beside(user int) net.Listener {
	h.t.Helper()
	var l net.Listener
	if err := h.ns.Do(func() (err error) {
		if user != 0 { // of this thread only, which is given up
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), uintptr(user)); errno != 0 {
				return errno
			}
		}
		l, err = net.Listen("unix", kernel.Beside(h.port))
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close() })
	return l
}

// TestDaemonBesideItsPort: what our daemon says on its socket counts, and the info endpoint is asked only when nobody is there.
func TestDaemonBesideItsPort(t *testing.T) {
	h := newHost(t)
	var asked atomic.Int32
	h.reply = func() string { asked.Add(1); return ready }
	l := h.beside(0)
	var says atomic.Value
	says.Store(strings.ReplaceAll(ready, "10.255.30.", "10.255.40."))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	log := slog.New(slog.DiscardHandler)
	go func() {
		done <- service.Aside("network", l, func() any { return json.RawMessage(says.Load().(string)) }, log).Run(ctx)
	}()
	c := h.container("c1")
	if got := h.add(c).IPs[0].Address; got != "10.255.40.2/32" {
		t.Errorf("address %s, want one of the subnet that the socket tells", got)
	}
	h.del(c)
	says.Store(`{"status":"fenced","reason":"lost"}`)
	if code, text := h.run("ADD", h.config(), c.env()).failure(t); code != 11 || !strings.Contains(text, "fenced") {
		t.Errorf("code %d %s", code, text)
	}
	if code, _ := h.run("STATUS", h.config(), nil).failure(t); code != 51 {
		t.Errorf("STATUS code %d", code)
	}
	says.Store(`"perhaps"`)
	if code, text := h.run("ADD", h.config(), c.env()).failure(t); code != 11 || !strings.Contains(text, "not what was expected") {
		t.Errorf("code %d %s", code, text)
	}
	h.clean()
	if n := asked.Load(); n != 0 {
		t.Errorf("the info endpoint was asked %d times", n)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := h.add(c).IPs[0].Address; got != "10.255.30.2/32" || asked.Load() != 1 {
		t.Errorf("address %s, info endpoint asked %d times", got, asked.Load())
	}
}

// TestStoppedDaemonBesideItsPort: a daemon that is there and does not answer is not asked in another way.
func TestStoppedDaemonBesideItsPort(t *testing.T) {
	t.Parallel() // it takes the 5 s that a daemon has
	h := newHost(t)
	var asked atomic.Int32
	h.reply = func() string { asked.Add(1); return ready }
	h.beside(0) // and accepts nobody
	if code, text := h.run("ADD", h.config(), h.container("c1").env()).failure(t); code != 11 || !strings.Contains(text, os.ErrDeadlineExceeded.Error()) || asked.Load() != 0 {
		t.Errorf("code %d %s, info endpoint asked %d times", code, text, asked.Load())
	}
	h.clean()
}

// TestNobodySpeaksBesideThePort: whoever hangs up without a word is no daemon.
func TestNobodySpeaksBesideThePort(t *testing.T) {
	h := newHost(t)
	l := h.beside(0)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	if code, text := h.run("ADD", h.config(), h.container("c1").env()).failure(t); code != 11 || !strings.Contains(text, io.ErrUnexpectedEOF.Error()) {
		t.Errorf("code %d %s", code, text)
	}
	h.clean()
}

// TestAnotherUserBesideThePort: an abstract address is anybody's, so another user there is not believed.
func TestAnotherUserBesideThePort(t *testing.T) {
	h := newHost(t)
	const other = 65534
	l := h.beside(other)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		lie := func() any { return json.RawMessage(strings.ReplaceAll(ready, "10.255.30.", "10.66.6.")) }
		done <- service.Aside("network", l, lie, slog.New(slog.DiscardHandler)).Run(ctx)
	}()
	if got := h.add(h.container("c1")).IPs[0].Address; got != "10.255.30.2/32" {
		t.Errorf("address %s, want one of the subnet that the info endpoint tells", got)
	}
	cancel()
	<-done
}
