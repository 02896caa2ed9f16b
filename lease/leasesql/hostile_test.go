package leasesql_test

import (
	"context"
	"errors"
	"math"
	"net/netip"
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

// fillAtOnce is fill by hosts that ask at the same time, so that batches are recorded as grants where there are any.
func fillAtOnce(t testing.TB, s *leasesql.Store, n int) []lease.Lease {
	t.Helper()
	held := make([]lease.Lease, n)
	var wg sync.WaitGroup
	for i := range held {
		wg.Go(func() {
			var err error
			if held[i], err = s.Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return held
}

// harmsNobody renews three leases that are held, and one more, beside garbage that is to go.
func harmsNobody(t testing.TB, s *leasesql.Store, db sqldb.Config, held []lease.Lease, gone func() bool) {
	t.Helper()
	for i, l := range append(held, leasetest.Of(leasetest.Host(9), "10.255.77.0/24")) {
		if err := s.Renew(t.Context(), l); err != nil {
			t.Errorf("renewal %d of %v: %v", i, l, err)
		}
	}
	leasetest.Eventually(t, "all four leases are listed", func() bool { return len(list(t, s)) == 4 })
	leasetest.Eventually(t, "the garbage has gone", gone)
	if got := len(list(t, open(t, config(db, wide(t))))); got != 4 {
		t.Errorf("a store that is opened now lists %d leases, want 4", got)
	}
}

// TestUnreadableRecordHarmsNobody puts garbage where the package keeps its own records. No host is told that its lease is lost, and the garbage goes.
func TestUnreadableRecordHarmsNobody(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, wide(t))), connect(t, db)
		held := fill(t, s, 3)
		exec(t, raw, "INSERT INTO silk_leases (overlay_subnet, underlay_ip, overlay_hwaddr, row_id, state, freed_at, changed) SELECT 'garbage', 'fd00::1', 'x', 0, 0, 0, counter + 1 FROM silk_lease_revision")
		exec(t, raw, "UPDATE silk_leases SET underlay_ip = 'fd00::2', changed = (SELECT counter + 1 FROM silk_lease_revision) WHERE overlay_subnet = ?", held[1].Subnet.String())
		exec(t, raw, "UPDATE silk_lease_revision SET counter = counter + 1")
		harmsNobody(t, s, db, held, func() bool {
			return count(t, raw, "silk_leases WHERE overlay_subnet = 'garbage' OR underlay_ip LIKE 'fd%'") == 0
		})
	})
}

// TestUnknownRecordIsOverwritten has a record of every subnet that there is, made by somebody who did not move the revision. They hold nothing.
func TestUnknownRecordIsOverwritten(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, leasetest.Pool(t, "10.255.0.0/22", 24))), connect(t, db) // three blocks
		subnets := []string{"10.255.1.0/24", "10.255.2.0/24", "10.255.3.0/24"}
		for _, subnet := range subnets {
			exec(t, raw, "INSERT INTO silk_leases (overlay_subnet, underlay_ip, overlay_hwaddr, row_id, state, freed_at, changed) VALUES (?, '172.31.0.9', 'ee:ee:0a:ff:09:00', 0, 2, 1, 0)", subnet)
		}
		held := fill(t, s, 2)
		left := subnets[slices.IndexFunc(subnets, func(p string) bool { return p != held[0].Subnet.String() && p != held[1].Subnet.String() })]
		l := leasetest.Of(leasetest.Host(9), left)
		if err := s.Renew(t.Context(), l); err != nil {
			t.Errorf("renewal of %v: %v", l, err)
		}
		if got := len(list(t, s)); got != 3 {
			t.Errorf("%d leases are listed, want 3", got)
		}
	})
}

// TestAbsurdTimeHarmsNobody has a row whose time of renewal no sum may be made of.
func TestAbsurdTimeHarmsNobody(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db, leasetest.Pool(t, "10.255.0.0/22", 24)) // three blocks
		cfg.Expiration = math.MaxInt32 * time.Second
		s, old := open(t, cfg), deployed{connect(t, db)}
		odd := leasetest.Of(leasetest.Host(1), "10.255.1.0/24")
		if err := old.add(t, odd); err != nil {
			t.Fatal(err)
		}
		exec(t, old.db, "UPDATE subnets SET last_renewed_at = ?", int64(math.MaxInt64))
		leasetest.Eventually(t, "the lease is listed", func() bool { return has(t, s, odd) })
		for n := range 3 {
			if _, err := s.Acquire(t.Context(), leasetest.Host(2+n), lease.Block); err != nil != (n == 2) || n == 2 && !errors.Is(err, fault.Exhausted) {
				t.Errorf("acquire %d: %v", n, err)
			}
		}
		if st, err := s.Stats(t.Context()); err != nil || st.Total != 3 || st.Expired != 0 {
			t.Errorf("stats %+v, %v", st, err)
		}
	})
}

