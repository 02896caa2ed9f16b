package controller_test

import (
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// TestConformance runs the suite of every registry over the whole way: client, mutual TLS, handler, store, database.
func TestConformance(t *testing.T) {
	each(t, func(t *testing.T, first sqldb.Config) {
		leasetest.Run(t, func(t testing.TB, pool lease.Pool) leasetest.Subject {
			db := first
			c := issue(t)
			if first.Type == sqldb.SQLite {
				db.Path = t.TempDir() + "/silk.db"
			} else {
				db = newDatabase(t)
			}
			cfg := c.config(db)
			cfg.Network, cfg.SubnetPrefixLength = pool.Network(), pool.Bits()
			cfg.LeaseExpiration, cfg.StalenessThreshold = int(leasetest.Expiration/time.Second), int(leasetest.Staleness/time.Second)
			r := start(t, c, cfg, quiet(t))
			beside, err := sqldb.Open(t.Context(), db)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { beside.Close() })
			return leasetest.Subject{Registry: r.client(t), Age: func(t testing.TB, host netip.Addr, seconds int) {
				n, err := beside.Exec(t.Context(), "UPDATE subnets SET last_renewed_at = last_renewed_at - ? WHERE underlay_ip = ?", seconds, host.String())
				if err != nil || n != 1 {
					t.Fatalf("age %v: %d rows, %v", host, n, err)
				}
			}}
		})
	})
}

func TestAcquiringTwiceGivesTheSameLease(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		k := start(t, c, c.config(db), quiet(t)).client(t)
		a := acquire(t, k, 1, lease.Block)
		if b := acquire(t, k, 1, lease.Single); a != b {
			t.Errorf("second lease %v, want %v", b, a)
		}
		if a.Subnet.Bits() != 24 || a.MAC != lease.MACOf(a.Subnet) || !netip.MustParsePrefix("10.255.0.0/16").Contains(a.Base()) {
			t.Errorf("lease %v is not one of the range", a)
		}
	})
}

func TestAMovedNetworkGivesNewLeasesAndKeepsOldOnes(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		r := start(t, c, c.config(db), quiet(t))
		k := r.client(t)
		old, moved := acquire(t, k, 1, lease.Block), acquire(t, k, 2, lease.Block)
		if err := r.stop(); err != nil {
			t.Fatal(err)
		}
		cfg := c.config(db)
		cfg.Network = netip.MustParsePrefix("10.254.0.0/16")
		k = start(t, c, cfg, quiet(t)).client(t)
		if err := k.Renew(t.Context(), old); err != nil {
			t.Errorf("renew of a lease of the old network: %v", err)
		}
		now := acquire(t, k, 2, lease.Block)
		if !cfg.Network.Contains(now.Base()) {
			t.Errorf("lease %v, want one of %v", now, cfg.Network)
		}
		want := []lease.Lease{now, old}
		got := leases(t, k)
		lease.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("leases\n%swant\n%s(moved from %v)", networks(got), networks(want), moved)
		}
	})
}

func TestReleaseRemovesALease(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		k := start(t, c, c.config(db), quiet(t)).client(t)
		a, b := acquire(t, k, 1, lease.Block), acquire(t, k, 2, lease.Single)
		for _, l := range []lease.Lease{a, b} {
			if err := k.Release(t.Context(), l.Underlay); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(leases(t, k), l) {
				t.Errorf("%v is listed after its release", l)
			}
		}
		if err := k.Release(t.Context(), host(3)); err != nil {
			t.Errorf("release of nothing: %v", err)
		}
	})
}

func TestAFullRangeRefusesUntilALeaseExpires(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		cfg.Network, cfg.SubnetPrefixLength, cfg.LeaseExpiration = netip.MustParsePrefix("10.255.0.0/29"), 30, 2
		k := start(t, c, cfg, quiet(t)).client(t)
		a := acquire(t, k, 1, lease.Block)
		_, err := k.Acquire(t.Context(), host(2), lease.Block)
		if se, ok := errors.AsType[*httpjson.StatusError](err); !ok || se.Status != http.StatusConflict || !strings.HasSuffix(se.Text, "no lease available") || !errors.Is(err, fault.Exhausted) {
			t.Fatalf("second host: %v, want 409 no lease available", err)
		}
		var b lease.Lease
		eventually(t, "the second host gets the expired lease", func() bool {
			b, err = k.Acquire(t.Context(), host(2), lease.Block)
			return err == nil
		})
		if b.Subnet != a.Subnet || b.Underlay != host(2) {
			t.Errorf("second host got %v, want the subnet of %v", b, a)
		}
		if err := k.Renew(t.Context(), a); !errors.Is(err, fault.Conflict) {
			t.Errorf("renewal by the host that lost it: %v, want a conflict", err)
		}
	})
}

