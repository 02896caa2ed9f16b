package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// Detach removes everything that Attach made for k, in the host namespace of the calling thread, calls more, which may be
// nil, and then forgets the endpoint. What is gone already is no error. A record that cannot be read is removed for
// what its name says; more then gets that much. Without a record Detach looks into ns, which may be nil: an
// interface there that Attach made, and that is no other endpoint's by now, is removed, and more is called with what can be
// told from it.
func (d *Dir) Detach(ctx context.Context, k Key, ns *kernel.NS, more func(Record) error) error {
	host, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer host.Close()
	if err := d.tidy(ctx); err != nil {
		return err
	}
	for {
		e, there, err := d.find(k)
		if err != nil {
			return err
		}
		if !there {
			r, again, err := d.detachUnrecorded(ctx, k, ns)
			if err != nil {
				return err
			}
			if again {
				continue
			}
			wait, err := r.unmapPorts(false)
			wait()
			if err := errors.Join(err, flush(r)); err != nil {
				return err
			}
			return run(more, r)
		}
		h, err := d.hold(ctx, e)
		if err != nil {
			return err
		}
		if h != nil {
			defer h.release()
			return d.erase(host, h, more)
		}
	}
}

// tidy removes what a killed process was writing, if there is any.
func (d *Dir) tidy(ctx context.Context) error {
	files, err := d.files()
	if err != nil || !slices.ContainsFunc(files, func(f string) bool { return strings.HasPrefix(f, tempFile) }) {
		return err
	}
	g, err := d.lock(ctx) // or it is being written now
	if err != nil {
		return err
	}
	defer g.unlock()
	_, err = d.sweep()
	return err
}

// erase removes what the held record stands for and, when all of that is gone, the record.
func (d *Dir) erase(host *kernel.Conn, h *hold, more func(Record) error) error {
	if err := h.record.remove(host, h.damaged == nil); err != nil {
		return err
	}
	if err := flush(h.record); err != nil {
		return err
	}
	if err := run(more, h.record); err != nil {
		return err
	}
	return d.forget(h)
}

// remove takes away what the kernel has of r: its ports, all that lead to it if they are not known, and its devices. For both it waits at once.
func (r Record) remove(host *kernel.Conn, known bool) error {
	if known && len(r.PortMaps) == 0 {
		return unwireHost(host, r.Address())
	}
	wait, err := r.unmapPorts(known)
	var waiting sync.WaitGroup
	waiting.Go(wait)
	if err == nil {
		err = unwireHost(host, r.Address())
	}
	waiting.Wait()
	return err
}

// flush forgets the connections that the kernel tracks for r's addresses.
func flush(r Record) error {
	for _, a := range r.Addresses {
		if err := kernel.FlushConntrack(a.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// detachUnrecorded removes k's interface from ns if Attach made it and no endpoint has its address: a namespace's name may have
// been given to another container since, and another network may have the interface. again tells that k has a record
// after all.
func (d *Dir) detachUnrecorded(ctx context.Context, k Key, ns *kernel.NS) (r Record, again bool, err error) {
	r = Record{Key: k}
	if ns == nil {
		return r, false, nil
	}
	inside, err := kernel.Dial(ns)
	if err != nil {
		return r, false, err
	}
	defer inside.Close()
	if a, err := observeAttached(inside, k.Interface); err != nil || !a.IsValid() {
		return r, false, err
	}
	g, err := d.lock(ctx) // from here on nobody is given an address, and so no interface
	if err != nil {
		return r, false, err
	}
	defer g.unlock()
	a, err := observeAttached(inside, k.Interface)
	if err != nil || !a.IsValid() {
		return r, false, err
	}
	names, err := d.entries()
	if err != nil {
		return r, false, err
	}
	for _, e := range names {
		if slices.Contains(e.addresses, a) {
			return r, e.key == k, nil
		}
	}
	r.Addresses = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	r.name()
	return r, false, unwire(inside, k.Interface)
}

// observeAttached returns the address of an interface that Attach made, as its hardware address and its addresses tell; the
// zero Addr for any other, and for none.
func observeAttached(c *kernel.Conn, name string) (netip.Addr, error) {
	l, err := observeLink(c, name)
	if err != nil || l.index == 0 || l.kind != "veth" || l.mac[0] != 0xee || l.mac[1] != 0xee {
		return netip.Addr{}, err
	}
	a := netip.AddrFrom4([4]byte(l.mac[2:]))
	addrs, err := observeAddrs(c, l.index)
	if err != nil || !slices.Contains(addrs, address4{a, Gateway}) {
		return netip.Addr{}, err
	}
	return a, nil
}

// atOnce bounds how many endpoints Collect removes side by side. Each removal waits tens of milliseconds for the kernel, and
// the waits overlap.
const atOnce = 64

// Collect detaches every endpoint of the network that valid does not list, in the host namespace of the calling thread, and
// returns how many it removed. It calls more, one call at a time, as Detach does. It goes on after failures and
// returns them joined. No endpoint of the network can be attached meanwhile.
func (d *Dir) Collect(ctx context.Context, network string, valid []Key, more func(Record) error) (int, error) {
	g, err := d.lock(ctx)
	if err != nil {
		return 0, err
	}
	defer g.unlock()
	list, err := d.sweep()
	if err != nil {
		return 0, err
	}
	keep := make(map[string]bool, len(valid))
	for _, k := range valid {
		k.Network = network
		keep[k.prefix()] = true
	}
	host, err := kernel.CurrentNS()
	if err != nil {
		return 0, err
	}
	defer host.Close()
	c := collector{dir: d, host: host, more: more}
	if err := d.sweepOrphans(); err != nil {
		c.errs = append(c.errs, err)
	}
	limit := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for _, e := range list.entries() {
		if e.key.Network != network || keep[e.file[:strings.LastIndexByte(e.file, '@')+1]] {
			continue
		}
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			c.add(e, c.remove(ctx, e))
		})
	}
	wg.Wait()
	return c.removed, errors.Join(c.errs...)
}

// sweepOrphans is RemoveOrphans with the directory locked.
func (d *Dir) sweepOrphans() error {
	conn, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = d.removeOrphans(conn)
	return err
}

// collector is the shared state of one Collect.
type collector struct {
	dir  *Dir
	host *kernel.NS
	more func(Record) error

	mu      sync.Mutex
	removed int
	errs    []error
}

func (c *collector) add(e entry, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("remove endpoint %v: %w", e.key, err))
		return
	}
	c.removed++
}

func (c *collector) remove(ctx context.Context, e entry) error {
	h, err := c.dir.hold(ctx, e)
	if h == nil || err != nil {
		return err
	}
	defer h.release()
	return c.host.Do(func() error {
		conn, err := kernel.Dial(nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		return c.dir.erase(conn, h, func(r Record) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			return run(c.more, r)
		})
	})
}
