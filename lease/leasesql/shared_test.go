package leasesql_test

import (
	"errors"
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

func eachEngine(t *testing.T, f func(t *testing.T, db sqldb.Config)) {
	for _, e := range testkit.Engines {
		t.Run(e, func(t *testing.T) {
			t.Parallel() // most of the time one waits for its server, or for time to pass
			f(t, testkit.Database(t, e))
		})
	}
}

func wide(t testing.TB) lease.Pool { return leasetest.Pool(t, "10.255.0.0/16", 24) }

// list returns what is listed, sorted.
func list(t testing.TB, s *leasesql.Store) []lease.Lease {
	t.Helper()
	ls, err := s.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ls
}

func has(t testing.TB, s *leasesql.Store, l lease.Lease) bool {
	t.Helper()
	return slices.Contains(list(t, s), l)
}

// deployed is a controller of the earlier kind: single statements, each its own transaction, on the table subnets only.
type deployed struct{ db *sqldb.DB }

func (d deployed) add(t testing.TB, l lease.Lease) error {
	_, err := d.db.Exec(t.Context(), "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES (?, ?, ?, "+d.db.Dialect().Now+")",
		l.Underlay.String(), l.Subnet.String(), l.MAC.String())
	return err
}

func (d deployed) remove(t testing.TB, host netip.Addr) {
	t.Helper()
	if n := exec(t, d.db, "DELETE FROM subnets WHERE underlay_ip = ?", host.String()); n != 1 {
		t.Errorf("host %v has %d rows, want 1", host, n)
	}
}

// TestBesideDeployedController mixes the two kinds of controller on one database.
func TestBesideDeployedController(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, old := open(t, config(db, wide(t))), deployed{connect(t, db)}
		watched := make(chan error, 1)
		theirs := leasetest.Of(leasetest.Host(1), "10.255.30.0/24")
		since := s.Must(t).Revision
		go func() {
			u, err := s.Watch(t.Context(), since)
			if err == nil && !slices.Equal(u.Set, []lease.Lease{theirs}) {
				err = errors.New("another update than the lease of the other controller")
			}
			watched <- err
		}()
		if err := old.add(t, theirs); err != nil {
			t.Fatal(err)
		}
		if l, err := s.Acquire(t.Context(), theirs.Underlay, lease.Block); err != nil || l != theirs { // at once, before it is found by difference
			t.Errorf("acquire = %v, %v, want %v", l, err, theirs)
		}
		if err := <-watched; err != nil {
			t.Error(err)
		}
		if err := s.Renew(t.Context(), theirs); err != nil {
			t.Error(err)
		}
		stolen := leasetest.Of(leasetest.Host(2), "10.255.31.0/24")
		if err := old.add(t, stolen); err != nil {
			t.Fatal(err)
		}
		if err := s.Renew(t.Context(), leasetest.Of(leasetest.Host(3), "10.255.31.0/24")); !errors.Is(err, fault.Conflict) {
			t.Errorf("renewing what another controller has just given away: %v, want a Conflict fault", err)
		}
		if err := s.Release(t.Context(), stolen.Underlay); err != nil {
			t.Error(err)
		}
		old.remove(t, theirs.Underlay)
		leasetest.Eventually(t, "the lease that the other controller removed is not listed", func() bool { return !has(t, s, theirs) })
		if len(list(t, s)) != 0 {
			t.Errorf("listed: %v, want nothing", list(t, s))
		}
		if st, err := s.Stats(t.Context()); err != nil || st.Total != 0 || st.FreeBlocks != 255 {
			t.Errorf("stats %+v, %v", st, err)
		}
	})
}

