package lease

import "net/netip"

// Difference makes the ledger agree with all the rows that the store has, after g.Begin, and g.Changes lists what was not so: what others
// added, freed or let expire behind the registry's back. It returns how many of the leases that were active are not any more. Rows that cannot be
// read are passed over.
func Difference(g *Ledger, t Terms, rows []Row) (lost int) {
	g.Begin()
	seen := make(map[netip.Prefix]bool, len(rows))
	for _, r := range rows {
		if r.Invalid {
			continue
		}
		seen[r.Lease.Subnet] = true
		want := Entry{Lease: r.Lease, State: Active}
		if t.Expired(r) {
			want.State = Expired
		}
		have, ok := g.At(r.Lease.Subnet)
		if ok && have.Lease == want.Lease && have.State == want.State {
			continue
		}
		if ok && have.State == Active && want.State != Active {
			lost++
		}
		g.Set(want)
	}
	var gone []Entry
	for e := range g.All() {
		if e.State != Free && !seen[e.Subnet] {
			gone = append(gone, e)
		}
	}
	for _, e := range gone {
		if e.State == Active {
			lost++
		}
		g.Set(Entry{Lease: e.Lease, State: Free, FreedAt: t.Now})
	}
	return lost
}

// Implausible reports whether so many leases ended at once, without anybody giving them back, that a lost or restored database, or a clock that
// jumped, is a better explanation: more than a quarter of more than eight.
func Implausible(lost, active int) bool { return active > 8 && 4*lost > active }
