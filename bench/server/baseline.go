package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// Baseline is pgbench on a table like ours on the same server. Each sample begins with a table of its own that holds as many rows as is promised: what the
// samples before inserted would make it slower than what it stands for.
type Baseline struct {
	server           *testkit.Server
	dir, table, fill string
	rows, clients    int
	round            time.Duration
}

// NewBaseline is for tables that the statement table makes and fill, with their number as its one parameter, fills with rows.
func NewBaseline(s *testkit.Server, dir, table, fill string, rows, clients int, round time.Duration) *Baseline {
	return &Baseline{server: s, dir: dir, table: table, fill: fill, rows: rows, clients: clients, round: round}
}

// database makes the table anew and returns the name of its database.
func (b *Baseline) database(ctx context.Context) (string, error) {
	cfg, err := b.server.NewDatabase(ctx)
	if err != nil {
		return "", err
	}
	db, err := sqldb.Open(ctx, cfg)
	if err != nil {
		return "", err
	}
	defer db.Close()
	if _, err := db.Exec(ctx, b.table); err != nil {
		return "", err
	}
	_, err = db.Exec(ctx, b.fill, b.rows)
	return cfg.Name, err
}

// Script is one of pgbench's, with the transactions per second of its rounds by how they were sent.
type Script struct {
	b                *Baseline
	file             string
	simple, prepared []float64
}

// Script keeps text in pgbench's language in a file of this name.
func (b *Baseline) Script(name, text string) (*Script, error) {
	s := &Script{b: b, file: filepath.Join(b.dir, name+".sql")}
	return s, os.WriteFile(s.file, []byte(text), 0o644)
}

// Sample runs the script for a round of each protocol.
func (s *Script) Sample(ctx context.Context) error {
	run := func(to *[]float64, prepared bool) error {
		name, err := s.b.database(ctx)
		if err != nil {
			return err
		}
		rate, err := s.b.server.PGBench(ctx, name, s.file, s.b.clients, s.b.round, prepared)
		*to = append(*to, rate)
		return err
	}
	return errors.Join(run(&s.simple, false), run(&s.prepared, true))
}

// Compare adds the median of samples to r twice: as at least simple times pgbench with its own defaults and, as name.prepared, as at least prepared
// times pgbench with prepared statements; 0 is no bar.
func (s *Script) Compare(r *bench.Report, name string, samples []float64, simple, prepared float64) {
	rate := bench.Median(samples)
	r.RatioAtLeast(name, rate, "1/s", bench.Median(s.simple), simple)
	if prepared == 0 {
		r.Add(name+".prepared", rate, "1/s", bench.Median(s.prepared))
		return
	}
	r.RatioAtLeast(name+".prepared", rate, "1/s", bench.Median(s.prepared), prepared)
}
