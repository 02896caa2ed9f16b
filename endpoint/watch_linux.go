package endpoint

import (
	"context"
	"errors"
	"os"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Watch calls changed once when it listens and again for every burst of changes to the container devices of ns, nil for the calling
// thread's namespace. A container's device comes after its record and goes before it. It returns nil when ctx ends. changed must not
// block.
func Watch(ctx context.Context, ns *kernel.NS, changed func()) error {
	l, err := kernel.Listen(ns, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	changed()
	for {
		concerned := false
		err := l.Wait(func(m kernel.Message) { concerned = concerned || ofContainer(m) })
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !errors.Is(err, kernel.ErrLost):
			return err
		case err != nil || concerned:
			changed()
		}
	}
}

// ofContainer reports whether a notification is about a container's device.
func ofContainer(m kernel.Message) bool {
	if m.Type != unix.RTM_NEWLINK && m.Type != unix.RTM_DELLINK {
		return false
	}
	_, ok := AddressOf(parseDevice(m.Body).name)
	return ok
}
