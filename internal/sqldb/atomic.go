package sqldb

import (
	"context"
	"fmt"
	"slices"
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
}

// Any is a Statement.Want that every number of rows satisfies.
const Any = -1

// Atomic runs statements in order in one transaction, all or none, and returns how many rows each met. Unlike Tx it does not try again: the
// statements came of something that was read before, and the caller must read that again. PostgreSQL takes the whole series in one round trip.
func (d *DB) Atomic(ctx context.Context, series []Statement) ([]int64, error) {
	if d.dialect.Name == Postgres {
		return d.pipeline(ctx, series)
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
	return counts, err
}

// divisionByZero is how a statement in pipeline says that it met another number of rows than it should: at the time the client could notice, the
// transaction would be committed.
const divisionByZero = "22012"

// checked ends a statement that must meet as many rows as its last argument says.
const checked = " RETURNING 1) SELECT 1 / (count(*) = ?::bigint)::integer FROM met"

// pipeline sends everything up to the end of the implicit transaction before it waits for the first answer.
func (d *DB) pipeline(ctx context.Context, series []Statement) (counts []int64, err error) {
	defer d.time(time.Now())
	batch := &pgx.Batch{}
	for _, s := range series {
		text, args := s.Text, s.Args
		switch {
		case s.Want != Any:
			if s.With != "" {
				text = "WITH " + s.With + ", met AS (" + text + checked
			} else {
				text = "WITH met AS (" + text + checked
			}
			args = append(slices.Clip(args), s.Want)
		case s.With != "":
			text = "WITH " + s.With + " " + text
		}
		batch.Queue(d.text(text), args...)
	}
	c, err := d.pool.Load().Conn(ctx)
	if err != nil {
		return nil, d.failed(err)
	}
	defer c.Close()
	err = c.Raw(func(conn any) (err error) {
		counts, err = sendBatch(ctx, conn.(*stdlib.Conn).Conn(), batch, series)
		return err
	})
	if err != nil {
		return nil, d.failed(err)
	}
	return counts, nil
}

func sendBatch(ctx context.Context, c *pgx.Conn, batch *pgx.Batch, series []Statement) (counts []int64, err error) {
	results := c.SendBatch(ctx, batch)
	defer func() {
		if cerr := results.Close(); err == nil {
			err = cerr
		}
		if isCode(err, divisionByZero) {
			err = errStale
		}
	}()
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
