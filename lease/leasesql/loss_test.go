package leasesql_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// TestDatabaseLossKeepsSubnets drops every table under a running store. Every host renews what it has and keeps it, in a new epoch.
func TestDatabaseLossKeepsSubnets(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, wide(t))), connect(t, db)
		held := make([]lease.Lease, 100)
		for i := range held {
			var err error
			if held[i], err = s.Acquire(t.Context(), leasetest.Host(i), lease.Kind(i%2)); err != nil {
				t.Fatal(err)
			}
		}
		was := s.Must(t).Revision
		dropAll(t, raw)
		for _, l := range held {
			if err := s.Renew(t.Context(), l); err != nil {
				t.Fatalf("renew %v after the loss: %v", l, err)
			}
		}
		lease.Sort(held)
		if got := list(t, s); !slices.Equal(got, held) {
			t.Errorf("%d leases are listed, want all %d as they were", len(got), len(held))
		}
		if now := s.Must(t).Revision; now.Epoch == was.Epoch {
			t.Errorf("the revision is %v, was %v: want a new epoch", now, was)
		}
	})
}

// dropAll drops every table of ours and the shared one.
func dropAll(t testing.TB, db *sqldb.DB) {
	tables := []string{"subnets", "silk_leases", "silk_lease_revision", "silk_migrations"}
	if db.Dialect().Name == sqldb.Postgres {
		tables = append(tables, "silk_lease_grants")
	}
	for _, table := range tables {
		exec(t, db, "DROP TABLE "+table)
	}
}

// TestPartialLossRenewsEpoch drops or empties one table at a time.
func TestPartialLossRenewsEpoch(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, wide(t))), connect(t, db)
		var held []lease.Lease
		for i := range 20 {
			l, err := s.Acquire(t.Context(), leasetest.Host(i), lease.Block)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, l)
		}
		lease.Sort(held)
		damages := []string{"DROP TABLE silk_leases", "DROP TABLE silk_lease_revision", "DELETE FROM silk_lease_revision", "DELETE FROM silk_leases", "DELETE FROM subnets", "DROP TABLE subnets"}
		if db.Type == sqldb.Postgres {
			leasetest.Eventually(t, "the grants are records", func() bool { return count(t, raw, "silk_lease_grants") == 0 })
			damages = append(damages, "DROP TABLE silk_lease_grants")
		}
		for _, damage := range damages {
			was := s.Must(t).Revision
			exec(t, raw, damage)
			testkit.Until(t, time.Minute, damage+" brings a new epoch", func() bool { // after three looks, which are the rarer the longer one takes
				sn, err := s.Snapshot(t.Context())
				return err == nil && sn.Revision.Epoch != was.Epoch
			})
			for _, l := range held {
				if err := s.Renew(t.Context(), l); err != nil {
					t.Errorf("%s: renew %v: %v", damage, l, err)
				}
			}
			leasetest.Eventually(t, "after "+damage+" all leases are listed", func() bool { return slices.Equal(list(t, s), held) })
		}
	})
}

// TestLostFileOfSQLite removes the database file under a running store.
func TestLostFileOfSQLite(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	s := open(t, config(db, wide(t)))
	l, err := s.Acquire(t.Context(), leasetest.Host(1), lease.Block)
	if err != nil {
		t.Fatal(err)
	}
	was := s.Must(t).Revision
	for _, end := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(db.Path + end); err != nil {
			t.Fatal(err)
		}
	}
	leasetest.Eventually(t, "a new epoch", func() bool {
		sn, err := s.Snapshot(t.Context())
		return err == nil && sn.Revision.Epoch != was.Epoch
	})
	if err := s.Renew(t.Context(), l); err != nil || !slices.Equal(list(t, s), []lease.Lease{l}) {
		t.Errorf("renew = %v, listed %v", err, list(t, s))
	}
}

func TestRenewEpoch(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		a, b := open(t, config(db, wide(t))), open(t, config(db, wide(t)))
		l, err := a.Acquire(t.Context(), leasetest.Host(1), lease.Block)
		if err != nil {
			t.Fatal(err)
		}
		since := a.Must(t).Revision
		r, err := b.RenewEpoch(t.Context())
		if err != nil || r.Epoch == since.Epoch {
			t.Fatalf("RenewEpoch = %v, %v, was %v", r, err, since)
		}
		u, err := a.Watch(t.Context(), since)
		if err != nil || !u.Full || u.Revision != r || !slices.Equal(u.Set, []lease.Lease{l}) {
			t.Errorf("watch = %+v, %v, want everything at %v", u, err, r)
		}
	})
}

// TestFreeSubnetsAreForgotten keeps no more of them than it should, and neither loses a lease nor the way to it.
func TestFreeSubnetsAreForgotten(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, wide(t))), connect(t, db)
		fillAtOnce(t, s, 60)
		since := s.Must(t).Revision
		for i := range 50 {
			if err := s.Release(t.Context(), leasetest.Host(i)); err != nil {
				t.Fatal(err)
			}
		}
		exec(t, raw, "UPDATE silk_leases SET freed_at = 7200 WHERE state = 2") // all in the same second, however long the releases took
		n := leasesql.Prune(t, config(db, wide(t)), 20)
		if n != 0 {
			t.Errorf("%d free subnets are remembered, want none, since all are long free", n)
		}
		if db.Type == sqldb.Postgres && count(t, raw, "silk_lease_grants") != 0 {
			t.Error("there are grants of what was forgotten: they would say that it is leased")
		}
		leasetest.Eventually(t, "ten leases are listed", func() bool { return len(list(t, s)) == 10 })
		leasetest.Eventually(t, "one who slept through it gets everything", func() bool {
			u, err := s.Watch(t.Context(), since)
			return err == nil && u.Full && u.Count == 10
		})
	})
}

