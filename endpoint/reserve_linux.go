package endpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// hold is a record that this process works on: the lock on its file keeps others from the same endpoint. A process that
// dies lets go of it.
type hold struct {
	entry
	f       *kernel.File
	record  Record
	damaged error // why record is only what the file's name tells
	fresh   bool  // made by this process
}

func (h *hold) release() { h.f.Close() }

// forget removes the record.
func (d *Dir) forget(h *hold) error {
	if err := os.Remove(filepath.Join(d.path, h.file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget endpoint %v: %w", h.key, err)
	}
	return nil
}

// hold takes the lock on e's record; nil when the record went away meanwhile.
func (d *Dir) hold(ctx context.Context, e entry) (*hold, error) {
	h, _, err := d.holdBy(e, func(f *kernel.File) (bool, error) { return true, kernel.Flock(ctx, f) })
	return h, err
}

// tryHold is hold, but does not wait: free is false when somebody else has the lock.
func (d *Dir) tryHold(e entry) (h *hold, free bool, err error) {
	return d.holdBy(e, func(f *kernel.File) (bool, error) { return kernel.TryFlock(f) })
}

func (d *Dir) holdBy(e entry, lock func(*kernel.File) (bool, error)) (h *hold, locked bool, err error) {
	f, err := kernel.OpenFile(filepath.Join(d.path, e.file), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, true, nil
	case errors.Is(err, unix.ELOOP): // we make no links, and one that leads nowhere would never go away
		return nil, true, os.Remove(filepath.Join(d.path, e.file))
	}
	if err != nil {
		return nil, true, fmt.Errorf("lock endpoint %v: %w", e.key, err)
	}
	if locked, err = lock(f); err != nil || !locked {
		f.Close()
		if err != nil {
			err = fmt.Errorf("lock endpoint %v: %w", e.key, err)
		}
		return nil, locked, err
	}
	if same, err := f.Is(filepath.Join(d.path, e.file)); !same {
		f.Close()
		if err != nil {
			err = fmt.Errorf("lock endpoint %v: %w", e.key, err)
		}
		return nil, true, err
	}
	h = &hold{entry: e, f: f}
	h.record, h.damaged = decode(f, e)
	if h.damaged != nil {
		h.record = recordOf(e)
	}
	return h, true, nil
}

// recordOf returns what the name of a file tells about a record.
func recordOf(e entry) Record {
	r := Record{Key: e.key}
	for _, a := range e.addresses {
		r.Addresses = append(r.Addresses, netip.PrefixFrom(a, a.BitLen()))
	}
	r.name()
	return r
}

// name fills in what follows from the address.
func (r *Record) name() {
	r.Device = Device(r.Address())
	if r.Device != "" {
		r.HostMAC, r.ContainerMAC = macs(r.Address())
	}
}

// reserve returns s's record, locked: the one there is, or a new one with an address of its own and the device numbers for it.
func (d *Dir) reserve(ctx context.Context, host *kernel.Conn, s Spec, id kernel.NSID) (*hold, indexes, error) {
	// Encoding for the first time takes longer than all that is done under the lock. Nobody should have to wait for it.
	first := s.record(id, Gateway)
	first.NetOut = nil // it may be long, and takes no preparing
	if _, err := encode(first); err != nil {
		return nil, indexes{}, err
	}
	for {
		g, err := d.lock(ctx)
		if err != nil {
			return nil, indexes{}, err
		}
		list, err := d.sweep()
		if err != nil {
			g.unlock()
			return nil, indexes{}, err
		}
		e, there := list.find(s.Key)
		if !there {
			defer g.unlock()
			return d.create(host, s, id, list)
		}
		g.unlock() // whoever works on the endpoint may take as long as it takes to remove a device
		h, err := d.hold(ctx, e)
		if h != nil || err != nil {
			return h, indexes{}, err
		}
	}
}

// sweep returns the names in the directory and removes what killed processes were writing. The directory is locked.
func (d *Dir) sweep() (listing, error) {
	list, err := d.files()
	for _, f := range list {
		if strings.HasPrefix(f, tempFile) {
			os.Remove(filepath.Join(d.path, f))
		}
	}
	return list, err
}

// create makes a new record. The directory is locked.
func (d *Dir) create(host *kernel.Conn, s Spec, id kernel.NSID, list listing) (*hold, indexes, error) {
	if !s.Until.IsZero() && time.Now().After(s.Until) {
		return nil, indexes{}, ErrLate
	}
	cursor := d.cursor(s.Subnet)
	defer cursor.close()
	if !cursor.last.IsValid() {
		if err := forgetStrangers(s.Subnet); err != nil {
			return nil, indexes{}, err
		}
	}
	var ix indexes
	c := choice{subnet: s.Subnet, requested: s.Requested, taken: list, last: cursor.last}
	a, err := c.choose(func(a netip.Addr) (string, error) {
		h, err := routed(host, a)
		ix = h.ix
		return h.by, err
	})
	if err != nil {
		return nil, ix, err
	}
	r := s.record(id, a)
	if err := d.claim(r, list); err != nil {
		return nil, ix, err
	}
	h := &hold{entry: entry{r.Key.file(r.Addresses), r.Key, []netip.Addr{a}}, record: r, fresh: true}
	if h.f, err = d.write(h.file, r); err != nil {
		return nil, ix, fmt.Errorf("record endpoint %v: %w", s.Key, err)
	}
	switch { // losing the cursor costs nothing but the order of addresses
	case !s.Requested.IsValid():
		cursor.set(a)
	case !cursor.last.IsValid():
		cursor.set(s.Subnet.Addr().Next()) // where the round begins
	}
	return h, ix, nil
}

// record returns the record of an endpoint with the address a.
func (s *Spec) record(id kernel.NSID, a netip.Addr) Record {
	r := Record{
		Key: s.Key, Namespace: id, Path: s.Path, Subnet: s.Subnet, Requested: s.Requested, MTU: s.MTU,
		Group: s.Group, Metadata: compact(s.Metadata), PortMaps: s.PortMaps, Limits: s.Limits, NetOut: s.NetOut, Advertise: s.Advertise, TLS: s.TLS,
		Addresses: []netip.Prefix{netip.PrefixFrom(a, a.BitLen())},
	}
	r.name()
	return r
}

// forgetStrangers makes the kernel forget the connections of all addresses of the subnet that no container has. That is done when
// the first address of a subnet is given out; from then on Detach sees to it that a free address has none. Doing it for
// each address when it is given out would cost every ADD two walks of a table that has a lock of its own.
func forgetStrangers(subnet netip.Prefix) error {
	p, err := poolOf(subnet)
	if err != nil {
		return err
	}
	table, err := kernel.OpenConntrack()
	if err != nil || table == nil {
		return err
	}
	defer table.Close()
	live, err := Containers(nil)
	if err != nil {
		return err
	}
	return table.FlushAll(func(a netip.Addr) bool {
		return p.contains(a) && !slices.ContainsFunc(live, func(c Container) bool { return c.Address == a })
	})
}

// cursor is the file that says which address of a subnet was given out last.
type cursor struct {
	path string
	f    *kernel.File // nil when there is none yet
	last netip.Addr   // zero when that is not known
}

// cursorSize is that of the file in bytes, whatever the address: it is written over, never made shorter.
const cursorSize = len("255.255.255.255\n")

func (d *Dir) cursor(subnet netip.Prefix) cursor {
	c := cursor{path: filepath.Join(d.path, cursorFile+strings.ReplaceAll(subnet.String(), "/", "_"))}
	f, err := kernel.OpenFile(c.path, os.O_RDWR, 0)
	if err != nil {
		return c
	}
	c.f = f
	b := make([]byte, cursorSize)
	if n, err := f.Read(b); err == nil {
		c.last, _ = netip.ParseAddr(strings.TrimSpace(string(b[:n])))
	}
	return c
}

func (c cursor) set(a netip.Addr) {
	b := []byte(a.String())
	for len(b) < cursorSize-1 {
		b = append(b, ' ')
	}
	b = append(b, '\n')
	if c.f != nil {
		c.f.Overwrite(b)
	} else {
		kernel.WriteFile(c.path, b, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	}
}

func (c cursor) close() {
	if c.f != nil {
		c.f.Close()
	}
}

// write makes a record's file and returns it locked. It has its name only when it is whole.
func (d *Dir) write(name string, r Record) (*kernel.File, error) {
	b, err := encode(r)
	if err != nil {
		return nil, err
	}
	// The directory is locked and has been swept: there is one new record at a time.
	f, err := kernel.OpenFile(filepath.Join(d.path, tempFile+"record"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(b)
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = unix.Rename(f.Name(), filepath.Join(d.path, name))
	}
	if err != nil {
		os.Remove(f.Name())
		f.Close()
		return nil, err
	}
	return f, nil
}
