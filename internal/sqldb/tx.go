package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Tx is a transaction. It serves one goroutine.
type Tx struct {
	db *DB
	tx *sql.Tx

	// Attempt counts from 0 how often the transaction was begun again.
	Attempt int
}

// errStale is what Stale returns.
var errStale = errors.New("what the transaction was based on has changed")

// Stale makes DB.Tx begin again: what the transaction was based on turned out to be out of date.
func Stale() error { return errStale }

const (
	conflictTries = 24 // with pauses that add up to some 4 s
	lostTries     = 3
)

// Again calls fn until it succeeds or fails for good: while ctx lasts and for some seconds at most, it calls again, after growing pauses, when fn returned
// a conflict with another transaction (Stale included), and a few times when the connection was lost. A connection that is lost during a commit
// leaves open whether that happened: fn must find out by what it reads, and must be safe to run again after it did. n counts the calls
// from 0. Errors that last are fault.Unavailable when the database is to blame for them.
func (d *DB) Again(ctx context.Context, fn func(n int) error) error {
	lost := 0
	for n := 0; ; n++ {
		err := fn(n)
		if err == nil || ctx.Err() != nil {
			return Failure(err)
		}
		switch {
		case IsConflict(err):
			if n >= conflictTries {
				return fmt.Errorf("gave up after %d conflicts with other transactions: %w", n+1, Failure(err))
			}
		case IsLost(err):
			if lost++; lost >= lostTries {
				return Failure(err)
			}
		default:
			return err
		}
		d.counts.retries.Add(1)
		if pause(ctx, 2*time.Millisecond, 300*time.Millisecond, n+1) != nil {
			return Failure(err)
		}
	}
}

// Tx runs fn in a transaction and commits it if fn returns nil, else rolls it back; it begins again as Again does. The isolation is READ COMMITTED on
// servers; SQLite runs one transaction at a time.
func (d *DB) Tx(ctx context.Context, fn func(tx *Tx) error) error {
	return d.Again(ctx, func(n int) error { return d.once(ctx, n, fn) })
}

// once is one attempt. A panic of fn rolls back too.
func (d *DB) once(ctx context.Context, attempt int, fn func(tx *Tx) error) error {
	var opts *sql.TxOptions
	if d.dialect.Name == MySQL { // whose default is REPEATABLE READ, and whose variable for it has two names
		opts = &sql.TxOptions{Isolation: sql.LevelReadCommitted}
	}
	t, err := d.pool.Load().BeginTx(ctx, opts)
	if err != nil {
		return d.failed(err)
	}
	defer t.Rollback()
	if err := fn(&Tx{db: d, tx: t, Attempt: attempt}); err != nil {
		return err
	}
	return d.failed(t.Commit())
}

// Dialect is that of the database.
func (t *Tx) Dialect() Dialect { return t.db.dialect }

// Exec runs a statement and returns how many rows it met, changed or not.
func (t *Tx) Exec(ctx context.Context, text string, args ...any) (int64, error) {
	return t.db.exec(ctx, t.tx, text, args)
}

// Query runs a select. The caller closes the rows before the next statement, and passes what Rows.Err says through Failure.
func (t *Tx) Query(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	return t.db.query(ctx, t.tx, text, args)
}

// QueryRow runs a select of at most one row.
func (t *Tx) QueryRow(ctx context.Context, text string, args ...any) *Row {
	rows, err := t.db.query(ctx, t.tx, text, args)
	return &Row{rows, err}
}

// backoff returns first doubled n-1 times, at most limit, of which a random half to whole.
func backoff(first, limit time.Duration, n int) time.Duration {
	d := first
	for i := 1; i < n && d < limit; i++ {
		d *= 2
	}
	d = min(d, limit)
	return d/2 + rand.N(d/2+1)
}
