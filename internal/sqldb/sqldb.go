// Package sqldb is how Silk's stores reach a relational database: SQLite inside the process, PostgreSQL, MySQL or MariaDB
// (Galera included) outside. It opens connections with limits and verified TLS, runs transactions that are retried when
// the database asks for it, tells failures apart, and brings schemas up to date.
//
// It knows no table but its own record of migrations, and it is no query builder: statements are written with ? for
// every argument and in SQL that all three engines share; Dialect has the few words that differ.
//
// Use: db, err := sqldb.Open(ctx, cfg); err = db.Migrate(ctx, "lease", files); err = db.Tx(ctx, func(tx *sqldb.Tx) error {...}).
package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
)

// DB is a pool of connections to one database. It is safe for concurrent use.
type DB struct {
	cfg     Config
	dialect Dialect
	pool    atomic.Pointer[sql.DB]
	texts   sync.Map // statement with ? -> statement of the dialect
	counts  counters

	mu   sync.Mutex
	file os.FileInfo // of an SQLite database, as it was when connections to it were opened
	left time.Time   // when connections to a server that takes no writes were last given up
}

type counters struct{ queries, errors, retries, slowest atomic.Int64 }

// Counts are what a DB has done since it was opened.
type Counts struct {
	Queries uint64        // statements sent, reads and writes, commits not counted
	Errors  uint64        // statements and commits that failed
	Retries uint64        // transactions begun again after a conflict or a lost connection
	Slowest time.Duration // the longest statement since the last call of DB.Counts
}

// Open connects to the database of cfg. It tries again while the server cannot be reached, until the configured timeout
// has passed or ctx ends; then the error is fault.Unavailable. A server that is there and turns us away, or is not the one it should be by its
// certificate, fails at once. A configuration that cannot work is fault.Invalid.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	var p config.Problems
	cfg.Validate(&p, "database")
	if err := p.Err(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	d := &DB{cfg: cfg, dialect: dialects[cfg.Type]}
	pool, err := cfg.connector()
	if err != nil {
		return nil, fmt.Errorf("open %s database: %w", cfg.Type, err)
	}
	d.pool.Store(pool)
	ctx, cancel := context.WithTimeout(ctx, cfg.timeout())
	defer cancel()
	for n := 1; ; n++ {
		err := d.Ping(ctx)
		if err == nil {
			break
		}
		if !errors.Is(err, fault.Unavailable) || isRefused(err) || pause(ctx, time.Second, 5*time.Second, n) != nil {
			d.Close()
			return nil, fmt.Errorf("open %s database: %w", cfg.Type, err)
		}
	}
	if err := d.settle(ctx); err != nil {
		d.Close()
		return nil, fmt.Errorf("open %s database: %w", cfg.Type, err)
	}
	return d, nil
}

// Close ends all connections.
func (d *DB) Close() error { return d.pool.Load().Close() }

// Dialect returns what is special about the engine.
func (d *DB) Dialect() Dialect { return d.dialect }

// Stats returns the figures of the connection pool.
func (d *DB) Stats() sql.DBStats { return d.pool.Load().Stats() }

// Counts returns what was done so far and starts a new search for the slowest statement.
func (d *DB) Counts() Counts {
	return Counts{
		Queries: uint64(d.counts.queries.Load()), Errors: uint64(d.counts.errors.Load()),
		Retries: uint64(d.counts.retries.Load()), Slowest: time.Duration(d.counts.slowest.Swap(0)),
	}
}

// Ping runs a trivial one-row select.
func (d *DB) Ping(ctx context.Context) error {
	var one int
	return d.QueryRow(ctx, "SELECT 1").Scan(&one)
}

// settle learns what can be known only from the server, or of the file, once it is there.
func (d *DB) settle(ctx context.Context) error {
	switch d.dialect.Name {
	case SQLite:
		_, err := d.Replaced()
		return err
	case MySQL:
		var galera bool
		if err := d.QueryRow(ctx, "SELECT @@wsrep_on").Scan(&galera); err != nil || !galera {
			return nil // not even a server that knows the variable
		}
		d.cfg.causal = true
		return d.reopen()
	}
	return nil
}

