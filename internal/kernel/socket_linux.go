package kernel

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Socket opens a socket in ns, nil for the calling thread's namespace, that is closed on exec. It belongs to ns for as long as it is
// open, whoever uses it. The caller closes it.
func Socket(ns *NS, family, typ, protocol int) (int, error) {
	var fd int
	open := func() (err error) {
		fd, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC, protocol)
		return err
	}
	var err error
	if ns == nil {
		err = open()
	} else {
		err = ns.dip(open)
	}
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	return fd, nil
}

// dip runs fn in the namespace, like Do, and keeps the thread: making one and giving it up takes ten times what a socket does. fn must
// change nothing else of the thread. A thread that finds no way back is given up after all.
func (n *NS) dip(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // its namespaces are what /proc/PID/ns shows of the process
			runtime.UnlockOSThread()
			errc <- n.Do(fn)
			return
		}
		back, err := openOwn()
		if err != nil {
			runtime.UnlockOSThread()
			errc <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer unix.Close(back)
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			errc <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = fn()
		if unix.Setns(back, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		errc <- err
	}()
	return <-errc
}
