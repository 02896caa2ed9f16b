package overlay

import (
	"context"
	"errors"
	"fmt"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// observe looks at all that bears on w. Any error means that the picture is not whole and nothing may be planned on it.
func (f *Fabric) observe(ctx context.Context, w *wish) (*observed, error) {
	o := &observed{}
	var err error
	if o.link, err = f.link(w.cfg.Device); err != nil {
		return nil, err
	}
	if o.link != nil {
		o.link.ipv6, o.link.asks = f.deviceSysctls(w.cfg.Device)
	}
	if err := f.observeAddrs(w, o); err != nil {
		return nil, err
	}
	if o.guard, err = f.observeGuard(w.cfg, o.lower.name); err != nil {
		return nil, err
	}
	if o.link == nil || ctx.Err() != nil {
		return o, ctx.Err()
	}
	for _, part := range []func(int, *observed) error{f.observeRoutes, f.observeNeighs, f.observeEntries} {
		if err := part(o.link.index, o); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return o, nil
}

// link returns the device of that name, nil if there is none.
func (f *Fabric) link(name string) (*link, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, name)
	l, _, err := f.getLink(&b)
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", name, err)
	}
	return l, nil
}

func (f *Fabric) getLink(b *kernel.Batch) (*link, string, error) {
	var l *link
	var name string
	err := f.rt.Get(b, func(m kernel.Message) error {
		if m.Type == unix.RTM_NEWLINK {
			if x, n, ok := parseLink(m.Body); ok {
				l, name = &x, n
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENODEV) {
		return nil, "", nil
	}
	return l, name, err
}

// deviceSysctls reports whether IPv6 is on for the device and whether it asks for neighbours. What the kernel has no switch for is
// off.
func (f *Fabric) deviceSysctls(device string) (ipv6, asks bool) {
	f.ns.Do(func() error {
		v, err := kernel.Sysctl(sysctlIPv6(device))
		ipv6 = err == nil && v == "0"
		v, err = kernel.Sysctl(sysctlARP(device))
		asks = err == nil && v != "0"
		return nil
	})
	return ipv6, asks
}

// observeAddrs finds the addresses of the device and the lower device.
func (f *Fabric) observeAddrs(w *wish, o *observed) error {
	owner := 0
	var b kernel.Batch
	b.Add(unix.RTM_GETADDR, 0, kernel.IfAddr(0, 0, 0))
	err := f.rt.Dump(&b, func() { o.addrs, owner = nil, 0 }, func(m kernel.Message) error {
		index, a, ok := parseAddr(m.Body)
		switch {
		case !ok:
		case o.link != nil && index == o.link.index:
			o.addrs = append(o.addrs, a)
		case a.prefix.Addr() == w.cfg.Underlay:
			owner = index
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	b.Reset()
	switch {
	case w.cfg.Lower != "":
		b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
		b.String(unix.IFLA_IFNAME, w.cfg.Lower)
	case owner != 0:
		b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(owner, 0, 0))
	default:
		return nil
	}
	l, name, err := f.getLink(&b)
	if err != nil {
		return fmt.Errorf("look up lower device: %w", err)
	}
	if l != nil {
		o.lower = lowerLink{l.index, l.mtu, name}
	}
	return nil
}

func (f *Fabric) observeRoutes(index int, o *observed) error {
	foreign := 0
	var b kernel.Batch
	b.Add(unix.RTM_GETROUTE, 0, kernel.Rt(0, 0, 0, 0))
	b.Uint32(unix.RTA_OIF, uint32(index))
	err := f.rt.Dump(&b, func() { o.routes, foreign = nil, 0 }, func(m kernel.Message) error {
		r, oif, ok := parseRoute(m.Body)
		switch {
		case ok && oif == index:
			o.routes = append(o.routes, r)
		case oif == index:
			foreign++
		}
		return nil
	})
	o.foreign += foreign
	if err != nil && !errors.Is(err, unix.ENODEV) { // the device has just gone, and its routes with it
		return fmt.Errorf("list routes: %w", err)
	}
	return nil
}

func (f *Fabric) observeNeighs(index int, o *observed) error {
	var b kernel.Batch
	b.Add(unix.RTM_GETNEIGH, 0, kernel.Nd(unix.AF_INET, 0, 0, 0))
	b.Uint32(unix.NDA_IFINDEX, uint32(index))
	err := f.rt.Dump(&b, func() { o.neighs = nil }, func(m kernel.Message) error {
		if x, n, ok := parseNeigh(m.Body); ok && x == index {
			o.neighs = append(o.neighs, n)
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("list neighbours: %w", err)
	}
	return nil
}

func (f *Fabric) observeEntries(index int, o *observed) error {
	var b kernel.Batch
	b.Add(unix.RTM_GETNEIGH, 0, kernel.Nd(unix.AF_BRIDGE, 0, 0, 0))
	b.Uint32(unix.NDA_IFINDEX, uint32(index))
	err := f.rt.Dump(&b, func() { o.entries = nil }, func(m kernel.Message) error {
		if x, e, ok := parseEntry(m.Body); ok && x == index {
			o.entries = append(o.entries, e)
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("list forwarding entries: %w", err)
	}
	return nil
}
