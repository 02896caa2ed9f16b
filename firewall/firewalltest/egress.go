package firewalltest

import (
	"net/netip"

	"code.cloudfoundry.org/silk/secgroup"
)

// Reach is what a container may reach outside the overlay, as people write it: see firewall.Egress. nil: everything.
type Reach struct {
	Deny  []netip.Prefix
	Lists [][]secgroup.Rule // each in the order in which it is asked
	Open  bool
}

// Allows judges the first packet of a connection by looking at everything every time.
func (r *Reach) Allows(p secgroup.Packet) bool {
	if r == nil {
		return true
	}
	for _, d := range r.Deny {
		if d.Contains(p.Destination) {
			return false
		}
	}
	for _, l := range r.Lists {
		if secgroup.Match(l, p) != nil {
			return true
		}
	}
	return r.Open
}
