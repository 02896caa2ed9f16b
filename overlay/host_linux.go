package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// hostRoute is any IPv4 route of the host: what is foreign is judged by it.
type hostRoute struct {
	route
	typ    uint8
	device string // "" for a route by no device, or by several
}

// CheckHost reports why an overlay as in cfg cannot be on this host: fault.Conflict naming a foreign route equal to or
// inside the network or an ip rule on a mark that carries tags, fault.Invalid when the underlay address, its network or
// one of the resolvers lies inside it. cfg.Local and cfg.Peers may be empty. The strings are warnings: foreign routes,
// other than default ones, that contain the overlay network.
func (f *Fabric) CheckHost(ctx context.Context, cfg Config, resolvers []netip.Addr) ([]string, error) {
	if !cfg.Network.IsValid() || !cfg.Network.Addr().Is4() {
		return nil, fault.Invalidf("overlay network %v: expected an IPv4 network such as 10.255.0.0/16", cfg.Network)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	errs := []error{checkAddresses(cfg, resolvers)}
	routes, err := f.hostRoutes()
	if err != nil {
		return nil, err
	}
	warnings, err := checkRoutes(cfg, routes)
	errs = append(errs, err)
	rules, err := f.rt.MarkRules(TagMask)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		errs = append(errs, fault.Conflictf("ip rule %v decides by bits of the packet mark that VXLAN carries as tags (0x%08x): "+
			"remove it or give it other bits", r, TagMask))
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return warnings, errors.Join(errs...)
}

func checkAddresses(cfg Config, resolvers []netip.Addr) error {
	var errs []error
	if cfg.Network.Contains(cfg.Underlay) {
		errs = append(errs, fault.Invalidf("underlay address %v lies inside the overlay network %v: choose another overlay network",
			cfg.Underlay, cfg.Network))
	}
	for _, r := range resolvers {
		if cfg.Network.Contains(r.Unmap()) {
			errs = append(errs, fault.Invalidf("resolver %v lies inside the overlay network %v: choose another overlay network", r, cfg.Network))
		}
	}
	return errors.Join(errs...)
}

// checkRoutes judges every route of the host that is not ours: not on the VTEP, not of our protocol number, not to one
// container by its device.
func checkRoutes(cfg Config, routes []hostRoute) (warnings []string, err error) {
	var errs []error
	for _, r := range routes {
		device := r.device
		if device == "" {
			device = "(none)"
		}
		switch {
		case r.device == cfg.Device || r.proto == Protocol || r.dst.Bits() == 0:
		case r.typ == unix.RTN_BROADCAST || r.typ == unix.RTN_MULTICAST:
		case strings.HasPrefix(r.device, containerDevices) && r.dst.IsSingleIP() && maybeLocal(cfg, r.dst):
		case contains(cfg.Network, r.dst):
			errs = append(errs, fault.Conflictf("route %v by device %s lies inside the overlay network %v: "+
				"remove it or choose another overlay network", r.route, device, cfg.Network))
		case contains(r.dst, cfg.Network):
			warnings = append(warnings, fmt.Sprintf("route %v by device %s contains the overlay network %v: "+
				"hosts behind it that have overlay addresses cannot be reached", r.route, device, cfg.Network))
		}
	}
	return warnings, errors.Join(errs...)
}

// maybeLocal reports whether p is in the local subnet, as far as that is known.
func maybeLocal(cfg Config, p netip.Prefix) bool {
	return !cfg.Local.Subnet.IsValid() || cfg.Local.Subnet.Contains(p.Addr())
}

// hostRoutes returns the IPv4 routes of all tables.
func (f *Fabric) hostRoutes() ([]hostRoute, error) {
	names := map[int]string{}
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	err := f.rt.Dump(&b, func() { clear(names) }, func(m kernel.Message) error {
		if l, name, ok := parseLink(m.Body); ok {
			names[l.index] = name
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var routes []hostRoute
	b.Reset()
	all := make([]byte, unix.SizeofRtMsg)
	all[0] = unix.AF_INET
	b.Add(unix.RTM_GETROUTE, 0, all)
	err = f.rt.Dump(&b, func() { routes = nil }, func(m kernel.Message) error {
		r, oif, _ := parseRoute(m.Body)
		if r.dst.IsValid() {
			routes = append(routes, hostRoute{route: r, typ: m.Body[7], device: names[oif]})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}
