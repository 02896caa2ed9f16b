package leasesql_test

import (
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// clients calls f(0), f(1), ... f(n-1) from 16 goroutines and returns calls per second.
func clients(b *testing.B, n int, f func(i int) error) float64 {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range 16 {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}

// BenchmarkStore compares the store with what pgbench commits, 16 clients each, on a durable PostgreSQL with 10,000 leases held.
func BenchmarkStore(b *testing.B) {
	server, err := testkit.StartPostgres(b.Context(), testkit.Options{Durable: true})
	if err != nil {
		testkit.Require(b, "postgres", err)
	}
	b.Cleanup(server.Stop)
	db, err := server.NewDatabase(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	s := open(b, config(db, leasetest.Pool(b, "10.0.0.0/8", 24)))
	raw := connect(b, db)
	held := make([]lease.Lease, 10000)
	clients(b, len(held), func(i int) (err error) {
		held[i], err = s.Acquire(b.Context(), leasetest.Host(i), lease.Block)
		return err
	})
	exec(b, raw, "CREATE TABLE baseline (LIKE subnets INCLUDING ALL)")
	insert := script(b, `INSERT INTO baseline (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at)
		VALUES (substr(md5(random()::text), 1, 15), substr(md5(random()::text), 1, 18), substr(md5(random()::text), 1, 17), floor(extract(epoch from now())))`)
	update := script(b, "\\set i random(0, 9999)\nUPDATE subnets SET last_renewed_at = floor(extract(epoch from now())) WHERE underlay_ip = '172.16.' || (:i / 256) || '.' || (:i % 256)")
	for b.Loop() {
		pgbench := func(file string) float64 {
			tps, err := server.PGBench(b.Context(), db.Name, file, 16, 4*time.Second, true)
			if err != nil {
				b.Fatal(err)
			}
			return tps
		}
		b.ReportMetric(pgbench(insert), "pgbench-insert/s")
		before := s.DBCounts().Queries
		b.ReportMetric(clients(b, 10000, func(i int) error {
			_, err := s.Acquire(b.Context(), leasetest.Host(20000+i), lease.Block)
			return err
		}), "acquire/s")
		b.ReportMetric(float64(s.DBCounts().Queries-before), "acquire-statements")
		clients(b, 10000, func(i int) error { return s.Release(b.Context(), leasetest.Host(20000+i)) })
		b.ReportMetric(pgbench(update), "pgbench-update/s")
		exec(b, raw, "UPDATE subnets SET last_renewed_at = last_renewed_at - 50")
		b.ReportMetric(clients(b, 10000, func(i int) error { return s.Renew(b.Context(), held[i]) }), "renew-written/s")
		b.ReportMetric(clients(b, 10000, func(i int) error { return s.Renew(b.Context(), held[i]) }), "renew-fresh/s")
		start := time.Now()
		for range 20 {
			if _, err := s.Leases(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/20, "list-us")
	}
}

func script(b *testing.B, text string) string {
	f := filepath.Join(b.TempDir(), "script")
	if err := os.WriteFile(f, []byte(text+";\n"), 0o644); err != nil {
		b.Fatal(err)
	}
	return f
}
