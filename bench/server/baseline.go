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

// Baseline is pgbench on a table like ours, in a database of its own on the same server.
type Baseline struct {
	server        *testkit.Server
	dir, database string
	clients       int
	round         time.Duration
}

// NewBaseline makes the database: table creates the table, fill inserts as many rows as its one parameter says.
func NewBaseline(ctx context.Context, s *testkit.Server, dir, table, fill string, rows, clients int, round time.Duration) (*Baseline, error) {
	cfg, err := s.NewDatabase(ctx)
	if err != nil {
		return nil, err
	}
	db, err := sqldb.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if _, err := db.Exec(ctx, table); err != nil {
		return nil, err
	}
	if _, err := db.Exec(ctx, fill, rows); err != nil {
		return nil, err
	}
	return &Baseline{server: s, dir: dir, database: cfg.Name, clients: clients, round: round}, nil
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
		rate, err := s.b.server.PGBench(ctx, s.b.database, s.file, s.b.clients, s.b.round, prepared)
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
