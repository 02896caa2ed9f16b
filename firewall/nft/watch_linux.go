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
