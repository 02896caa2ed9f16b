package leasesql_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// fill acquires n blocks.
func fill(t testing.TB, s *leasesql.Store, n int) []lease.Lease {
	t.Helper()
	held := make([]lease.Lease, n)
	for i := range held {
		var err error
		if held[i], err = s.Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
			t.Fatal(err)
		}
	}
	return held
}

// TestStopsWhileTheDatabaseFileIsLocked ends the store while somebody else keeps the write lock.
func TestStopsWhileTheDatabaseFileIsLocked(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	raw := connect(t, db)
	s, err := leasesql.Open(t.Context(), config(db, wide(t)), quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done, asked := make(chan error, 1), make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	fill(t, s, 1)
	err = raw.Tx(t.Context(), func(*sqldb.Tx) error {
		go func() {
			_, err := s.Acquire(t.Context(), leasetest.Host(7), lease.Block)
			asked <- err
		}()
		waitFor := time.NewTimer(300 * time.Millisecond) // that the store waits for the lock; should it not yet, it is stopped earlier
		defer waitFor.Stop()
		<-waitFor.C
		start := time.Now()
		cancel()
		<-done
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("the store ended after %v", took)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-asked; !errors.Is(err, fault.Unavailable) {
		t.Errorf("acquire: %v, want an Unavailable fault", err)
	}
}