// TestRaceWithDeployedController has both kinds fill one pool at once.
func TestRaceWithDeployedController(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		pool := leasetest.Pool(t, "10.255.0.0/20", 26) // 63 blocks
		s, old := open(t, config(db, pool)), deployed{connect(t, db)}
		var wg sync.WaitGroup
		var mu sync.Mutex
		got := map[netip.Prefix]netip.Addr{}
		note := func(l lease.Lease) {
			mu.Lock()
			defer mu.Unlock()
			if other, dup := got[l.Subnet]; dup {
				t.Errorf("%v was given to %v and %v", l.Subnet, other, l.Underlay)
			}
			got[l.Subnet] = l.Underlay
		}
		wg.Go(func() {
			for i := range pool.Size(lease.Block) {
				p := pool.At(lease.Block, i)
				l := lease.Lease{Underlay: leasetest.Host(int(1000 + i)), Subnet: p, MAC: lease.MACOf(p)}
				err := old.add(t, l)
				if err == nil {
					note(l)
				} else if !sqldb.IsDuplicate(err) && !errors.Is(err, fault.Unavailable) {
					t.Error(err)
				}
			}
		})
		for h := range 63 {
			wg.Go(func() {
				l, err := s.Acquire(t.Context(), leasetest.Host(h), lease.Block)
				if err == nil {
					note(l)
				} else if !errors.Is(err, fault.Exhausted) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(got) != 63 {
			t.Errorf("%d blocks were given away, want all 63", len(got))
		}
		leasetest.Eventually(t, "all leases are listed", func() bool { return len(list(t, s)) == 63 })
	})
}

// TestTakesOverExistingTable begins with a table of the earlier kind that has leases, among them one of another network and rows that are none.
func TestTakesOverExistingTable(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		open(t, config(db, wide(t))) // makes the tables, and goes on beside
		old := deployed{connect(t, db)}
		kept, foreign := leasetest.Of(leasetest.Host(1), "10.255.30.0/24"), leasetest.Of(leasetest.Host(2), "10.254.7.0/24")
		for _, l := range []lease.Lease{kept, foreign} {
			if err := old.add(t, l); err != nil {
				t.Fatal(err)
			}
		}
		for _, row := range [][3]string{{"garbage", "10.255.40.0/24", "ee:ee:0a:ff:28:00"}, {"172.16.9.9", "10.255.41.7/24", "x"}, {"172.16.9.8", "nonsense", ""}} {
			exec(t, old.db, "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES (?, ?, ?, 1)", row[0], row[1], row[2])
		}
		s := open(t, config(db, wide(t))) // another controller starts
		if got := list(t, s); !slices.Equal(got, []lease.Lease{foreign, kept}) {
			t.Errorf("listed: %v, want %v and %v", got, foreign, kept)
		}
		if st, err := s.Stats(t.Context()); err != nil || st.Total != 5 || st.Invalid != 3 || st.Blocks != 5 || st.FreeBlocks != 254 || st.FreeSingles != 255 {
			t.Errorf("stats %+v, %v", st, err)
		}
		if err := s.Renew(t.Context(), foreign); err != nil {
			t.Errorf("renewing a lease of another network: %v", err)
		}
		moved, err := s.Acquire(t.Context(), foreign.Underlay, lease.Block)
		if err != nil || !wide(t).Contains(moved.Subnet) {
			t.Errorf("acquire for a host with a lease of another network = %v, %v", moved, err)
		}
		if l, err := s.Acquire(t.Context(), netip.MustParseAddr("172.16.9.9"), lease.Block); err != nil {
			t.Errorf("acquire for a host with an unreadable row = %v, %v", l, err)
		}
		if err := s.Renew(t.Context(), leasetest.Of(leasetest.Host(77), "10.255.40.0/24")); !errors.Is(err, fault.Conflict) {
			t.Errorf("renewing what an unreadable row stands in the way of: %v, want a Conflict fault", err)
		}
		for i := range 251 { // all that is left but the one blocked
			if _, err := s.Acquire(t.Context(), leasetest.Host(100+i), lease.Block); err != nil {
				t.Fatalf("lease %d: %v", i, err)
			}
		}
		if _, err := s.Acquire(t.Context(), leasetest.Host(500), lease.Block); !errors.Is(err, fault.Exhausted) {
			t.Errorf("one more: %v, want an Exhausted fault", err)
		}
	})
}