func TestRenewOfAnotherLeaseIsAMismatch(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		k := start(t, c, c.config(db), quiet(t)).client(t)
		a := acquire(t, k, 1, lease.Block)
		before := leases(t, k)
		other := a
		other.Subnet = netip.MustParsePrefix("10.255.250.0/24")
		other.MAC = lease.MACOf(other.Subnet)
		err := k.Renew(t.Context(), other)
		if !errors.Is(err, fault.Conflict) || !strings.HasSuffix(err.Error(), "renew-subnet-lease: lease mismatch") {
			t.Errorf("renew: %v, want a conflict that ends in renew-subnet-lease: lease mismatch", err)
		}
		if after := leases(t, k); !slices.Equal(after, before) {
			t.Errorf("leases changed to\n%s", networks(after))
		}
		unknown := lease.Lease{Underlay: host(9), Subnet: other.Subnet, MAC: other.MAC}
		if err := k.Renew(t.Context(), unknown); err != nil || !slices.Contains(leases(t, k), unknown) {
			t.Errorf("renew of a lease that nobody knows: %v, listed %v", err, slices.Contains(leases(t, k), unknown))
		}
	})
}

func TestALeaseThatIsNotRenewedDropsOut(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		cfg.LeaseExpiration = 3
		k := start(t, c, cfg, quiet(t)).client(t)
		kept, dropped := acquire(t, k, 1, lease.Block), acquire(t, k, 2, lease.Block)
		eventually(t, "the lease drops out", func() bool {
			if err := k.Renew(t.Context(), kept); err != nil {
				t.Fatal(err)
			}
			ls := leases(t, k)
			if !slices.Contains(ls, kept) {
				t.Fatalf("a renewed lease is not listed:\n%s", networks(ls))
			}
			return !slices.Contains(ls, dropped)
		})
	})
}

func TestEveryHostOfAFullRangeGetsItsOwn(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		r := start(t, c, c.config(db), quiet(t))
		for i, kind := range []lease.Kind{lease.Block, lease.Single} {
			got := make([]lease.Lease, 255)
			var wg sync.WaitGroup
			for w := range 4 {
				k := r.client(t)
				wg.Go(func() {
					for n := w; n < len(got); n += 4 {
						l, err := k.Acquire(t.Context(), host(1000*i+n), kind)
						if err != nil {
							t.Error(err)
						}
						got[n] = l
					}
				})
			}
			wg.Wait()
			seen := map[netip.Prefix]bool{}
			for _, l := range got {
				seen[l.Subnet] = true
				if l.Kind() != kind {
					t.Errorf("%v is no %v", l, kind)
				}
			}
			if len(seen) != len(got) {
				t.Errorf("%d hosts got %d different subnets", len(got), len(seen))
			}
		}
	})
}

func TestMetricsCountLeases(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		cfg.StalenessThreshold = 1
		r := start(t, c, cfg, quiet(t))
		k := r.client(t)
		acquire(t, k, 1, lease.Block)
		acquire(t, k, 2, lease.Block)
		for sample, want := range map[string]float64{
			`silk_controller_leases{kind="block"}`: 2, `silk_controller_leases{kind="single"}`: 0,
			`silk_controller_leases_free{kind="block"}`: 253, `silk_controller_leases_free{kind="single"}`: 255,
			`silk_controller_range_size{kind="block"}`: 255, `silk_controller_leases_expired`: 0, `silk_controller_database_up`: 1,
			`silk_controller_requests_total{code="200",route="/leases/acquire"}`: 2, `silk_controller_database_errors_total`: 0,
			`silk_controller_request_seconds_count{route="/leases/acquire"}`: 2, `silk_controller_range_alarm_percent{kind="block"}`: 0,
		} {
			if got := metric(t, r, sample); got != want {
				t.Errorf("%s is %v, want %v", sample, got, want)
			}
		}
		if metric(t, r, `silk_controller_database_statements_total`) <= 0 {
			t.Error("no statement was counted")
		}
		eventually(t, "both leases are stale", func() bool { return metric(t, r, `silk_controller_leases_stale`) == 2 })
	})
}