// reopen puts new connections in the place of all present ones. Those in use end when they are not any more.
func (d *DB) reopen() error {
	pool, err := d.cfg.connector()
	if err != nil {
		return err
	}
	return d.pool.Swap(pool).Close()
}

// Replaced reports whether the file of an SQLite database is another one than at the last call (a restored copy, or none at all). Then it has
// opened that, or made a new one. It is always false for servers.
func (d *DB) Replaced() (bool, error) {
	if d.dialect.Name != SQLite {
		return false, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := os.Stat(d.cfg.Path)
	if err == nil && (d.file == nil || os.SameFile(d.file, now)) {
		d.file = now
		return false, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fault.New(fault.Unavailable, fmt.Errorf("look at the database file: %w", err))
	}
	if err := d.reopen(); err != nil { // which makes the file
		return false, err
	}
	if d.file, err = os.Stat(d.cfg.Path); err != nil {
		return true, fault.New(fault.Unavailable, fmt.Errorf("look at the database file: %w", err))
	}
	return true, nil
}

// Querier is what DB and Tx have in common.
type Querier interface {
	Exec(ctx context.Context, text string, args ...any) (int64, error)
	Query(ctx context.Context, text string, args ...any) (*sql.Rows, error)
	QueryRow(ctx context.Context, text string, args ...any) *Row
	Dialect() Dialect
}

// runner is what *sql.DB and *sql.Tx have in common.
type runner interface {
	ExecContext(ctx context.Context, text string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error)
}

// Exec runs a statement outside a transaction and returns how many rows it met, changed or not.
func (d *DB) Exec(ctx context.Context, text string, args ...any) (int64, error) {
	return d.exec(ctx, d.pool.Load(), text, args)
}

// Query runs a select outside a transaction. The caller closes the rows, and passes what Rows.Err says through Failure.
func (d *DB) Query(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	return d.query(ctx, d.pool.Load(), text, args)
}

// QueryRow runs a select of at most one row outside a transaction.
func (d *DB) QueryRow(ctx context.Context, text string, args ...any) *Row {
	rows, err := d.query(ctx, d.pool.Load(), text, args)
	return &Row{rows, err}
}

// Row is the answer of QueryRow.
type Row struct {
	rows *sql.Rows
	err  error
}

// Scan copies the columns of the row. No row is fault.NotFound.
func (r *Row) Scan(into ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			return Failure(err)
		}
		return fault.NotFoundf("no such row")
	}
	if err := r.rows.Scan(into...); err != nil {
		return Failure(err)
	}
	return Failure(r.rows.Close())
}

func (d *DB) exec(ctx context.Context, r runner, text string, args []any) (int64, error) {
	defer d.time(time.Now())
	res, err := r.ExecContext(ctx, d.text(text), args...)
	if err != nil {
		return 0, d.failed(err)
	}
	n, err := res.RowsAffected()
	return n, d.failed(err)
}

func (d *DB) query(ctx context.Context, r runner, text string, args []any) (*sql.Rows, error) {
	defer d.time(time.Now())
	rows, err := r.QueryContext(ctx, d.text(text), args...)
	return rows, d.failed(err)
}

func (d *DB) failed(err error) error {
	if err != nil {
		d.counts.errors.Add(1)
	}
	if isReadOnly(err) {
		d.leave()
	}
	return Failure(err)
}

// leave gives up all connections because their server takes no writes: the address may lead to another one by now. It does so once a second at most.
func (d *DB) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.left) < time.Second {
		return
	}
	d.left = time.Now()
	_ = d.reopen() // an address that cannot be used was refused by Open
}

func (d *DB) time(start time.Time) {
	d.counts.queries.Add(1)
	for took := int64(time.Since(start)); ; {
		old := d.counts.slowest.Load()
		if took <= old || d.counts.slowest.CompareAndSwap(old, took) {
			return
		}
	}
}

// text returns the statement in the words of the dialect.
func (d *DB) text(s string) string {
	if !d.dialect.numbered {
		return s
	}
	if t, ok := d.texts.Load(s); ok {
		return t.(string)
	}
	t := number(s)
	d.texts.Store(s, t)
	return t
}
