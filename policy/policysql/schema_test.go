package policysql_test

import (
	"flag"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policytest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// described lists columns and indexes of the package's tables by what the engine says about itself.
var described = map[string][]string{
	sqldb.SQLite: {"SELECT name || ' ' || sql FROM sqlite_master WHERE sql IS NOT NULL AND (tbl_name LIKE 'silk_polic%' OR tbl_name LIKE 'silk_secur%') ORDER BY name"},
	sqldb.Postgres: {
		`SELECT concat_ws(' ', table_name, column_name, data_type, character_maximum_length, is_nullable) FROM information_schema.columns
			WHERE table_schema = 'public' AND (table_name LIKE 'silk_polic%' OR table_name LIKE 'silk_secur%') ORDER BY table_name, ordinal_position`,
		"SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND (tablename LIKE 'silk_polic%' OR tablename LIKE 'silk_secur%') ORDER BY indexname",
		"SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'f' ORDER BY 1",
	},
	sqldb.MySQL: {
		`SELECT CONCAT_WS(' ', table_name, column_name, column_type, collation_name, is_nullable) FROM information_schema.columns
			WHERE table_schema = DATABASE() AND (table_name LIKE 'silk_polic%' OR table_name LIKE 'silk_secur%') ORDER BY table_name, ordinal_position`,
		`SELECT CONCAT_WS(' ', table_name, index_name, non_unique, GROUP_CONCAT(column_name ORDER BY seq_in_index)) FROM information_schema.statistics
			WHERE table_schema = DATABASE() AND (table_name LIKE 'silk_polic%' OR table_name LIKE 'silk_secur%') GROUP BY table_name, index_name, non_unique ORDER BY table_name, index_name`,
		`SELECT CONCAT_WS(' ', table_name, column_name, referenced_table_name, referenced_column_name) FROM information_schema.key_column_usage
			WHERE table_schema = DATABASE() AND referenced_table_name IS NOT NULL ORDER BY table_name, column_name`,
		"SELECT CONCAT_WS(' ', table_name, engine) FROM information_schema.tables WHERE table_schema = DATABASE() AND (table_name LIKE 'silk_polic%' OR table_name LIKE 'silk_secur%') ORDER BY table_name",
	},
}

// TestSchema opens the store twice, beside the tables of a deployed policy-server, and compares its tables with the golden file.
func TestSchema(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg sqldb.Config) {
		db := connect(t, cfg)
		deployedTables(t, db)
		exec(t, db, "CREATE TABLE gorp_migrations (id varchar(255) NOT NULL PRIMARY KEY, applied_at varchar(40))")
		exec(t, db, "INSERT INTO gorp_migrations (id, applied_at) VALUES ('79', 'once')")
		file := filepath.Join("testdata", "schema."+cfg.Type)
		for range 2 {
			s := open(t, config(cfg))
			create(t, s, policytest.Of(t, "a b tcp 1"))
			got := testkit.Lines(t, db, described[db.Dialect().Name])
			testkit.Golden(t, file, got, *update)
		}
		for table, want := range map[string]int{"gorp_migrations": 1, "policies": 9, "destinations": 7, "policies_info": 1} {
			var n int
			if err := db.QueryRow(t.Context(), "SELECT COUNT(*) FROM "+table).Scan(&n); err != nil || n != want {
				t.Errorf("the deployed server's table %s has %d rows, %v, want the %d that were there", table, n, err, want)
			}
		}
	})
}