// TestRefusalIsOfNow takes leases away by a controller of the earlier kind, and at once asks for what has become free: what was known a moment ago
// is no reason for a refusal, which would end an old daemon.
func TestRefusalIsOfNow(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, old := open(t, config(db, leasetest.Pool(t, "10.255.0.0/21", 24))), deployed{connect(t, db)} // seven blocks
		for i, l := range fill(t, s, 7) {
			host := leasetest.Host(100 + i)
			old.remove(t, l.Underlay)
			switch l.Underlay = host; i % 3 {
			case 0: // given to another host by the other controller
				if err := old.add(t, l); err != nil {
					t.Fatal(err)
				}
				fallthrough
			case 1:
				if err := s.Renew(t.Context(), l); err != nil {
					t.Errorf("renew %v, whose former host has given it back: %v", l, err)
				}
			default:
				if got, err := s.Acquire(t.Context(), host, lease.Block); err != nil || got.Subnet != l.Subnet {
					t.Errorf("acquire = %v, %v, want %v, which is the only free one", got, err, l.Subnet)
				}
			}
		}
		if _, err := s.Acquire(t.Context(), leasetest.Host(200), lease.Block); !errors.Is(err, fault.Exhausted) {
			t.Errorf("acquire from a full pool: %v", err)
		}
	})
}

// TestNewcomersGetNothingThatAHostHadBeforeTheLoss loses the database, and has newcomers ask before the hosts renew.
func TestNewcomersGetNothingThatAHostHadBeforeTheLoss(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db, wide(t))), connect(t, db)
		fill(t, s, 10) // what an older copy holds
		if err := s.Release(t.Context(), leasetest.Host(0)); err != nil {
			t.Fatal(err)
		}
		held := fill(t, s, 150)
		dropAll(t, raw)
		for i := range 100 {
			l, err := s.Acquire(t.Context(), leasetest.Host(1000+i), lease.Block)
			if err != nil {
				t.Fatal(err)
			}
			if slices.ContainsFunc(held, func(h lease.Lease) bool { return h.Subnet == l.Subnet }) {
				t.Errorf("newcomer %d got %v of a host that is there", i, l.Subnet)
			}
		}
		for _, l := range held {
			if err := s.Renew(t.Context(), l); err != nil {
				t.Errorf("renew %v: %v", l, err)
			}
		}
	})
}

// TestClockJumpTakesNobodysLease lets all leases of a full pool expire at once, as a clock that jumps or a long outage does. Their hosts get time to renew.
func TestClockJumpTakesNobodysLease(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		pool := leasetest.Pool(t, "10.255.0.0/20", 24) // 15 blocks
		s, other, raw := open(t, config(db, pool)), open(t, config(db, pool)), connect(t, db)
		held := fill(t, s, 15)
		was := s.Must(t).Revision
		exec(t, raw, "UPDATE subnets SET last_renewed_at = last_renewed_at - 5000")
		if l, err := s.Acquire(t.Context(), leasetest.Host(100), lease.Block); !errors.Is(err, fault.Exhausted) {
			t.Errorf("a newcomer got %v, %v", l, err)
		}
		leasetest.Eventually(t, "the other store follows", func() bool {
			sn, err := other.Snapshot(t.Context())
			return err == nil && sn.Revision.Epoch != was.Epoch
		})
		if l, err := other.Acquire(t.Context(), leasetest.Host(101), lease.Block); !errors.Is(err, fault.Exhausted) {
			t.Errorf("a newcomer got %v, %v of the other store", l, err)
		}
		for _, l := range held {
			if err := s.Renew(t.Context(), l); err != nil {
				t.Errorf("renew %v: %v", l, err)
			}
		}
	})
}

// TestAnotherEpochIsNotAnsweredFromMemory asks a store that has lost its database, on behalf of a host that has seen another epoch. Which of the two
// is the newer one cannot be known, and a host that hears both would swing between them.
func TestAnotherEpochIsNotAnsweredFromMemory(t *testing.T) {
	server, err := testkit.StartPostgres(t.Context(), testkit.Options{})
	testkit.Require(t, "postgres", err)
	defer server.Stop()
	db, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	db.Timeout = 5
	s := open(t, config(db, wide(t)))
	fill(t, s, 2)
	other := lease.Revision{Epoch: "another", Counter: 7}
	leasetest.Eventually(t, "a watch from another epoch brings everything", func() bool {
		u, err := s.Watch(t.Context(), other)
		return err == nil && u.Full && u.Count == 2
	})
	server.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	leasetest.Eventually(t, "the list is refused", func() bool { _, err := s.Leases(ctx); return errors.Is(err, fault.Unavailable) })
	if u, err := s.Watch(ctx, other); !errors.Is(err, fault.Unavailable) {
		t.Errorf("watch from another epoch without a database = %+v, %v, want an Unavailable fault", u.Revision, err)
	}
}

// TestUnmaskedRowIsNotGivenOut has a row of the kind that the deployed controller takes unchecked: its subnet is none, but its addresses are in use.
func TestUnmaskedRowIsNotGivenOut(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		raw := connect(t, db)
		s := open(t, config(db, leasetest.Pool(t, "10.255.0.0/22", 24))) // three blocks
		exec(t, raw, "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES ('10.9.9.9', '10.255.2.7/24', 'ee:ee:0a:ff:02:07', "+raw.Dialect().Now+")")
		leasetest.Eventually(t, "the row is counted", func() bool { st, err := s.Stats(t.Context()); return err == nil && st.Invalid == 1 })
		for n := range 3 {
			l, err := s.Acquire(t.Context(), leasetest.Host(n), lease.Block)
			if n == 2 && !errors.Is(err, fault.Exhausted) || n < 2 && (err != nil || l.Subnet == netip.MustParsePrefix("10.255.2.0/24")) {
				t.Errorf("acquire %d = %v, %v", n, l, err)
			}
		}
	})
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
