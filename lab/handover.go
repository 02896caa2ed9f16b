package lab

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// handover has the sockets of a host's silk-dns, which outlive it: what is asked while it is being restarted waits in them. On a machine systemd
// holds them (packaging/systemd/silk-dns.socket); here it is the supervisor. One that is adopted has sockets of its own until it is restarted.
type handover struct {
	mu    sync.Mutex
	files []*os.File
}

// open returns the sockets, one for udp and one for tcp, made now if there are none.
func (h *handover) open(ns *kernel.NS, at netip.AddrPort) ([]*os.File, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.files != nil {
		return h.files, nil
	}
	var udp, tcp *os.File
	err := ns.Do(func() (err error) {
		freely := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) { // before silk-dns has given the host the address
			if cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_FREEBIND, 1) }); cerr != nil {
				return cerr
			}
			return err
		}}
		pc, err := freely.ListenPacket(context.Background(), "udp4", at.String())
		if err != nil {
			return err
		}
		defer pc.Close()
		ln, err := freely.Listen(context.Background(), "tcp4", at.String())
		if err != nil {
			return err
		}
		defer ln.Close()
		if udp, err = pc.(*net.UDPConn).File(); err != nil {
			return err
		}
		if tcp, err = ln.(*net.TCPListener).File(); err != nil {
			udp.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	h.files = []*os.File{udp, tcp}
	return h.files, nil
}

// close lets go of the sockets. Nothing is started with them any more.
func (h *handover) close() {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range h.files {
		f.Close()
	}
	h.files = nil
}

// startResolver starts silk-dns with its sockets, in the way of sd_listen_fds(3): who they are for is known only once there is a process.
func (n *node) startResolver(r run) (*process, error) {
	files, err := n.held.open(n.space.net, netip.AddrPortFrom(resolverAddress, 53))
	if err != nil {
		return nil, err
	}
	program := append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@"`, filepath.Join(n.s.programs(), r.program)}, r.args...)
	return n.startWith(n.space, r.role, files, "/bin/sh", program...)
}
