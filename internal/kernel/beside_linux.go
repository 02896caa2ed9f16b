package kernel

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Beside returns the address of the local socket that stands beside a TCP port of the loopback interface, as package net has it. It
// is an abstract one: like the port it belongs to a network namespace, and is gone with its process.
func Beside(port int) string { return "@silk/127.0.0.1:" + strconv.Itoa(port) }

// DialBeside connects to the local socket beside a TCP port, in the calling thread's namespace. Connecting and each later read fails
// after the timeout. Anybody can take an abstract address, so only one that this process's own user listens on will do. It takes
// a tenth of what DialLoopback and a request do, on both sides.
func DialBeside(port int, timeout time.Duration) (*File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	if err := dialBeside(fd, port, timeout); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", Beside(port), err)
	}
	return newFile(fd, Beside(port)), nil
}

func dialBeside(fd, port int, timeout time.Duration) error {
	if err := setTimeouts(fd, timeout); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: Beside(port)}); err != nil {
		if errors.Is(err, unix.EAGAIN) { // the queue of those who wait to be accepted is full
			err = os.ErrDeadlineExceeded
		}
		return err
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	if own := unix.Geteuid(); int(peer.Uid) != own {
		return fmt.Errorf("user %d listens there, not user %d", peer.Uid, own)
	}
	return nil
}

// setTimeouts bounds connecting, and each write and read.
func setTimeouts(fd int, timeout time.Duration) error {
	tv := unix.NsecToTimeval(int64(timeout))
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &tv); err != nil {
			return fmt.Errorf("set socket timeout: %w", err)
		}
	}
	return nil
}
