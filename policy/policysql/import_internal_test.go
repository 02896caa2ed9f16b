package policysql

import (
	"context"
	"database/sql"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
)

func TestParseStamp(t *testing.T) {
	const base = 1767323045000000000 // 2026-01-02 03:04:05 UTC
	for text, want := range map[string]int64{
		"2026-01-02 03:04:05":           base,
		"2026-01-02 03:04:05.123456":    base + 123456000,
		"2026-01-02T03:04:05.5Z":        base + 500000000,
		"2026-01-02 03:04:05.1+02:00":   base + 100000000, // the zone is not looked at, as the deployed server does
		"2026-01-02 03:04:05 +0000 UTC": base,
		"1969-12-31 23:59:59":           0,
		"9999-12-31 23:59:59":           0,
	} {
		if got, err := parseStamp(text); err != nil || got != want {
			t.Errorf("parseStamp(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "now", "2026-13-02 03:04:05", "0000-00-00 00:00:00", "1767322985", "2026-01-02"} {
		if got, err := parseStamp(text); !errors.Is(err, fault.Invalid) {
			t.Errorf("parseStamp(%q) = %d, %v, want an Invalid fault", text, got, err)
		}
	}
}

func FuzzParseStamp(f *testing.F) {
	for _, s := range []string{"", "2026-01-02 03:04:05", "2026-01-02T03:04:05.123456789Z", "9999-12-31 23:59:59.999999", "-001-01-01 00:00:00", "2026-01-02 03:04:05."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := parseStamp(s); got < 0 || err != nil && (got != 0 || !errors.Is(err, fault.Invalid)) {
			t.Fatalf("parseStamp(%q) = %d, %v", s, got, err)
		}
	})
}

// meddler is a database in which somebody else writes before the policies are read.
type meddler struct {
	*sqldb.DB
	write func()
}

// Query implements sqldb.Querier.
func (m *meddler) Query(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	if strings.Contains(text, "FROM policies p") && m.write != nil {
		m.write()
		m.write = nil
	}
	return m.DB.Query(ctx, text, args...)
}

// TestADeployedServerThatStillWrites gives a tag to another group between the reading of groups and that of policies: the new group's policy must not
// become the old one's.
func TestADeployedServerThatStillWrites(t *testing.T) {
	for name, stamp := range map[string]string{"with a stamp": "UPDATE policies_info SET last_updated = '2030-01-01 00:00:01'", "in the same moment": "SELECT 1"} {
		t.Run(name, func(t *testing.T) {
			db, err := sqldb.Open(t.Context(), testkit.Database(t, sqldb.SQLite))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			run := func(all ...string) {
				t.Helper()
				for _, text := range all {
					if _, err := db.Exec(t.Context(), text); err != nil {
						t.Fatalf("%s: %v", text, err)
					}
				}
			}
			run(`CREATE TABLE "groups" (id integer PRIMARY KEY, guid text, type text)`, "CREATE TABLE policies_info (id integer, last_updated timestamp)",
				"CREATE TABLE destinations (id integer PRIMARY KEY, group_id int, port int, protocol text, start_port int, end_port int)",
				"CREATE TABLE policies (id integer PRIMARY KEY, group_id int, destination_id int)",
				`INSERT INTO "groups" VALUES (1, 'web', 'app'), (2, 'bank', 'app')`, "INSERT INTO policies_info VALUES (1, '2030-01-01 00:00:00')",
				"INSERT INTO destinations VALUES (1, 2, 0, 'tcp', 1, 1)")
			m := &meddler{db, func() {
				run(`UPDATE "groups" SET guid = 'auditor' WHERE id = 1`, "INSERT INTO policies VALUES (1, 1, 1)", stamp)
			}}
			if d, err := readDeployed(t.Context(), m); !errors.Is(err, fault.Conflict) {
				t.Errorf("read %+v, %v, want a Conflict fault", d, err)
			}
			if d, err := readDeployed(t.Context(), m); err != nil || len(d.rows) != 1 || d.rows[0].source.Group != "auditor" {
				t.Errorf("read %+v, %v, once nobody writes", d, err)
			}
		})
	}
}
