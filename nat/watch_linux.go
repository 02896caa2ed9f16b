package nat

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// prefix begins the names of all that is ours in the table.
const prefix = "nat-"

// Watch calls changed once when it listens in ns, nil for the calling thread's namespace, and again for every burst of changes to
// what Set looks after, whoever made them (Set included: a following Set then finds nothing to do). It returns nil when ctx
// ends. changed must not block.
func Watch(ctx context.Context, ns *kernel.NS, changed func()) error {
	l, err := kernel.Listen(ns, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	changed()
	for {
		concerned := false
		err := l.Wait(func(m kernel.Message) { concerned = concerned || concerns(m) })
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (errors.Is(err, os.ErrClosed) || !errors.Is(err, kernel.ErrLost)):
			return err
		case err != nil || concerned:
			changed()
		}
	}
}

// isPortSet reports whether a set is of port maps. Containers come with them, and nobody is to be woken for that.
func isPortSet(name string) bool {
	return slices.ContainsFunc(portSets, func(x portSet) bool { return x.name == name })
}

// concerns reports whether a notification is about the table itself or about what is ours in it.
func concerns(m kernel.Message) bool {
	if m.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Body) < 4 || m.Body[0] != unix.NFPROTO_INET {
		return false
	}
	name := uint16(2) // where the messages about sets, elements and rules have the name of the set or the chain
	switch m.Type & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		name = 0
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		name = unix.NFTA_CHAIN_NAME
	}
	table, ours := "", name == 0
	added := m.Type&0xff == unix.NFT_MSG_NEWSETELEM
	for t, v := range nfAttrs(m.Body) {
		switch t {
		case 1:
			table = kernel.Text(v)
		case name:
			ours = strings.HasPrefix(kernel.Text(v), prefix) && !(added && isPortSet(kernel.Text(v)))
		}
	}
	return table == Table && ours
}
