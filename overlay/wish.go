package overlay

import (
	"fmt"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/lease"
)

// wish is what a Config asks of the kernel: its peers without those that no path can be made for.
type wish struct {
	cfg         Config // Peers is not used
	peers       []lease.Lease
	skipped     []Skipped
	nonRoutable int
}

// newWish judges the peers of a valid cfg one by one. A bad peer harms no other: it is skipped with a reason. Of leases
// that overlap the narrower is kept, because the kernel would prefer its route anyway and a bogus wide one then costs
// nobody anything; of equal ones the one with the lower underlay address.
func newWish(cfg Config) wish {
	w := wish{cfg: cfg}
	peers := cfg.Peers
	if !slices.IsSortedFunc(peers, compare) {
		peers = slices.Clone(peers)
		lease.Sort(peers)
	}
	w.cfg.Peers = nil
	if cfg.Fenced {
		return w
	}
	w.peers = make([]lease.Lease, 0, len(peers))
	for _, p := range peers {
		reason := w.objection(p)
		if n := len(w.peers); reason == "" && n > 0 && w.peers[n-1].Subnet == p.Subnet {
			reason = fmt.Sprintf("its subnet is also that of the lease of %v", w.peers[n-1].Underlay)
		}
		// Sorted prefixes are nested or apart, so whatever p lies in is at the end of the list.
		for n := len(w.peers); reason == "" && n > 0 && w.peers[n-1].Subnet.Overlaps(p.Subnet); n = len(w.peers) {
			w.skip(w.peers[n-1], fmt.Sprintf("it overlaps the narrower lease %v of %v", p.Subnet, p.Underlay))
			w.peers = w.peers[:n-1]
		}
		switch {
		case reason == "":
			w.peers = append(w.peers, p)
		case p != cfg.Local:
			w.skip(p, reason)
		}
	}
	return w
}

func (w *wish) skip(p lease.Lease, reason string) {
	w.skipped = append(w.skipped, Skipped{p, reason})
}

// objection returns why no path can be made for p, "" if one can.
func (w *wish) objection(p lease.Lease) string {
	network, local := w.cfg.Network, w.cfg.Local
	if err := p.Validate(); err != nil {
		return err.Error()
	}
	switch {
	case !p.Subnet.Addr().Is4() || !p.Underlay.Is4():
		return "only IPv4 is supported"
	case !contains(network, p.Subnet):
		w.nonRoutable++
		return fmt.Sprintf("its subnet is outside the overlay network %v", network)
	case p == local:
		return "it is the local lease"
	case p.Subnet.Overlaps(local.Subnet):
		return fmt.Sprintf("its subnet overlaps the local one, %v", local.Subnet)
	case p.Base() == network.Addr() || p.Base() == last(network):
		return "its first address is the network's own or its broadcast address and cannot be a next hop"
	case p.Underlay == w.cfg.Underlay:
		return "its underlay address is this host's"
	case !unicast(p.Underlay):
		return fmt.Sprintf("its underlay address %v is not that of one host", p.Underlay)
	case network.Contains(p.Underlay):
		return fmt.Sprintf("its underlay address %v is inside the overlay network %v", p.Underlay, network)
	}
	return ""
}

// address returns the VTEP's address, as the deployed daemon gives it: the subnet's first with the overlay's prefix.
func (w *wish) address() address {
	return address{netip.PrefixFrom(w.cfg.Local.Base(), w.cfg.Network.Bits()), scopeLink}
}

func (w *wish) route(p lease.Lease) route {
	return route{dst: p.Subnet, via: p.Base(), src: w.cfg.Local.Base(), metric: Metric(w.cfg.Network, p.Subnet), proto: Protocol}
}

// sameBase reports whether v differs from w in its peers at most.
func (w *wish) sameBase(v *wish) bool {
	a, b := w.cfg, v.cfg
	return a.Device == b.Device && a.VNI == b.VNI && a.Port == b.Port && a.Underlay == b.Underlay && a.Lower == b.Lower &&
		a.Network == b.Network && a.Local == b.Local && a.Fenced == b.Fenced
}

// delta returns the leases that are only in old and those that are only in next. Both are sorted.
func delta(old, next []lease.Lease) (gone, came []lease.Lease) {
	for len(old) > 0 && len(next) > 0 {
		switch {
		case old[0] == next[0]:
			old, next = old[1:], next[1:]
		case compare(old[0], next[0]) <= 0:
			gone, old = append(gone, old[0]), old[1:]
		default:
			came, next = append(came, next[0]), next[1:]
		}
	}
	return append(gone, old...), append(came, next...)
}

// compare orders leases as lease.Sort does.
func compare(a, b lease.Lease) int {
	if c := a.Subnet.Addr().Compare(b.Subnet.Addr()); c != 0 {
		return c
	}
	if c := a.Subnet.Bits() - b.Subnet.Bits(); c != 0 {
		return c
	}
	return a.Underlay.Compare(b.Underlay)
}
