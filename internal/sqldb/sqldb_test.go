package sqldb_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

func open(t testing.TB, cfg sqldb.Config) *sqldb.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func exec(t testing.TB, q sqldb.Querier, text string, args ...any) int64 {
	t.Helper()
	n, err := q.Exec(t.Context(), text, args...)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return n
}

func number(t testing.TB, q sqldb.Querier, text string, args ...any) int64 {
	t.Helper()
	var n int64
	if err := q.QueryRow(t.Context(), text, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return n
}

func eachEngine(t *testing.T, f func(t *testing.T, cfg sqldb.Config)) {
	for _, e := range testkit.Engines {
		t.Run(e, func(t *testing.T) { f(t, testkit.Database(t, e)) })
	}
}

// pair opens a database with a table of two rows.
func pair(t *testing.T, cfg sqldb.Config) *sqldb.DB {
	t.Helper()
	db := open(t, cfg)
	exec(t, db, "CREATE TABLE pair (id integer NOT NULL PRIMARY KEY, n bigint NOT NULL)")
	exec(t, db, "INSERT INTO pair (id, n) VALUES "+sqldb.Marks(2, 2), 1, 0, 2, 0)
	return db
}

func TestNowIsWholeSecondsOf64Bits(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := open(t, cfg)
		now := number(t, db, "SELECT "+db.Dialect().Now)
		if d := time.Now().Unix() - now; d < -2 || d > 2 {
			t.Errorf("the database's time is %d, ours %d", now, time.Now().Unix())
		}
		if got := number(t, db, "SELECT "+db.Dialect().Now+" + 4000000000"); got < 4000000000+now {
			t.Errorf("now + 4000000000 = %d", got)
		}
	})
}

func TestTxRollsBack(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		boom := errors.New("boom")
		err := db.Tx(t.Context(), func(tx *sqldb.Tx) error {
			exec(t, tx, "UPDATE pair SET n = 7")
			return boom
		})
		if !errors.Is(err, boom) || number(t, db, "SELECT SUM(n) FROM pair") != 0 {
			t.Errorf("%v, and the sum is %d, want 0", err, number(t, db, "SELECT SUM(n) FROM pair"))
		}
		func() {
			defer func() { recover() }()
			db.Tx(t.Context(), func(tx *sqldb.Tx) error {
				exec(t, tx, "UPDATE pair SET n = 7")
				panic("boom")
			})
		}()
		if n := number(t, db, "SELECT SUM(n) FROM pair"); n != 0 {
			t.Errorf("after a panic the sum is %d, want 0", n)
		}
	})
}

func TestUpdateReportsRowsThatItMet(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		if n := exec(t, db, "UPDATE pair SET n = 0 WHERE id = ?", 1); n != 1 {
			t.Errorf("an update that changes nothing met %d rows, want 1", n)
		}
	})
}

