package lease

import "sync"

// Snapshot is what a registry holds at one revision. It is immutable and shared: whoever has one must not write to Leases.
type Snapshot struct {
	Revision Revision
	Leases   []Lease // active ones, sorted

	digest func() string
}

// NewSnapshot returns a snapshot of sorted leases, which it keeps.
func NewSnapshot(r Revision, sorted []Lease) *Snapshot {
	return &Snapshot{Revision: r, Leases: sorted, digest: sync.OnceValue(func() string { return Digest(sorted) })}
}

// Sum returns the Digest of the leases. It is computed once, when first asked for.
func (s *Snapshot) Sum() string { return s.digest() }

// Full returns the update that consists of the whole snapshot.
func (s *Snapshot) Full() Update {
	return Update{Revision: s.Revision, Full: true, Set: s.Leases, Count: len(s.Leases), Sum: s.Sum()}
}
