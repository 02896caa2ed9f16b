package leasebench

import (
	"context"
	"os"
	"path/filepath"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// baseline is pgbench on a table like subnets with as many rows as there are leases, in a database of its own on the same
// server: what the server commits when nothing stands before it.
type baseline struct {
	server         *testkit.Server
	database       string
	insert, update string // scripts
}

const (
	// The deployed table, with its three unique columns.
	baselineTable = `CREATE TABLE subnets (id serial PRIMARY KEY, underlay_ip varchar(15) NOT NULL UNIQUE, overlay_subnet varchar(18) NOT NULL UNIQUE,
overlay_hwaddr varchar(17) NOT NULL UNIQUE, last_renewed_at bigint NOT NULL)`
	baselineRows = `INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at)
SELECT n, n, n, extract(epoch FROM now()) FROM generate_series(1, ?::int) n`
	// One random number stands for all three columns; 15 digits never meet twice in a run.
	baselineInsert = `\set n random(100000000000000, 999999999999999)
INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES (:n, :n, :n, extract(epoch FROM now())::bigint);
`
	baselineUpdate = `\set n random(1, 10000)
UPDATE subnets SET last_renewed_at = extract(epoch FROM now())::bigint WHERE underlay_ip = :n::text;
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
	b := &baseline{server: s, database: cfg.Name, insert: filepath.Join(dir, "insert.sql"), update: filepath.Join(dir, "update.sql")}
	if err := os.WriteFile(b.insert, []byte(baselineInsert), 0o644); err != nil {
		return nil, err
	}
	return b, os.WriteFile(b.update, []byte(baselineUpdate), 0o644)
}

// rates are the transactions per second of the rounds of one script, by how pgbench sends it.
type rates struct{ simple, prepared []float64 }

// sample runs a script for a round of each protocol and adds the transactions per second.
func (b *baseline) sample(ctx context.Context, script string, to *rates) error {
	simple, err := b.server.PGBench(ctx, b.database, script, clients, round, false)
	if err != nil {
		return err
	}
	prepared, err := b.server.PGBench(ctx, b.database, script, clients, round, true)
	to.simple, to.prepared = append(to.simple, simple), append(to.prepared, prepared)
	return err
}

// compare adds a rate to r twice: with a promise beside pgbench with its own defaults and, as name.prepared and without one, beside pgbench with prepared
// statements.
func (to *rates) compare(r *bench.Report, name string, samples []float64) {
	rate := bench.Median(samples)
	r.RatioAtLeast(name, rate, "1/s", bench.Median(to.simple), 1)
	r.Add(name+".prepared", rate, "1/s", bench.Median(to.prepared))
}
