package nft

import (
	"context"
	"errors"
	"os"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Watch calls kick once when it listens and again whenever somebody else changed the table, or may have, until ctx ends. kick must not
// block.
func (t *Table) Watch(ctx context.Context, kick func()) error {
	l, err := kernel.Listen(t.ns, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		if stop() {
			l.Close()
		}
	}()
	kick()
	for {
		concerned := false
		err := l.Wait(func(m kernel.Message) { concerned = concerned || concerns(m, t.port) })
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil && !errors.Is(err, kernel.ErrLost):
			return err
		case err != nil || concerned:
			kick()
		}
	}
}

// ear hears whether somebody else changes the table.
type ear struct {
	l       *kernel.Listener
	port    uint32 // whose changes are our own
	changed bool   // or it may have been: the kernel told more than there was room for
}

func listen(ns *kernel.NS, port uint32) (*ear, error) {
	l, err := kernel.Listen(ns, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, err
	}
	return &ear{l: l, port: port}, nil
}

func (e *ear) Close() error { return e.l.Close() }

// touched reports whether anybody may have changed the table since the last call.
func (e *ear) touched() bool {
	e.hear()
	changed := e.changed
	e.changed = false
	return changed
}

// hear reads what the kernel has told.
func (e *ear) hear() {
	err := e.l.Poll(func(m kernel.Message) { e.changed = e.changed || concerns(m, e.port) })
	e.changed = e.changed || err != nil
}

// concerns reports whether an nftables notification is about the table and was not caused by the socket at port.
func concerns(m kernel.Message, port uint32) bool {
	if m.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || m.Port == port || len(m.Body) < 4 || m.Body[0] != unix.NFPROTO_INET {
		return false
	}
	if m.Type&0xff == unix.NFT_MSG_NEWGEN {
		return false
	}
	for t, v := range nfAttrs(m.Body) {
		if t == 1 { // the table, in all of them
			return kernel.Text(v) == Name
		}
	}
	return false
}
