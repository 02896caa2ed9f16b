package lease

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/revision"
)

// Revision numbers the states of a registry.
type Revision = revision.Revision

// ParseRevision reads what Revision.String writes. Anything else is fault.Invalid.
func ParseRevision(s string) (Revision, error) { return revision.Parse(s) }

// Update is one answer of Registry.Watch. A full update holds every active lease in Set and nothing in Gone;
// another one holds what was added or changed since the revision asked from, and the subnets that ceased.
// Count and Sum seal it: after the update is applied there are Count leases whose Digest is Sum.
type Update struct {
	Revision Revision
	Full     bool
	Set      []Lease
	Gone     []netip.Prefix
	Count    int
	Sum      string
}

// Changes reports whether u says anything new.
func (u Update) Changes() bool { return u.Full || len(u.Set) > 0 || len(u.Gone) > 0 }

// Apply returns the leases that hold after u, given those held before it, sorted by subnet. An update that does
// not add up to its own seal is fault.Invalid: ask again from the zero revision, and change nothing.
func (u Update) Apply(held []Lease) ([]Lease, error) {
	all := make(map[netip.Prefix]Lease, len(held)+len(u.Set))
	if !u.Full {
		for _, l := range held {
			all[l.Subnet] = l
		}
	}
	for _, p := range u.Gone {
		delete(all, p)
	}
	for _, l := range u.Set {
		all[l.Subnet] = l
	}
	out := make([]Lease, 0, len(all))
	for _, l := range all {
		out = append(out, l)
	}
	Sort(out)
	if len(out) != u.Count || Digest(out) != u.Sum {
		return nil, fault.Invalidf("leases at revision %v: list of %d is not the one that was sealed with %d: ask for a full list", u.Revision, len(out), u.Count)
	}
	return out, nil
}

// Sort orders leases by subnet, then by underlay address.
func Sort(ls []Lease) {
	slices.SortFunc(ls, func(a, b Lease) int {
		return cmp.Or(compare(a.Subnet, b.Subnet), a.Underlay.Compare(b.Underlay))
	})
}

// compare orders subnets by first address, wider ones first.
func compare(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Digest returns a checksum of sorted leases: 16 hexadecimal digits, the same for equal lists in equal order.
func Digest(sorted []Lease) string {
	h := sha256.New()
	b := make([]byte, 0, 8<<10)
	for _, l := range sorted {
		b = append(l.appendTo(b), '\n')
		if len(b) > cap(b)-256 {
			h.Write(b)
			b = b[:0]
		}
	}
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)[:8])
}
