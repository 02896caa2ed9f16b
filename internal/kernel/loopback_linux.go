package kernel

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// DialLoopback connects to a TCP server, which should be on this host, in the calling thread's namespace. Connecting, and each
// later write and read, fails after the timeout. It does without package net, whose poller and threads take longer to
// start than such a server to answer.
func DialLoopback(to netip.AddrPort, timeout time.Duration) (*File, error) {
	family, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()})
	if !to.Addr().Unmap().Is4() {
		family, address = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	if err := setTimeouts(fd, timeout); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if err := unix.Connect(fd, address); err != nil {
		unix.Close(fd)
		if err == unix.EINPROGRESS { // what a timeout is called here
			err = os.ErrDeadlineExceeded
		}
		return nil, fmt.Errorf("connect to %v: %w", to, err)
	}
	return newFile(fd, to.String()), nil
}
