package policybench

import (
	"context"
	"os"
	"path/filepath"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// baseline is pgbench on a table like that of policies with as many rows, in a database of its own on the same server: what the server
// commits when nothing stands before it.
type baseline struct {
	server           *testkit.Server
	database, script string
}

const (
	// The deployed table, whose source and destination are unique together.
	baselineTable = `CREATE TABLE policies (id serial PRIMARY KEY, group_id int NOT NULL, destination_id int NOT NULL, UNIQUE (group_id, destination_id))`
	baselineRows  = `INSERT INTO policies (group_id, destination_id) SELECT n, n FROM generate_series(1, ?::int) n`
	// Nine digits twice practically never meet in a run.
	baselineInsert = `\set s random(100000, 999999999)
\set d random(100000, 999999999)
INSERT INTO policies (group_id, destination_id) VALUES (:s, :d);
`
)

func newBaseline(ctx context.Context, s *testkit.Server, dir string) (*baseline, error) {
	cfg, err := s.NewDatabase(ctx)
	if err != nil {
		return nil, err
	}
	db, err := sqldb.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if _, err := db.Exec(ctx, baselineTable); err != nil {
		return nil, err
	}
	if _, err := db.Exec(ctx, baselineRows, held); err != nil {
		return nil, err
	}
	b := &baseline{server: s, database: cfg.Name, script: filepath.Join(dir, "insert.sql")}
	return b, os.WriteFile(b.script, []byte(baselineInsert), 0o644)
}

// rates are the transactions per second of the rounds, by how pgbench sends them.
type rates struct{ simple, prepared []float64 }

// sample runs the script for a round of each protocol and adds the transactions per second.
func (b *baseline) sample(ctx context.Context, to *rates) error {
	simple, err := b.server.PGBench(ctx, b.database, b.script, clients, round, false)
	if err != nil {
		return err
	}
	prepared, err := b.server.PGBench(ctx, b.database, b.script, clients, round, true)
	to.simple, to.prepared = append(to.simple, simple), append(to.prepared, prepared)
	return err
}