// TestOverlapWithOldNetworkIsAvoided has a lease of an earlier block length cover part of the pool.
func TestOverlapWithOldNetworkIsAvoided(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	s := open(t, config(db, leasetest.Pool(t, "10.255.0.0/20", 24))) // 15 blocks
	wideLease := leasetest.Of(leasetest.Host(1), "10.255.8.0/21")
	if err := (deployed{connect(t, db)}).add(t, wideLease); err != nil {
		t.Fatal(err)
	}
	leasetest.Eventually(t, "the foreign lease is listed", func() bool { return has(t, s, wideLease) })
	for i := range 7 {
		l, err := s.Acquire(t.Context(), leasetest.Host(10+i), lease.Block)
		if err != nil || l.Subnet.Overlaps(wideLease.Subnet) {
			t.Fatalf("acquire = %v, %v beside %v", l, err, wideLease)
		}
	}
	if l, err := s.Acquire(t.Context(), leasetest.Host(20), lease.Block); !errors.Is(err, fault.Exhausted) {
		t.Errorf("acquire = %v, %v, want an Exhausted fault", l, err)
	}
	if err := s.Release(t.Context(), wideLease.Underlay); err != nil {
		t.Fatal(err)
	}
	if l, err := s.Acquire(t.Context(), leasetest.Host(20), lease.Block); err != nil || !l.Subnet.Overlaps(wideLease.Subnet) {
		t.Errorf("acquire = %v, %v, want a block that has become free", l, err)
	}
}

// TestTwoControllersSeeEachOther measures how long it takes.
func TestTwoControllersSeeEachOther(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		a, b := open(t, config(db, wide(t))), open(t, config(db, wide(t)))
		since := b.Must(t).Revision
		start := time.Now()
		l, err := a.Acquire(t.Context(), leasetest.Host(1), lease.Block)
		if err != nil {
			t.Fatal(err)
		}
		u, err := b.Watch(t.Context(), since)
		if err != nil || !slices.Equal(u.Set, []lease.Lease{l}) {
			t.Fatalf("the other controller's watch = %+v, %v, want %v", u, err, l)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %v, want at most 1 s", took)
		}
		if err := b.Renew(t.Context(), l); err != nil {
			t.Error(err)
		}
		if err := b.Release(t.Context(), l.Underlay); err != nil {
			t.Error(err)
		}
		if again, err := a.Acquire(t.Context(), l.Underlay, lease.Single); err != nil || again.Kind() != lease.Single {
			t.Errorf("acquire after a release elsewhere = %v, %v", again, err)
		}
	})
}

// TestManyControllersFillOnePool has three controllers give away all there is, and compares what they list.
func TestManyControllersFillOnePool(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		var stores []*leasesql.Store
		for range 3 {
			stores = append(stores, open(t, config(db, wide(t))))
		}
		got := make([]lease.Lease, 255)
		var wg sync.WaitGroup
		next := make(chan int)
		for g := range 48 {
			wg.Go(func() {
				for i := range next {
					var err error
					if got[i], err = stores[g%3].Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for i := range got {
			next <- i
		}
		close(next)
		wg.Wait()
		lease.Sort(got)
		for i, s := range stores {
			leasetest.Eventually(t, "the controller lists every lease", func() bool { return slices.Equal(list(t, s), got) })
			if _, err := s.Acquire(t.Context(), leasetest.Host(999), lease.Block); !errors.Is(err, fault.Exhausted) {
				t.Errorf("controller %d: %v, want an Exhausted fault", i, err)
			}
		}
		if r := stores[0].Must(t).Revision; r.Epoch != stores[1].Must(t).Revision.Epoch {
			t.Errorf("two epochs: %v and %v", r, stores[1].Must(t).Revision)
		}
	})
}

// TestRestartKeepsRevisions lets a watcher go from one controller to another that has just started, and still get changes only.
func TestRestartKeepsRevisions(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		a := open(t, config(db, wide(t)))
		for i := range 20 {
			if _, err := a.Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
				t.Fatal(err)
			}
		}
		before := a.Must(t)
		if err := a.Release(t.Context(), leasetest.Host(3)); err != nil {
			t.Fatal(err)
		}
		l, err := a.Acquire(t.Context(), leasetest.Host(30), lease.Single)
		if err != nil {
			t.Fatal(err)
		}
		b := open(t, config(db, wide(t)))
		u, err := b.Watch(t.Context(), before.Revision)
		if err != nil || u.Full || !slices.Equal(u.Set, []lease.Lease{l}) || len(u.Gone) != 1 {
			t.Fatalf("watch at a new controller = %+v, %v, want one lease more and one less", u, err)
		}
		if after, err := u.Apply(before.Leases); err != nil || !slices.Equal(after, list(t, b)) {
			t.Errorf("%v, %v", after, err)
		}
	})
}
