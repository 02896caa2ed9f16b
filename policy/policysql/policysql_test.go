package policysql_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
)

func TestMain(m *testing.M) { testkit.Main(m) }

func config(db sqldb.Config) policysql.Config {
	return policysql.Config{DB: db, WatchWait: 20 * time.Second}
}

// open starts a store that ends with the test.
func open(t testing.TB, cfg policysql.Config) *policysql.Store {
	t.Helper()
	s, _ := start(t, cfg)
	return s
}

// start is open for a test that ends the store itself; it may do so more than once. Something may be done to it before it runs.
func start(t testing.TB, cfg policysql.Config, before ...func(s *policysql.Store)) (s *policysql.Store, stop func()) {
	t.Helper()
	s, err := policysql.Open(t.Context(), cfg, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range before {
		f(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
		s.Close()
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return s, stop
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

func eachEngine(t *testing.T, f func(t *testing.T, db sqldb.Config)) {
	for _, e := range testkit.Engines {
		t.Run(e, func(t *testing.T) {
			t.Parallel() // most of the time one waits for its server, or for time to pass
			f(t, testkit.Database(t, e))
		})
	}
}

func TestConformance(t *testing.T) {
	for _, engine := range testkit.Engines {
		opened := func(t testing.TB, maxTag identity.Tag) *policysql.Store {
			cfg := config(testkit.Database(t, engine))
			cfg.MaxTag = maxTag
			return open(t, cfg)
		}
		t.Run(engine+"/book", func(t *testing.T) {
			policytest.Run(t, func(t testing.TB, maxTag identity.Tag) policy.Book { return opened(t, maxTag) })
		})
		t.Run(engine+"/feed", func(t *testing.T) {
			policytest.RunFeed(t, func(t testing.TB, maxTag identity.Tag) policytest.Subject {
				s := opened(t, maxTag)
				return policytest.Subject{Feed: s, Book: s}
			})
		})
	}
}
