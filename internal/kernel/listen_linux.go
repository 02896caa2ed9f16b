package kernel

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// listenBuffer is the room for notifications that nobody has read yet, in bytes of kernel memory.
const listenBuffer = 2 << 20

// ErrLost says that notifications were lost, because too many came before they were read: anything may have changed.
var ErrLost = errors.New("netlink notifications were lost")

// Listener hears the notifications of some netlink groups. Poll and Wait are not to be called at the same time; Close
// may be called at any time.
type Listener struct {
	f   *os.File
	buf []byte
}

// Listen subscribes to groups (RTNLGRP_*, NFNLGRP_*) of a protocol (NETLINK_ROUTE, NETLINK_NETFILTER) in ns, nil for the
// calling thread's namespace. It hears everything that changes after it returned.
func Listen(ns *NS, protocol int, groups ...int) (*Listener, error) {
	fd, err := socket(ns, protocol, unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, err
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, listenBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, listenBuffer) // without privilege the system's limit must do
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("listen to netlink group %d of protocol %d: %w", g, protocol, err)
		}
	}
	return &Listener{f: os.NewFile(uintptr(fd), "netlink notifications"), buf: make([]byte, rbSize)}, nil
}

// Close ends a Wait with os.ErrClosed.
func (l *Listener) Close() error { return l.f.Close() }

// Poll calls each for every notification that is waiting and does not block. After ErrLost it has read what was left.
func (l *Listener) Poll(each func(Message)) error {
	conn, err := l.f.SyscallConn()
	if err != nil {
		return err
	}
	var lost, failed error
	err = conn.Read(func(fd uintptr) bool {
		for {
			n, _, err := unix.Recvfrom(int(fd), l.buf, unix.MSG_DONTWAIT)
			switch {
			case err == nil && notifications(l.buf[:n], each):
			case err == nil || errors.Is(err, unix.ENOBUFS):
				lost = ErrLost
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return true
			default:
				failed = fmt.Errorf("receive netlink notifications: %w", err)
				return true
			}
		}
	})
	return errors.Join(err, failed, lost)
}

// Wait blocks until there are notifications and calls each for those of one read. ErrLost is no end: call it again.
func (l *Listener) Wait(each func(Message)) error {
	n, err := l.f.Read(l.buf)
	switch {
	case err == nil && notifications(l.buf[:n], each):
		return nil
	case err == nil || errors.Is(err, unix.ENOBUFS):
		return ErrLost
	case errors.Is(err, os.ErrClosed):
		return os.ErrClosed
	}
	return fmt.Errorf("receive netlink notifications: %w", err)
}

// notifications reads the messages in b and reports whether they were whole.
func notifications(b []byte, each func(Message)) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		l := int(ne.Uint32(b))
		if l < unix.NLMSG_HDRLEN || l > len(b) {
			return false
		}
		each(Message{Type: ne.Uint16(b[4:]), Port: ne.Uint32(b[12:]), Body: b[unix.NLMSG_HDRLEN:l]})
		b = b[min((l+3)&^3, len(b)):]
	}
	return len(b) == 0
}
