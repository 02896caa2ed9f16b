package leasesql

import (
	"log/slog"
	"testing"

	"code.cloudfoundry.org/silk/lease"
)

// Must returns what is known now, without asking the database.
func (s *Store) Must(t testing.TB) *lease.Snapshot {
	t.Helper()
	return s.feed.snapshot()
}

// Prune has a store forget free subnets beyond keep, and returns how many it remembers.
func Prune(t testing.TB, cfg Config, keep int) int {
	t.Helper()
	s, err := Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.keepFreed = keep
	if err := s.keeper.prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := 0
	for e := range s.keeper.ledger.All() {
		if e.State == lease.Free {
			n++
		}
	}
	return n
}
