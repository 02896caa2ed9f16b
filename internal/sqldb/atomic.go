package sqldb

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// Statement is one of a series for Atomic: an insert, update or delete.
type Statement struct {
	Text string
	Args []any
	Want int64 // rows that it must meet, or the whole series fails with Stale; Any for no matter

	// With, on PostgreSQL only, is a common table expression ("new AS (INSERT ... RETURNING ...)") before Text that Text may read from.
	With string

	// First, on PostgreSQL only, is another statement that is made a part of this one and run before it, because that costs the server less than two of
	// them. Both need a Want, and neither sees in its tables what the other does there. First is not counted among the results of Atomic.
	First *Statement
}

// Any is a Statement.Want that every number of rows satisfies.
const Any = -1

// Atomic runs statements in order in one transaction, all or none, and returns how many rows each met. Unlike Tx it does not try again: the
// statements came of something that was read before, and the caller must read that again. PostgreSQL takes the whole series in one round trip.
func (d *DB) Atomic(ctx context.Context, series []Statement) ([]int64, error) {
	return d.AtomicWhile(ctx, series, func() {})
}

// AtomicWhile is Atomic with something to do until the database has answered: PostgreSQL works meanwhile, other engines have committed by then. It is done
// once, except that it may be left out when the series fails, and must not use the database.
func (d *DB) AtomicWhile(ctx context.Context, series []Statement, meanwhile func()) ([]int64, error) {
	if d.dialect.Name == Postgres {
		return d.pipeline(ctx, series, meanwhile)
	}
	counts := make([]int64, len(series))
	err := d.once(ctx, 0, func(tx *Tx) error {
		for i, s := range series {
			n, err := tx.Exec(ctx, s.Text, s.Args...)
			if err != nil {
				return fmt.Errorf("statement %d: %w", i+1, err)
			}
			if s.Want != Any && n != s.Want {
				return errStale
			}
			counts[i] = n
		}
		return nil
	})
	if err == nil {
		meanwhile()
	}
	return counts, err
}

// divisionByZero is how a statement in pipeline says that it met another number of rows than it should: at the time the client could notice, the
// transaction would be committed.
const divisionByZero = "22012"

// words returns the statement with its checks, as one.
func (s Statement) words() (text string, args []any) {
	if s.Want == Any {
		if s.With != "" {
			return "WITH " + s.With + " " + s.Text, s.Args
		}
		return s.Text, s.Args
	}
	var b strings.Builder
	b.WriteString("WITH ")
	part := func(s Statement, name string) {
		if s.With != "" {
			b.WriteString(s.With + ", ")
		}
		b.WriteString(name + " AS (" + s.Text + " RETURNING 1)")
		args = append(args, s.Args...)
	}
	if s.First == nil {
		part(s, "met")
		b.WriteString(" SELECT 1 / (count(*) = ?::bigint)::integer FROM met")
		return b.String(), append(args, s.Want)
	}
	part(*s.First, "first")
	b.WriteString(", ")
	part(s, "met")
	// A part runs when its rows are counted: the first one first.
	b.WriteString(" SELECT 1 / ((SELECT count(*) FROM first) = ?::bigint AND (SELECT count(*) FROM met) = ?::bigint)::integer")
	return b.String(), append(args, s.First.Want, s.Want)
}

// pipeline sends everything up to the end of the implicit transaction before it waits for the first answer.
func (d *DB) pipeline(ctx context.Context, series []Statement, meanwhile func()) (counts []int64, err error) {
	defer d.time(time.Now())
	c, err := d.pool.Load().Conn(ctx)
	if err != nil {
		return nil, d.failed(err)
	}
	defer c.Close()
	err = c.Raw(func(conn any) (err error) {
		counts, err = d.sendBatch(ctx, conn.(*stdlib.Conn).Conn(), series, meanwhile)
		return err
	})
	if err != nil {
		return nil, d.failed(err)
	}
	return counts, nil
}

func (d *DB) sendBatch(ctx context.Context, c *pgx.Conn, series []Statement, meanwhile func()) (counts []int64, err error) {
	batch := &pgx.Batch{}
	for _, s := range series {
		text, args := s.words()
		batch.Queue(d.text(text), args...)
	}
	results := c.SendBatch(ctx, batch) // which returns when all of it is written
	defer func() {
		if cerr := results.Close(); err == nil {
			err = cerr
		}
		if isCode(err, divisionByZero) {
			err = errStale
		}
	}()
	meanwhile()
	counts = make([]int64, len(series))
	for i, s := range series {
		tag, err := results.Exec()
		if err != nil {
			return nil, fmt.Errorf("statement %d: %w", i+1, err)
		}
		if counts[i] = tag.RowsAffected(); s.Want != Any {
			counts[i] = s.Want
		}
	}
	return counts, nil
}
