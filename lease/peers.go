package lease

import (
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

const (
	// massHold is how long the removal of many peers at once is held.
	massHold = 10 * time.Minute
	// massFloor is the number of peers up to which no removal counts as one of many.
	massFloor = 8
	// listsWithout is how many lists in a row, from a server without revisions, a peer must be missing from.
	listsWithout = 3
)

// Peers decides what lists of leases, and the lack of them, mean for the paths that a host keeps. What a list adds or
// changes holds at once. What it leaves out is dropped
//   - at once when an update of the same epoch says so;
//   - after the hold (the longer of three intervals and 10 minutes) when the epoch is new or the counter went back;
//   - after three lists in a row without it, when the server has no revisions;
//   - 10 minutes after that in the last two cases of the three, when more than a quarter of more than 8 leases would go at once;
//   - never because of a list that is empty or incomplete;
//   - at once, whatever is held, when a listed lease takes (part of) its subnet.
//
// It has no clock and no lock: callers pass the wall-clock time, which may go back, and do not call it concurrently.
type Peers struct {
	hold   time.Duration
	rev    Revision
	listed []Lease // sorted, one a subnet: the list that the next Update adds to
	absent map[netip.Prefix]absence
}

// absence is a lease that was listed once and is not now.
type absence struct {
	lease Lease
	lists int       // in a row without it; at listsWithout only until counts
	until time.Time // kept till then
}

// NewPeers returns Peers that know nothing. interval is the time between two lists.
func NewPeers(interval time.Duration) *Peers {
	return &Peers{hold: max(3*interval, massHold), absent: map[netip.Prefix]absence{}}
}

// Revision returns where to watch from. It is zero when only a full list will do.
func (p *Peers) Revision() Revision { return p.rev }

// Update takes in an answer of Registry.Watch. One that does not add up to its own seal, or that adds to a list never
// seen, is fault.Invalid, changes nothing but Revision, which becomes zero.
func (p *Peers) Update(u Update, now time.Time) error {
	if !u.Full && (p.rev.IsZero() || u.Revision.Epoch != p.rev.Epoch) {
		p.rev = Revision{}
		return fault.Invalidf("changes at revision %v are for a list this host does not have: ask for a full list", u.Revision)
	}
	next, err := u.Apply(p.listed)
	if err != nil {
		p.rev = Revision{}
		return err
	}
	p.expire(now)
	continues := u.Revision.Epoch == p.rev.Epoch && u.Revision.Counter >= p.rev.Counter
	p.rev = u.Revision
	if !continues || len(next) == 0 {
		p.holdAll(next, now)
		return nil
	}
	kept := len(p.listed) + len(p.absent)
	var gone []absence
	for _, l := range missing(p.listed, next) {
		gone = append(gone, absence{lease: l, lists: listsWithout})
	}
	p.drop(gone, kept, now)
	p.list(next)
	return nil
}

// holdAll replaces the list and holds everything that it leaves out.
func (p *Peers) holdAll(next []Lease, now time.Time) {
	until := now.Add(p.hold)
	for s, a := range p.absent {
		a.lists, a.until = listsWithout, later(a.until, until)
		p.absent[s] = a
	}
	for _, l := range missing(p.listed, next) {
		p.absent[l.Subnet] = absence{l, listsWithout, until}
	}
	p.list(next)
}

// List takes in a list from a server that has no revisions. A list that is known to lack leases (some could not be read) is
// not complete. An empty one changes nothing.
func (p *Peers) List(leases []Lease, complete bool, now time.Time) {
	if len(leases) == 0 {
		return
	}
	p.expire(now)
	p.rev = Revision{}
	next := slices.Clone(leases)
	Sort(next)
	next = slices.CompactFunc(next, func(a, b Lease) bool { return a.Subnet == b.Subnet })
	if !complete {
		rest := slices.DeleteFunc(missing(p.listed, next), func(l Lease) bool { return overlapsAny(next, l.Subnet) })
		next = append(next, rest...)
		Sort(next)
		p.list(next)
		return
	}
	kept := len(p.listed) + len(p.absent)
	var gone []absence
	for s, a := range p.absent {
		if _, ok := find(next, s); ok || a.lists >= listsWithout {
			continue
		}
		if a.lists++; a.lists == listsWithout {
			gone = append(gone, a)
		}
		p.absent[s] = a
	}
	for _, l := range missing(p.listed, next) {
		p.absent[l.Subnet] = absence{lease: l, lists: 1}
	}
	p.drop(gone, kept, now)
	p.list(next)
}

// Adopt takes in leases that no list is known to have had but that the host has paths to, such as those that another daemon
// left. They are kept for the hold, and until there is a list.
func (p *Peers) Adopt(found []Lease, now time.Time) {
	for _, l := range found {
		if _, known := p.absent[l.Subnet]; !known && sound(l) && !overlapsAny(p.listed, l.Subnet) {
			p.absent[l.Subnet] = absence{l, listsWithout, now.Add(p.hold)}
		}
	}
}

// drop lets the leases in gone go at once, or later when they are too many of those kept.
func (p *Peers) drop(gone []absence, kept int, now time.Time) {
	for _, a := range gone {
		if kept > massFloor && 4*len(gone) > kept {
			a.until = later(a.until, now.Add(massHold))
		}
		p.absent[a.lease.Subnet] = a
	}
}

// list replaces the list; what is in it is not absent, and what overlaps it is another's now.
func (p *Peers) list(next []Lease) {
	p.listed = next
	for s := range p.absent {
		if overlapsAny(next, s) {
			delete(p.absent, s)
		}
	}
}

// Keep returns the leases to keep paths to at time now, the host's own among them, sorted by subnet. The caller owns the slice.
func (p *Peers) Keep(now time.Time) []Lease {
	p.expire(now)
	keep := slices.Clone(p.listed)
	for _, a := range p.absent {
		keep = append(keep, a.lease)
	}
	Sort(keep)
	return keep
}

// expire forgets the leases whose time is over.
func (p *Peers) expire(now time.Time) {
	limit := now.Add(p.hold)
	for s, a := range p.absent {
		if a.until.After(limit) { // the clock went back
			a.until = limit
			p.absent[s] = a
		}
		if len(p.listed) > 0 && a.lists >= listsWithout && !now.Before(a.until) {
			delete(p.absent, s)
		}
	}
}

// Held returns how many of the leases in Keep are in no current list.
func (p *Peers) Held() int { return len(p.absent) }

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// missing returns the leases of a sorted list whose subnets another sorted list lacks.
func missing(from, in []Lease) []Lease {
	var out []Lease
	for _, l := range from {
		if _, ok := find(in, l.Subnet); !ok {
			out = append(out, l)
		}
	}
	return out
}

// find looks a subnet up in a sorted list.
func find(sorted []Lease, s netip.Prefix) (int, bool) {
	return slices.BinarySearchFunc(sorted, s, func(l Lease, s netip.Prefix) int { return compare(l.Subnet, s) })
}

// overlapsAny reports whether a subnet shares an address with one of a sorted list.
func overlapsAny(sorted []Lease, s netip.Prefix) bool {
	for bits := range s.Bits() { // one that contains it
		wider, err := s.Addr().Prefix(bits)
		if err != nil {
			return false
		}
		if _, ok := find(sorted, wider); ok {
			return true
		}
	}
	i, _ := find(sorted, s) // the first that it could contain, or itself
	return i < len(sorted) && s.Contains(sorted[i].Base())
}
