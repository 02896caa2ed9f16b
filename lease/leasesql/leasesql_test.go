package leasesql_test

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

func TestMain(m *testing.M) { testkit.Main(m) }

func config(db sqldb.Config, pool lease.Pool) leasesql.Config {
	return leasesql.Config{DB: db, Pool: pool, Expiration: leasetest.Expiration, Staleness: leasetest.Staleness, ReuseDelay: time.Hour}
}

// open starts a store that ends with the test.
func open(t testing.TB, cfg leasesql.Config) *leasesql.Store {
	t.Helper()
	s, err := leasesql.Open(t.Context(), cfg, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		s.Close()
	})
	return s
}

// connect opens the database beside the store.
func connect(t testing.TB, cfg sqldb.Config) *sqldb.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func exec(t testing.TB, db *sqldb.DB, text string, args ...any) int64 {
	t.Helper()
	n, err := db.Exec(t.Context(), text, args...)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return n
}

func age(db *sqldb.DB) func(testing.TB, netip.Addr, int) {
	return func(t testing.TB, host netip.Addr, seconds int) {
		t.Helper()
		if n := exec(t, db, "UPDATE subnets SET last_renewed_at = last_renewed_at - ? WHERE underlay_ip = ?", int64(seconds), host.String()); n != 1 {
			t.Fatalf("host %v has %d rows, want 1", host, n)
		}
	}
}

func TestConformance(t *testing.T) {
	for _, engine := range testkit.Engines {
		t.Run(engine, func(t *testing.T) {
			leasetest.Run(t, func(t testing.TB, pool lease.Pool) leasetest.Subject {
				db := testkit.Database(t, engine)
				return leasetest.Subject{Registry: open(t, config(db, pool)), Age: age(connect(t, db))}
			})
		})
	}
}

var quiet = slog.New(slog.DiscardHandler)