// TestDatabaseAway stops the server. No answer is a conflict, and the store goes on when the server is back.
func TestDatabaseAway(t *testing.T) {
	server, err := testkit.StartPostgres(t.Context(), testkit.Options{})
	testkit.Require(t, "postgres", err)
	defer server.Stop()
	db, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	db.Timeout = 5
	s := open(t, config(db, wide(t)))
	l, err := s.Acquire(t.Context(), leasetest.Host(1), lease.Block)
	if err != nil {
		t.Fatal(err)
	}
	at := s.Must(t)
	server.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := s.Renew(ctx, l); !errors.Is(err, fault.Unavailable) {
		t.Errorf("renew: %v, want an Unavailable fault", err)
	}
	if _, err := s.Acquire(ctx, leasetest.Host(2), lease.Block); !errors.Is(err, fault.Unavailable) {
		t.Errorf("acquire: %v, want an Unavailable fault", err)
	}
	leasetest.Eventually(t, "the list is refused", func() bool { _, err := s.Leases(ctx); return errors.Is(err, fault.Unavailable) })
	if u, err := s.Watch(ctx, lease.Revision{}); err != nil || u.Revision != at.Revision {
		t.Errorf("watch from the beginning = %+v, %v, want what is known", u, err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Renew(t.Context(), l); err != nil {
		t.Errorf("renew after the server is back: %v", err)
	}
	if got := s.Must(t).Revision; got != at.Revision {
		t.Errorf("the revision is %v, was %v", got, at.Revision)
	}
}

// TestKilledConnections ends the store's connections all the time. Every request succeeds.
func TestKilledConnections(t *testing.T) {
	db := testkit.Database(t, sqldb.Postgres)
	s, raw := open(t, config(db, wide(t))), connect(t, db)
	stop := make(chan struct{})
	var killer, wg sync.WaitGroup
	killer.Go(func() {
		tick := time.NewTicker(15 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				raw.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
			}
		}
	})
	failed := 0
	var mu sync.Mutex
	for h := range 16 {
		wg.Go(func() {
			for i := 0; i < 15 || s.DBCounts().Retries == 0 && i < 1000; i++ { // until a connection was killed in use
				host := leasetest.Host(1000*h + i)
				l, err := s.Acquire(t.Context(), host, lease.Block)
				if err == nil {
					err = s.Renew(t.Context(), l)
				}
				if err == nil && (i%2 == 0 || i >= 15) {
					err = s.Release(t.Context(), host)
				}
				if errors.Is(err, fault.Unavailable) {
					mu.Lock()
					failed++
					mu.Unlock()
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	killer.Wait()
	if s.DBCounts().Retries == 0 {
		t.Error("nothing was tried again: the test tested nothing")
	}
	t.Logf("%d hosts were told to try later", failed)
	var rows []lease.Lease
	leasetest.Eventually(t, "the list agrees with the table", func() bool {
		var n int
		if err := raw.QueryRow(t.Context(), "SELECT COUNT(*) FROM subnets").Scan(&n); err != nil {
			t.Fatal(err)
		}
		rows = list(t, s)
		return len(rows) == n
	})
}

// TestWaitingWatchersCostNothing compares the statements sent with and without 5,000 waiting watchers.
func TestWaitingWatchersCostNothing(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	s := open(t, config(db, wide(t)))
	since := s.Must(t).Revision
	second := func() uint64 {
		before := s.DBCounts().Queries
		<-time.After(1500 * time.Millisecond) // the measurement
		return s.DBCounts().Queries - before
	}
	idle := second()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const n = 5000
	got := make(chan error, n)
	for range n {
		go func() {
			u, err := s.Watch(ctx, since)
			if err == nil && len(u.Set) != 1 {
				err = errors.New("not the one change")
			}
			got <- err
		}()
	}
	if busy := second(); busy > idle+2 {
		t.Errorf("%d statements with %d watchers, %d without", busy, n, idle)
	}
	start := time.Now()
	if _, err := s.Acquire(t.Context(), leasetest.Host(1), lease.Block); err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d watchers were told after %v", n, time.Since(start))
}

// TestStopsWhileAsked ends the store under load: every caller gets an answer.
func TestStopsWhileAsked(t *testing.T) {
	s, err := leasesql.Open(t.Context(), config(testkit.Database(t, sqldb.SQLite), wide(t)), quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var wg sync.WaitGroup
	first := make(chan struct{}, 64)
	for h := range 64 {
		wg.Go(func() {
			for {
				_, err := s.Acquire(t.Context(), leasetest.Host(h), lease.Block)
				select {
				case first <- struct{}{}:
				default:
				}
				if err != nil {
					if !errors.Is(err, fault.Unavailable) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	<-first
	cancel()
	wg.Wait()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := s.Watch(t.Context(), s.Must(t).Revision); !errors.Is(err, fault.Unavailable) {
		t.Errorf("watch of a store that has stopped: %v", err)
	}
}
