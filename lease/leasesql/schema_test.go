package leasesql_test

import (
	"flag"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// schemaOf lists columns and indexes of every table by what the engine says about itself.
var schemaOf = map[string][]string{
	sqldb.SQLite: {"SELECT name || ' ' || COALESCE(sql, '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"},
	sqldb.Postgres: {
		`SELECT concat_ws(' ', table_name, column_name, data_type, character_maximum_length, is_nullable, column_default) FROM information_schema.columns
			WHERE table_schema = 'public' ORDER BY table_name, ordinal_position`,
		"SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname",
	},
	sqldb.MySQL: {
		`SELECT CONCAT_WS(' ', table_name, column_name, column_type, is_nullable, extra) FROM information_schema.columns
			WHERE table_schema = DATABASE() ORDER BY table_name, ordinal_position`,
		`SELECT CONCAT_WS(' ', table_name, index_name, non_unique, GROUP_CONCAT(column_name ORDER BY seq_in_index)) FROM information_schema.statistics
			WHERE table_schema = DATABASE() GROUP BY table_name, index_name, non_unique ORDER BY table_name, index_name`,
		"SELECT CONCAT_WS(' ', table_name, engine) FROM information_schema.tables WHERE table_schema = DATABASE() ORDER BY table_name",
	},
}

// TestSchema opens the store twice and compares the tables with the golden file.
func TestSchema(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := connect(t, cfg)
		file := filepath.Join("testdata", "schema."+cfg.Type)
		for range 2 {
			open(t, config(cfg, wide(t)))
			got := testkit.Lines(t, db, schemaOf[db.Dialect().Name])
			testkit.Golden(t, file, got, *update)
		}
	})
}

// TestOtherMigrationRecordsAreLeftAlone begins with what a deployed controller has made: its table of leases and its record, in which any other row
// would keep it from starting.
func TestOtherMigrationRecordsAreLeftAlone(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := connect(t, cfg)
		id := map[string]string{sqldb.SQLite: "integer PRIMARY KEY AUTOINCREMENT", sqldb.Postgres: "SERIAL PRIMARY KEY", sqldb.MySQL: "int NOT NULL AUTO_INCREMENT PRIMARY KEY"}[cfg.Type]
		table := "CREATE TABLE IF NOT EXISTS subnets (id " + id + ", underlay_ip varchar(15) NOT NULL, overlay_subnet varchar(18) NOT NULL, overlay_hwaddr varchar(17) NOT NULL, " +
			"last_renewed_at bigint NOT NULL, UNIQUE (underlay_ip), UNIQUE (overlay_subnet), UNIQUE (overlay_hwaddr))"
		exec(t, db, table)
		exec(t, db, "CREATE TABLE gorp_migrations (id varchar(255) NOT NULL PRIMARY KEY, applied_at varchar(40))")
		exec(t, db, "INSERT INTO gorp_migrations (id, applied_at) VALUES ('1', 'once')")
		l := leasetest.Of(leasetest.Host(1), "10.255.30.0/24")
		if err := (deployed{db}).add(t, l); err != nil {
			t.Fatal(err)
		}
		s, err := leasesql.Open(t.Context(), config(cfg, wide(t)), quiet)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if got := s.Must(t).Leases; len(got) != 1 || got[0] != l {
			t.Errorf("leases are %v, want %v", got, l)
		}
		var n int
		if err := db.QueryRow(t.Context(), "SELECT COUNT(*) FROM gorp_migrations").Scan(&n); err != nil || n != 1 {
			t.Errorf("%d rows in gorp_migrations, %v, want the one that was there", n, err)
		}
		exec(t, db, table) // as a deployed controller does when it starts and its record is not there
	})
}