// TestTxSurvivesDeadlocks has transactions lock two rows in opposite orders: the servers end one of them each time.
func TestTxSurvivesDeadlocks(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		const each = 25
		var wg, both sync.WaitGroup
		both.Add(2)
		if cfg.Type != sqldb.SQLite { // of which one transaction runs at a time
			for g := range 2 { // each has its first row before either asks for the other's
				wg.Go(func() {
					err := db.Tx(t.Context(), func(tx *sqldb.Tx) error {
						for i := range 2 {
							if _, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 0 WHERE id = ?", 1+(g+i)%2); err != nil {
								return err
							}
							if i == 0 && tx.Attempt == 0 {
								both.Done()
								both.Wait()
							}
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		for g := range 4 {
			wg.Go(func() {
				for range each {
					err := db.Tx(t.Context(), func(tx *sqldb.Tx) error {
						for i := range 2 {
							if _, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1 WHERE id = ?", 1+(g+i)%2); err != nil {
								return err
							}
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if n := number(t, db, "SELECT SUM(n) FROM pair"); n != 8*each {
			t.Errorf("the sum is %d, want %d", n, 8*each)
		}
		if db.Counts().Retries == 0 && cfg.Type != sqldb.SQLite {
			t.Error("no transaction was begun again: the test tested nothing")
		}
	})
}

// TestTxSurvivesAKilledConnection ends the server's side of a connection in the middle of a transaction.
func TestTxSurvivesAKilledConnection(t *testing.T) {
	for engine, kill := range map[string][2]string{
		sqldb.Postgres: {"SELECT pg_backend_pid()", "SELECT pg_terminate_backend(?)"},
		sqldb.MySQL:    {"SELECT CONNECTION_ID()", "KILL ?"},
	} {
		t.Run(engine, func(t *testing.T) {
			db := pair(t, testkit.Database(t, engine))
			err := db.Tx(t.Context(), func(tx *sqldb.Tx) error {
				id := number(t, tx, kill[0])
				if _, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1"); err != nil {
					return err
				}
				if tx.Attempt == 0 {
					if _, err := db.Exec(t.Context(), kill[1], id); err != nil {
						t.Error(err)
					}
				}
				_, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1")
				return err
			})
			if n := number(t, db, "SELECT SUM(n) FROM pair"); err != nil || n != 4 {
				t.Errorf("%v, and the sum is %d, want 4", err, n)
			}
		})
	}
}

// TestWhoIsGoneInATransactionHoldsUpNobodyForLong has a client stop in the middle of a transaction, as one does whose machine loses its power or its network: the
// server cannot know, and keeps the locks.
func TestWhoIsGoneInATransactionHoldsUpNobodyForLong(t *testing.T) {
	for _, engine := range []string{sqldb.Postgres, sqldb.MySQL} {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			cfg := testkit.Database(t, engine)
			gone, other := pair(t, cfg), open(t, cfg)
			locked, over := make(chan struct{}), make(chan struct{})
			done := make(chan struct{})
			go func() {
				defer close(done)
				gone.Tx(t.Context(), func(tx *sqldb.Tx) error {
					if tx.Attempt > 0 {
						return nil
					}
					_, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1")
					close(locked)
					<-over
					return err
				})
			}()
			<-locked
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
			defer cancel()
			start := time.Now()
			err := other.Tx(ctx, func(tx *sqldb.Tx) error { _, err := tx.Exec(ctx, "UPDATE pair SET n = n + 1"); return err })
			t.Logf("held up for %v", time.Since(start))
			close(over)
			<-done
			if err != nil {
				t.Errorf("another client: %v", err)
			}
		})
	}
}

// TestAServerThatTakesNoWritesIsLeft: behind one address another server may be in its place by now, but connections to it would stay for an hour, or for ever.
func TestAServerThatTakesNoWritesIsLeft(t *testing.T) {
	cfg := testkit.Database(t, sqldb.Postgres)
	db, admin := pair(t, cfg), open(t, cfg)
	exec(t, admin, "SET default_transaction_read_only = off") // of the one session that it has
	readOnly := func(word string) {
		t.Helper()
		exec(t, admin, "ALTER DATABASE "+cfg.Name+" SET default_transaction_read_only = "+word)
	}
	write := func() error {
		return db.Tx(t.Context(), func(tx *sqldb.Tx) error {
			_, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1")
			return err
		})
	}
	readOnly("on")
	var ended int64
	if err := admin.QueryRow(t.Context(), "SELECT COUNT(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").Scan(&ended); err != nil || ended == 0 {
		t.Fatalf("%d connections ended, %v", ended, err)
	}
	if err := write(); !errors.Is(err, fault.Unavailable) {
		t.Errorf("while nobody takes writes: %v, want an Unavailable fault", err)
	}
	readOnly("off") // for new connections
	testkit.Until(t, 10*time.Second, "writes are taken again", func() bool { return write() == nil })
}

func TestAtomicIsAllOrNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		add := func(want int64, id int) sqldb.Statement {
			return sqldb.Statement{Text: "UPDATE pair SET n = n + ? WHERE id = ?", Args: []any{1, id}, Want: want}
		}
		counts, err := db.Atomic(t.Context(), []sqldb.Statement{add(1, 1), add(sqldb.Any, 2), add(sqldb.Any, 3), add(0, 4)})
		if err != nil || len(counts) != 4 || counts[0] != 1 || counts[1] != 1 || counts[2] != 0 || counts[3] != 0 {
			t.Errorf("Atomic = %v, %v", counts, err)
		}
		if _, err := db.Atomic(t.Context(), []sqldb.Statement{add(1, 1), add(1, 3)}); !sqldb.IsConflict(err) {
			t.Errorf("a series that met too few rows: %v, want a conflict", err)
		}
		_, err = db.Atomic(t.Context(), []sqldb.Statement{add(1, 1), {Text: "INSERT INTO pair (id, n) VALUES (?, ?)", Args: []any{2, 0}, Want: 1}})
		if !sqldb.IsDuplicate(err) {
			t.Errorf("a series with a duplicate: %v", err)
		}
		if n := number(t, db, "SELECT SUM(n) FROM pair"); n != 2 {
			t.Errorf("the sum is %d, want 2", n)
		}
		if _, err := db.Atomic(t.Context(), []sqldb.Statement{add(1, 1)}); err != nil {
			t.Errorf("after failures: %v", err)
		}
	})
}

func TestAtomicWhileDoesBoth(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		add := sqldb.Statement{Text: "UPDATE pair SET n = n + ? WHERE id = ?", Args: []any{1, 1}, Want: 1}
		for n := range 3 { // prepared the first time
			done := 0
			if counts, err := db.AtomicWhile(t.Context(), []sqldb.Statement{add}, func() { done++ }); err != nil || counts[0] != 1 || done != 1 {
				t.Errorf("AtomicWhile = %v, %v, and did the other thing %d times, want once", counts, err, done)
			}
			if got := number(t, db, "SELECT n FROM pair WHERE id = 1"); int(got) != n+1 {
				t.Errorf("n is %d, want %d", got, n+1)
			}
		}
		add.Want, add.Args = 1, []any{1, 3}
		if _, err := db.AtomicWhile(t.Context(), []sqldb.Statement{add}, func() {}); !sqldb.IsConflict(err) {
			t.Errorf("a series that met too few rows: %v, want a conflict", err)
		}
	})
}

func TestAmong(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		exec(t, db, "CREATE TABLE word (w varchar(20))")
		words := []string{"", "a", `b"c`, `d\`, "{e,f}", "NULL", "g h"}
		for _, w := range words {
			exec(t, db, "INSERT INTO word (w) VALUES (?)", w)
		}
		for n := 1; n <= len(words); n++ {
			among, args := sqldb.Among(db.Dialect(), "w", words[:n])
			if got := number(t, db, "SELECT COUNT(*) FROM word WHERE "+among, args...); int(got) != n {
				t.Errorf("%d rows are among %q, want %d", got, words[:n], n)
			}
		}
		among, args := sqldb.Among(db.Dialect(), "id", []int64{2, 1 << 40, -1})
		if got := number(t, db, "SELECT SUM(id) FROM pair WHERE "+among, args...); got != 2 {
			t.Errorf("the sum is %d, want 2", got)
		}
	})
}

func TestPostgresPlansOnce(t *testing.T) {
	db := open(t, testkit.Database(t, sqldb.Postgres))
	if n := number(t, db, "SELECT COUNT(*) FROM pg_settings WHERE name || '=' || setting IN ('plan_cache_mode=force_generic_plan', 'enable_seqscan=off', 'jit=off')"); n != 3 {
		t.Errorf("%d of 3 settings are what they should be", n)
	}
}

// TestStatementFirst has two statements in one, of which each must meet what it wants.
func TestStatementFirst(t *testing.T) {
	db := pair(t, testkit.Database(t, sqldb.Postgres))
	both := func(first, second int64) []sqldb.Statement {
		return []sqldb.Statement{{
			Text: "UPDATE pair SET n = n + ? WHERE id = ?", Args: []any{100, 2}, Want: second,
			First: &sqldb.Statement{
				With: "gone AS (DELETE FROM pair WHERE id = ? RETURNING id)", Text: "INSERT INTO pair (id, n) SELECT id + ?, ? FROM gone", Args: []any{1, 10, 7}, Want: first,
			},
		}}
	}
	const sum = "SELECT SUM(id * 1000 + n) FROM pair"
	for _, want := range [][2]int64{{2, 1}, {1, 0}, {0, 0}} {
		if _, err := db.Atomic(t.Context(), both(want[0], want[1])); !sqldb.IsConflict(err) || number(t, db, sum) != 1000+2000 {
			t.Errorf("wanting %v: %v, want a conflict and nothing changed", want, err)
		}
	}
	if n, err := db.Atomic(t.Context(), both(1, 1)); err != nil || len(n) != 1 || n[0] != 1 {
		t.Errorf("%v, %v", n, err)
	}
	if n := number(t, db, sum); n != 2100+11007 {
		t.Errorf("the sum is %d, want %d", n, 2100+11007)
	}
}

func TestStatementWith(t *testing.T) {
	db := pair(t, testkit.Database(t, sqldb.Postgres))
	both := func(want int64) sqldb.Statement {
		return sqldb.Statement{With: "gone AS (DELETE FROM pair WHERE id = ? RETURNING id)", Text: "INSERT INTO pair (id, n) SELECT id + ?, 7 FROM gone", Args: []any{1, 10}, Want: want}
	}
	if _, err := db.Atomic(t.Context(), []sqldb.Statement{both(2)}); !sqldb.IsConflict(err) || number(t, db, "SELECT SUM(id) FROM pair") != 3 {
		t.Errorf("%v, want a conflict and nothing changed", err)
	}
	if _, err := db.Atomic(t.Context(), []sqldb.Statement{both(1)}); err != nil || number(t, db, "SELECT SUM(id) FROM pair") != 13 {
		t.Errorf("%v, want the row moved", err)
	}
	if n, err := db.Atomic(t.Context(), []sqldb.Statement{both(sqldb.Any)}); err != nil || n[0] != 0 {
		t.Errorf("%v, %v, want no row met", n, err)
	}
}

func TestUpsert(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		exec(t, db, "INSERT INTO pair (id, n) VALUES "+sqldb.Marks(2, 2)+db.Dialect().Upsert("id", "n"), 2, 5, 3, 6)
		exec(t, db, "INSERT INTO pair (id, n) SELECT id, 10 + n FROM pair WHERE id IN (?, ?)"+db.Dialect().Upsert("id", "n"), 3, 3)
		if n := number(t, db, "SELECT SUM(n * id) FROM pair"); n != 10+16*3 {
			t.Errorf("the sum is %d, want %d", n, 10+16*3)
		}
	})
}

func TestFailuresHaveKinds(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := pair(t, cfg)
		if _, err := db.Exec(t.Context(), "INSERT INTO pair (id, n) VALUES (?, ?)", 1, 1); !sqldb.IsDuplicate(err) || errors.Is(err, fault.Unavailable) {
			t.Errorf("duplicate: %v", err)
		}
		if _, err := db.Exec(t.Context(), "UPDATE absent SET n = 1"); !sqldb.IsMissing(err) || errors.Is(err, fault.Unavailable) {
			t.Errorf("missing table: %v", err)
		}
		var n int
		if err := db.QueryRow(t.Context(), "SELECT n FROM pair WHERE id = ?", 9).Scan(&n); !errors.Is(err, fault.NotFound) {
			t.Errorf("missing row: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
		defer cancel()
		if _, err := db.Exec(ctx, "UPDATE pair SET n = 1"); !errors.Is(err, fault.Unavailable) {
			t.Errorf("no time left: %v, want an Unavailable fault", err)
		}
		if c := db.Counts(); c.Errors < 3 || c.Queries < 5 || c.Slowest == 0 {
			t.Errorf("counts are %+v", c)
		}
	})
}

func TestServerThatIsAway(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	silent := uint16(ln.Addr().(*net.TCPAddr).Port)
	dir := t.TempDir()
	for name, cfg := range map[string]sqldb.Config{
		"silent postgres":  {Type: sqldb.Postgres, Host: "127.0.0.1", Port: silent, User: "u", Name: "d"},
		"silent mysql":     {Type: sqldb.MySQL, Host: "127.0.0.1", Port: silent, User: "u", Name: "d"},
		"no postgres":      {Type: sqldb.Postgres, Host: dir, Port: 1, User: "u", Name: "d"},
		"no mysql":         {Type: sqldb.MySQL, Host: filepath.Join(dir, "s"), User: "u", Name: "d"},
		"no such database": {Type: sqldb.SQLite, Path: "/proc/silk/silk.db"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg.Timeout = 2
			start := time.Now()
			db, err := sqldb.Open(context.Background(), cfg)
			if err == nil {
				db.Close()
			}
			if !errors.Is(err, fault.Unavailable) {
				t.Errorf("%v, want an Unavailable fault", err)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("gave up after %v, want about 2 s", took)
			}
		})
	}
}

func TestConfigIsChecked(t *testing.T) {
	for want, cfg := range map[string]sqldb.Config{
		"db.type":    {Type: "oracle"},
		"db.path":    {Type: sqldb.SQLite},
		"db.host":    {Type: sqldb.MySQL, User: "u", Port: 1},
		"db.user":    {Type: sqldb.MySQL, Host: "h", Port: 1},
		"db.port":    {Type: sqldb.Postgres, Host: "h", User: "u"},
		"db.timeout": {Type: sqldb.Postgres, Host: "h", User: "u", Port: 1, Timeout: -1},
		"db.ca_cert": {Type: sqldb.Postgres, Host: "h", User: "u", Port: 1, RequireSSL: true},
	} {
		var p config.Problems
		cfg.Validate(&p, "db")
		if err := p.Err(); err == nil || !strings.HasPrefix(err.Error(), want+":") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v, want a problem with %s only", cfg, err, want)
		}
		if _, err := sqldb.Open(t.Context(), cfg); !errors.Is(err, fault.Invalid) {
			t.Errorf("Open(%+v): %v, want an Invalid fault", cfg, err)
		}
	}
}

var steps = fstest.MapFS{}

func init() {
	for _, e := range testkit.Engines {
		steps[e+"/0001_first.sql"] = &fstest.MapFile{Data: []byte("-- a comment;\nCREATE TABLE IF NOT EXISTS one (\n\tid integer NOT NULL PRIMARY KEY\n);\nCREATE TABLE IF NOT EXISTS two (id integer NOT NULL PRIMARY KEY);\n")}
		steps[e+"/0002_second.sql"] = &fstest.MapFile{Data: []byte("INSERT INTO one (id) SELECT 1 FROM (SELECT 1 AS x) AS y WHERE NOT EXISTS (SELECT 1 FROM one);\n")}
	}
}

// TestMigrateOnceFromManyProcesses has eight processes, as far as the database can tell, start at once.
func TestMigrateOnceFromManyProcesses(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		var wg sync.WaitGroup
		total := make([]int, 8)
		for i := range total {
			db := open(t, cfg)
			wg.Go(func() {
				var err error
				if total[i], err = db.Migrate(t.Context(), "test", steps); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		sum := 0
		for _, n := range total {
			sum += n
		}
		db := open(t, cfg)
		if sum != 2 || number(t, db, "SELECT COUNT(*) FROM one") != 1 || number(t, db, "SELECT COUNT(*) FROM silk_migrations WHERE name = 'test'") != 2 {
			t.Errorf("%v steps were applied, %d in all, want 2", total, sum)
		}
		if n, err := db.Migrate(t.Context(), "another", steps); n != 2 || err != nil {
			t.Errorf("another schema of the same database: %d steps, %v", n, err)
		}
		older := fstest.MapFS{cfg.Type + "/0001_first.sql": steps[cfg.Type+"/0001_first.sql"]}
		if n, err := db.Migrate(t.Context(), "test", older); n != 0 || err != nil {
			t.Errorf("an older version beside: %d steps, %v, want none", n, err)
		}
	})
}

// TestMigrateGoesOnWhereItWasCutOff has the second statement of a step fail the first time.
func TestMigrateGoesOnWhereItWasCutOff(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := open(t, cfg)
		good := string(steps[cfg.Type+"/0001_first.sql"].Data)
		broken := fstest.MapFS{cfg.Type + "/0001_first.sql": {Data: []byte(good + "INSERT INTO absent VALUES (1);\n")}}
		if _, err := db.Migrate(t.Context(), "test", broken); !sqldb.IsMissing(err) {
			t.Fatalf("a broken step: %v", err)
		}
		if n, err := db.Migrate(t.Context(), "test", steps); n != 2 || err != nil {
			t.Errorf("after a broken step: %d steps, %v, want 2", n, err)
		}
	})
}

func TestMigrationsAreNumbered(t *testing.T) {
	db := open(t, testkit.Database(t, sqldb.SQLite))
	for name, files := range map[string]fstest.MapFS{
		"gap":   {"sqlite/0002_a.sql": {Data: []byte("SELECT 1;")}},
		"short": {"sqlite/1_a.sql": {Data: []byte("SELECT 1;")}},
		"none":  {"postgres/0001_a.sql": {Data: []byte("SELECT 1;")}},
	} {
		if _, err := db.Migrate(t.Context(), "test", files); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want an Invalid fault", name, err)
		}
	}
}

func TestReplacedFileIsOpened(t *testing.T) {
	cfg := testkit.Database(t, sqldb.SQLite)
	db := pair(t, cfg)
	if was, err := db.Replaced(); was || err != nil {
		t.Errorf("the same file: %v, %v", was, err)
	}
	for _, end := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(cfg.Path + end); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if was, err := db.Replaced(); !was || err != nil {
		t.Errorf("a deleted file: %v, %v, want true", was, err)
	}
	if was, err := db.Replaced(); was || err != nil {
		t.Errorf("once more: %v, %v, want false", was, err)
	}
	if _, err := db.Exec(t.Context(), "UPDATE pair SET n = 1"); !sqldb.IsMissing(err) {
		t.Errorf("the new file is not empty: %v", err)
	}
	if st, err := os.Stat(cfg.Path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v, want mode 0600", st.Mode(), err)
	}
}
