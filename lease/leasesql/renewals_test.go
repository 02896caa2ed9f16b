package leasesql_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
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

// due is more seconds than a lease may be old for its renewal not to be written.
const due = int(leasetest.Expiration / time.Second / 50)

// renewedAt returns the time in the row of a host, 0 if there is none.
func renewedAt(t testing.TB, db *sqldb.DB, host netip.Addr) (at int64) {
	t.Helper()
	err := db.QueryRow(t.Context(), "SELECT last_renewed_at FROM subnets WHERE underlay_ip = ?", host.String()).Scan(&at)
	if err != nil && !errors.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
	return at
}

func acquireAll(t testing.TB, s *leasesql.Store, n int) []lease.Lease {
	t.Helper()
	all := make([]lease.Lease, n)
	for i := range all {
		var err error
		if all[i], err = s.Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// TestRenewalsAreJudgedOneByOne renews, at once, leases that are young, due, renewed in the future, expired, unknown, or not quite what is held.
func TestRenewalsAreJudgedOneByOne(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		s, db := open(t, config(cfg, wide(t))), connect(t, cfg)
		const kinds, each = 7, 8
		held := acquireAll(t, s, kinds*each)
		before := make([]int64, len(held))
		for i, l := range held {
			host := l.Underlay.String()
			switch i % kinds {
			case 1:
				exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ? WHERE underlay_ip = ?", due, host)
			case 2:
				exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at + ? WHERE underlay_ip = ?", 10*due, host)
			case 3:
				exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ? WHERE underlay_ip = ?", int64(2*leasetest.Expiration/time.Second), host)
			case 4:
				exec(t, db, "DELETE FROM subnets WHERE underlay_ip = ?", host)
			case 5:
				held[i].MAC[5] ^= 1
			case 6:
				held[i].Subnet = held[i-6].Subnet // of another host in the same batch
			}
			before[i] = renewedAt(t, db, l.Underlay)
		}
		errs := make([]error, len(held))
		var wg sync.WaitGroup
		for i, l := range held {
			wg.Go(func() { errs[i] = s.Renew(t.Context(), l) })
		}
		wg.Wait()
		now := renewedAt(t, db, held[1].Underlay)
		for i, l := range held {
			after := renewedAt(t, db, l.Underlay)
			switch kind := i % kinds; kind {
			case 5, 6:
				if fault.Of(errs[i]) != fault.Conflict || after != before[i] {
					t.Errorf("kind %d: %v, renewed at %d, before at %d", kind, errs[i], after, before[i])
				}
			case 0:
				if errs[i] != nil || after != before[i] {
					t.Errorf("a young one: %v, renewed at %d, before at %d", errs[i], after, before[i])
				}
			default:
				if errs[i] != nil || after < now-5 || after > now+5 {
					t.Errorf("kind %d: %v, renewed at %d, want about %d", kind, errs[i], after, now)
				}
			}
		}
	})
}

// TestSameRenewalTwice has two callers renew one lease at the same moment, over and over, when it is due.
func TestSameRenewalTwice(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		s, db := open(t, config(cfg, wide(t))), connect(t, cfg)
		l := acquireAll(t, s, 1)[0]
		for range 20 {
			exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ?", due)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if err := s.Renew(t.Context(), l); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
	})
}

// TestRenewalRacesWithForeignDelete takes a lease from its host in a transaction that a renewal waits for.
func TestRenewalRacesWithForeignDelete(t *testing.T) {
	cfg := testkit.Database(t, sqldb.Postgres)
	s, db := open(t, config(cfg, wide(t))), connect(t, cfg)
	held := acquireAll(t, s, 3)
	exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ?", due)
	errs := make([]error, len(held))
	var wg sync.WaitGroup
	err := db.Tx(t.Context(), func(tx *sqldb.Tx) error {
		for _, l := range held[:2] {
			if _, err := tx.Exec(t.Context(), "DELETE FROM subnets WHERE underlay_ip = ?", l.Underlay.String()); err != nil {
				return err
			}
		}
		thief := leasetest.Of(leasetest.Host(500), held[0].Subnet.String())
		if _, err := tx.Exec(t.Context(), "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES (?, ?, ?, "+tx.Dialect().Now+")",
			thief.Underlay.String(), thief.Subnet.String(), thief.MAC.String()); err != nil {
			return err
		}
		for i, l := range held {
			wg.Go(func() { errs[i] = s.Renew(t.Context(), l) })
		}
		leasetest.Eventually(t, "a renewal waits for the row", func() bool {
			var n int
			if err := db.QueryRow(t.Context(), "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()").Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n > 0
		})
		return nil
	})
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if fault.Of(errs[0]) != fault.Conflict {
		t.Errorf("the renewal of a lease that another host got: %v, want a conflict", errs[0])
	}
	if errs[1] != nil || renewedAt(t, db, held[1].Underlay) == 0 {
		t.Errorf("the renewal of a lease that was deleted and is free: %v, and its row is from %d", errs[1], renewedAt(t, db, held[1].Underlay))
	}
	if errs[2] != nil {
		t.Errorf("the renewal beside them: %v", errs[2])
	}
}

// TestRenewalWhoseCommitFails has the database find fault with a transaction only when everything else about it was answered.
func TestRenewalWhoseCommitFails(t *testing.T) {
	cfg := testkit.Database(t, sqldb.Postgres)
	s, db := open(t, config(cfg, wide(t))), connect(t, cfg)
	l := acquireAll(t, s, 1)[0]
	exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ?", due)
	before := renewedAt(t, db, l.Underlay)
	exec(t, db, "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$not today$$; END'")
	exec(t, db, "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON subnets DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()")
	if err := s.Renew(t.Context(), l); err == nil || fault.Of(err) == fault.Conflict {
		t.Errorf("a renewal that was not stored: %v, want a failure that is no verdict", err)
	}
	if after := renewedAt(t, db, l.Underlay); after != before {
		t.Errorf("renewed at %d, before at %d", after, before)
	}
	exec(t, db, "DROP TRIGGER refuse ON subnets")
	if err := s.Renew(t.Context(), l); err != nil || renewedAt(t, db, l.Underlay) == before {
		t.Errorf("afterwards: %v", err)
	}
}

// TestManyLeasesAreLogged looks for every lease, once, in lines of bounded length.
func TestManyLeasesAreLogged(t *testing.T) {
	var out bytes.Buffer
	cfg := config(testkit.Database(t, sqldb.SQLite), wide(t))
	db := connect(t, cfg.DB)
	first, err := leasesql.Open(t.Context(), cfg, quiet) // makes the tables
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	const n = 200
	for i := range n {
		if err := (deployed{db}).add(t, leasetest.Of(leasetest.Host(i), fmt.Sprintf("10.255.%d.0/24", i+1))); err != nil {
			t.Fatal(err)
		}
	}
	s, err := leasesql.Open(t.Context(), cfg, slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx); err != nil { // which reports once more before it ends
		t.Fatal(err)
	}
	for i := range n {
		if c := strings.Count(out.String(), fmt.Sprintf("%v=10.255.%d.0/24", leasetest.Host(i), i+1)); c != 1 {
			t.Fatalf("lease %d is %d times in the log", i, c)
		}
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 4096 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}
