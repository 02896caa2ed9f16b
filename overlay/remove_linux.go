package overlay

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Remove takes away the device of that name, with everything on it, and the guard rules; the table goes too if nothing
// of others is in it. What is not there is no error. fault.Conflict: a device of that name is not a VXLAN device; the
// rules are removed all the same.
func (f *Fabric) Remove(ctx context.Context, device string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known = nil
	return errors.Join(f.removeDevice(device), f.removeGuard(ctx))
}

func (f *Fabric) removeDevice(device string) error {
	l, err := f.link(device)
	if err != nil || l == nil {
		return err
	}
	if l.kind != "vxlan" {
		return fault.Conflictf("device %s is of kind %q, not a VXLAN device: it was left alone", device, l.kind)
	}
	var b kernel.Batch
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(l.index, 0, 0)) // by index: a name could have passed to another device
	refused, err := f.rt.Do(&b)
	if err != nil {
		return err
	}
	for _, e := range refused {
		if !errors.Is(e, unix.ENODEV) {
			return fmt.Errorf("delete device %s: %w", device, e)
		}
	}
	return nil
}

// attempts bounds how often others may change nftables between the look and the deed.
const attempts = 20

// removeGuard deletes our chains and set, and the table if they were all there was in it. The kernel deletes a table
// with whatever has come into it, so the transaction holds only if nothing has changed since the look.
func (f *Fabric) removeGuard(ctx context.Context) error {
	for range attempts {
		gen, err := f.nf.Generation()
		if err != nil {
			return err
		}
		b, err := f.guardRemoval()
		if err != nil || b == nil {
			return err
		}
		err = f.nf.Transact(b, gen)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !errors.Is(err, kernel.ErrGeneration) && !errors.Is(err, unix.ENOENT):
			return fmt.Errorf("delete guard rules in nft table inet %s: %w", Table, err)
		}
	}
	return fault.Unavailablef("delete guard rules in nft table inet %s: nftables kept changing", Table)
}

// guardRemoval returns the requests that remove what is ours, nil when nothing is there.
func (f *Fabric) guardRemoval() (*kernel.Batch, error) {
	var b *kernel.Batch
	ours, others, dump := 0, 0, error(nil)
	list := func(get, del, nameAttr uint16, what string) {
		var names []string
		table := func() *kernel.Batch {
			if get == unix.NFT_MSG_GETCHAIN {
				return nfRequest(get, 0)
			}
			return nfRequest(get, 0, Table)
		}
		err := f.nf.Dump(table(), func() { names = nil }, func(m kernel.Message) error {
			var table, name string
			for t, v := range nfAttrs(m.Body) {
				switch t {
				case 1:
					table = kernel.Text(v)
				case nameAttr:
					name = kernel.Text(v)
				}
			}
			if len(m.Body) >= nfgenSize && m.Body[0] == unix.NFPROTO_INET && table == Table {
				names = append(names, name)
			}
			return nil
		})
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
			dump = errors.Join(dump, fmt.Errorf("list nft %s: %w", what, err))
		}
		for _, n := range names {
			if del == 0 || !strings.HasPrefix(n, guardPrefix) {
				others++
				continue
			}
			ours++
			b = add(b, del, nameAttr, n)
		}
	}
	list(unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_NAME, "chains")
	list(unix.NFT_MSG_GETSET, unix.NFT_MSG_DELSET, unix.NFTA_SET_NAME, "sets")
	list(unix.NFT_MSG_GETOBJ, 0, unix.NFTA_OBJ_NAME, "objects")
	list(unix.NFT_MSG_GETFLOWTABLE, 0, 2, "flow tables")
	if dump != nil || others > 0 {
		return b, dump
	}
	err := f.nf.Get(nfRequest(unix.NFT_MSG_GETTABLE, 0, Table), func(kernel.Message) error { return nil })
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return nfRequest(unix.NFT_MSG_DELTABLE, 0, Table), err
}

func add(b *kernel.Batch, msg, nameAttr uint16, name string) *kernel.Batch {
	if b == nil {
		b = &kernel.Batch{}
	}
	b.Add(kernel.NFTables(msg), 0, kernel.NFGen(unix.NFPROTO_INET))
	b.String(1, Table)
	b.String(nameAttr, name)
	return b
}
