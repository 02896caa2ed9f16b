package overlay

import (
	"context"
	"net/netip"

	"code.cloudfoundry.org/silk/lease"
)

// Paths returns the peers that the device of that name has whole paths to: a route by the first address of a subnet, and a
// permanent neighbour and a forwarding entry that agree with it, whoever made them. They are in lease.Sort order; without
// the device there are none. A daemon that starts without a list uses them, so that it cuts nobody off.
func (f *Fabric) Paths(ctx context.Context, device string) ([]lease.Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, err := f.link(device)
	if l == nil || err != nil {
		return nil, err
	}
	var o observed
	for _, part := range []func(int, *observed) error{f.observeRoutes, f.observeNeighs, f.observeEntries} {
		if err := part(l.index, &o); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	macs := make(map[netip.Addr]lease.MAC, len(o.neighs))
	for _, n := range o.neighs {
		if n.permanent {
			macs[n.addr] = n.mac
		}
	}
	hosts := make(map[lease.MAC]netip.Addr, len(o.entries))
	for _, e := range o.entries {
		if e.permanent && !e.odd {
			hosts[e.mac] = e.dst
		}
	}
	var peers []lease.Lease
	for _, r := range o.routes {
		p := lease.Lease{Underlay: hosts[macs[r.via]], Subnet: r.dst, MAC: macs[r.via]}
		if r.via == r.dst.Addr() && p.Validate() == nil {
			peers = append(peers, p)
		}
	}
	lease.Sort(peers)
	return peers, nil
}
