package lease

import (
	"slices"
	"time"
)

// PeersState is what Peers know, in a form to be stored as JSON.
type PeersState struct {
	Revision Revision      `json:"revision"`
	Leases   []Lease       `json:"leases"`
	Absent   []AbsentState `json:"absent,omitempty"`
}

// AbsentState is a lease that is kept though no list has it.
type AbsentState struct {
	Lease Lease     `json:"lease"`
	Lists int       `json:"lists"` // in a row without it, from a server without revisions
	Until time.Time `json:"until"`
}

// State returns what p knows. It shares no memory with p.
func (p *Peers) State() PeersState {
	s := PeersState{Revision: p.rev, Leases: slices.Clone(p.listed)}
	for _, a := range p.absent {
		s.Absent = append(s.Absent, AbsentState{a.lease, a.lists, a.until})
	}
	slices.SortFunc(s.Absent, func(a, b AbsentState) int { return compare(a.Lease.Subnet, b.Lease.Subnet) })
	return s
}

// Restore returns Peers that go on from s. Leases in it that make no sense are left out, and then the next
// list has to be a full one.
func (s PeersState) Restore(interval time.Duration) *Peers {
	p := NewPeers(interval)
	for _, l := range s.Leases {
		if sound(l) {
			p.listed = append(p.listed, l)
		}
	}
	Sort(p.listed)
	p.listed = slices.CompactFunc(p.listed, func(a, b Lease) bool { return a.Subnet == b.Subnet })
	if len(p.listed) == len(s.Leases) {
		p.rev = s.Revision
	}
	for _, a := range s.Absent {
		if sound(a.Lease) {
			p.absent[a.Lease.Subnet] = absence{a.Lease, min(max(a.Lists, 1), listsWithout), a.Until}
		}
	}
	p.list(p.listed)
	return p
}

// sound reports whether a lease names a usable subnet and address. Its MAC may be anything: other controllers take any.
func sound(l Lease) bool {
	return l.Underlay.IsValid() && l.Subnet.IsValid() && l.Subnet == l.Subnet.Masked() && l.Underlay.Is4() == l.Subnet.Addr().Is4() &&
		!l.Underlay.IsUnspecified()
}
