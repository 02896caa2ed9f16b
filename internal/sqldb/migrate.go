package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// record is the table in which Migrate keeps what was applied, one row per step of each schema. It has nothing to do with
// gorp_migrations, in which other programs on the same database keep theirs and refuse to start on a row that they do not know.
const record = `CREATE TABLE IF NOT EXISTS silk_migrations (
	name varchar(64) NOT NULL,
	step integer NOT NULL,
	applied_at bigint NOT NULL,
	PRIMARY KEY (name, step)
)`

// Migrate brings the schema called name up to date. files holds the steps of every dialect as DIALECT/NNNN_title.sql, numbered from 0001
// without gaps; a file's statements end in a semicolon at the end of a line. Each step is applied once, in order, under a lock that excludes
// other processes. MySQL commits after every definition, so steps must be written to be applied again after they were cut off: CREATE
// ... IF NOT EXISTS, INSERT of what is absent. It reports how many steps it applied. A database with more steps than files was made by
// a later version; that is no error, since later steps only add.
func (d *DB) Migrate(ctx context.Context, name string, files fs.FS) (applied int, err error) {
	steps, err := readSteps(files, d.dialect.Name)
	if err != nil {
		return 0, err
	}
	for tries := 0; ; tries++ {
		applied, err = d.migrate(ctx, name, steps)
		retry := IsConflict(err) || isDefinitionRace(err)
		if err == nil || !retry || tries == conflictTries {
			break
		}
		if pause(ctx, 50*time.Millisecond, 500*time.Millisecond, tries+1) != nil {
			break
		}
	}
	if err != nil {
		return applied, fmt.Errorf("migrate schema %s: %w", name, Failure(err))
	}
	return applied, nil
}

// migrate works on one connection, because the locks of servers belong to it. On SQLite a transaction is the lock.
func (d *DB) migrate(ctx context.Context, name string, steps [][]string) (applied int, err error) {
	c, err := d.pool.Load().Conn(ctx)
	if err != nil {
		return 0, d.failed(err)
	}
	defer c.Close()
	unlock, err := d.lock(ctx, c)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unlock(err)) }()
	if _, err := d.exec(ctx, c, record, nil); err != nil {
		return 0, err
	}
	var last int
	rows, err := d.query(ctx, c, "SELECT COALESCE(MAX(step), 0) FROM silk_migrations WHERE name = ?", []any{name})
	if err := (&Row{rows, err}).Scan(&last); err != nil {
		return 0, err
	}
	for i := last; i < len(steps); i++ {
		for _, s := range steps[i] {
			if _, err := d.exec(ctx, c, s, nil); err != nil {
				return applied, fmt.Errorf("step %d: %w", i+1, err)
			}
		}
		_, err := d.exec(ctx, c, "INSERT INTO silk_migrations (name, step, applied_at) VALUES (?, ?, "+d.dialect.Now+")", []any{name, i + 1})
		if err != nil {
			return applied, fmt.Errorf("record step %d: %w", i+1, err)
		}
		applied++
	}
	return applied, nil
}

// lock excludes other migrations of the same database and returns what ends that. What ends it is told whether the work failed.
func (d *DB) lock(ctx context.Context, c *sql.Conn) (func(error) error, error) {
	end := context.WithoutCancel(ctx)
	switch d.dialect.Name {
	case Postgres: // "silk" in ASCII; of the session, within this database; the server's lock_timeout bounds the wait
		if _, err := d.exec(ctx, c, "SELECT pg_advisory_lock(1936288875)", nil); err != nil {
			return nil, err
		}
		return func(error) error { _, err := d.exec(end, c, "SELECT pg_advisory_unlock(1936288875)", nil); return err }, nil
	case MySQL: // of the session and of one node: on Galera, definitions are ordered by the cluster and steps may be applied twice
		var got sql.NullInt64
		rows, err := d.query(ctx, c, "SELECT GET_LOCK(CONCAT('silk.', DATABASE()), 5)", nil)
		if err := (&Row{rows, err}).Scan(&got); err != nil {
			return nil, err
		}
		if got.Int64 != 1 {
			return nil, errStale
		}
		return func(error) error {
			_, err := d.exec(end, c, "DO RELEASE_LOCK(CONCAT('silk.', DATABASE()))", nil)
			return err
		}, nil
	}
	if _, err := d.exec(ctx, c, "BEGIN IMMEDIATE", nil); err != nil {
		return nil, err
	}
	return func(failed error) error {
		word := "COMMIT"
		if failed != nil {
			word = "ROLLBACK"
		}
		_, err := d.exec(end, c, word, nil)
		return err
	}, nil
}

// readSteps returns the statements of each file, in the order of their numbers.
func readSteps(files fs.FS, dialect string) ([][]string, error) {
	list, err := fs.Glob(files, dialect+"/*.sql")
	if err != nil {
		return nil, err
	}
	slices.Sort(list)
	steps := make([][]string, 0, len(list))
	for i, path := range list {
		number, _, _ := strings.Cut(strings.TrimPrefix(path, dialect+"/"), "_")
		if n, err := strconv.Atoi(number); err != nil || n != i+1 || len(number) != 4 {
			return nil, fault.Invalidf("migration %s: expected the number %04d", path, i+1)
		}
		b, err := fs.ReadFile(files, path)
		if err != nil {
			return nil, err
		}
		steps = append(steps, statements(string(b)))
	}
	if len(steps) == 0 {
		return nil, fault.Invalidf("no migrations for %s", dialect)
	}
	return steps, nil
}

// statements splits a file at semicolons that end a line and drops lines that are comments.
func statements(text string) []string {
	var all []string
	var b strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		if line == "" || strings.HasPrefix(strings.TrimSpace(line), "--") {
			continue
		}
		s, end := strings.CutSuffix(line, ";")
		b.WriteString(s)
		if !end {
			b.WriteByte('\n')
			continue
		}
		all = append(all, b.String())
		b.Reset()
	}
	if b.Len() > 0 {
		all = append(all, b.String())
	}
	return all
}
