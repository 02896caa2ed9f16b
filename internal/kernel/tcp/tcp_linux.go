// Package tcp has TCP connections and listeners whose sockets are in another network namespace than the process. They stay there; all
// else about them is as package net has it: they wait in the runtime's poller and keep no thread.
//
// It is no part of package kernel because the CNI plugin, which links that one, starts faster without package net.
package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Listen listens in ns, nil for the calling thread's namespace, on an address that it has, or on all by the unspecified one: an
// IPv4 address for IPv4 alone, an IPv6 one for IPv6 alone. At most backlog connections wait to be accepted, bounded by
// net.core.somaxconn of ns. It can listen at once after another process stopped to, whatever connections that leaves. A port that
// somebody listens on is syscall.EADDRINUSE; an address that ns does not have is syscall.EADDRNOTAVAIL.
func Listen(ns *kernel.NS, addr netip.AddrPort, backlog int) (net.Listener, error) {
	fd, sa, err := socket(ns, addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", addr, err)
	}
	f, err := listen(fd, sa, backlog)
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", addr, err)
	}
	defer f.Close()
	l, err := net.FileListener(f) // has a descriptor of its own
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", addr, err)
	}
	return l, nil
}

// listen takes the descriptor over.
func listen(fd int, sa unix.Sockaddr, backlog int) (*os.File, error) {
	// A listener's connections that are still open, or in TIME-WAIT, keep its port from the next one that does not say this; that
	// another one listens is an error either way.
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tcp listener"), nil
}

// Dial connects to addr from within ns, nil for the calling thread's namespace. It gives up when ctx ends, with its error.
func Dial(ctx context.Context, ns *kernel.NS, addr netip.AddrPort) (net.Conn, error) {
	c, err := dial(ctx, ns, addr)
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w", addr, err)
	}
	return c, nil
}

func dial(ctx context.Context, ns *kernel.NS, addr netip.AddrPort) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fd, sa, err := socket(ns, addr)
	if err != nil {
		return nil, err
	}
	err = unix.Connect(fd, sa)
	if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "tcp connection") // non-blocking, so the poller has it; not before connect, or it is told of a socket that hung up
	defer f.Close()
	if err != nil {
		if err := connected(ctx, f); err != nil {
			return nil, err
		}
	}
	return net.FileConn(f) // has a descriptor of its own
}

// connected waits for the end of a connect that goes on.
func connected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var refused error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			refused = err
			return true
		}
		if code != 0 {
			refused = unix.Errno(code)
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // ENOTCONN: not yet
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(refused, err)
}

// socket returns a non-blocking socket in ns and addr as system calls want it.
func socket(ns *kernel.NS, addr netip.AddrPort) (int, unix.Sockaddr, error) {
	a := addr.Addr()
	if !a.IsValid() {
		return -1, nil, fmt.Errorf("no address: %w", unix.EINVAL)
	}
	if a = a.Unmap(); a.Is4() {
		fd, err := kernel.Socket(ns, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: a.As4()}, err
	}
	zone, err := zoneOf(a)
	if err != nil {
		return -1, nil, err
	}
	fd, err := kernel.Socket(ns, unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return -1, nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, &unix.SockaddrInet6{Port: int(addr.Port()), Addr: a.As16(), ZoneId: zone}, nil
}

// zoneOf returns the number of the device in an IPv6 address; its name would mean one of the process's namespace.
func zoneOf(a netip.Addr) (uint32, error) {
	if a.Zone() == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(a.Zone(), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("zone %q of %v: expected a device's number: %w", a.Zone(), a, unix.EINVAL)
	}
	return uint32(n), nil
}
