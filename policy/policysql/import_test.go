package policysql_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/secgroup"
)

// deployedTables makes the tables of a deployed policy-server as its migrations leave them, but for those that policies are not in.
func deployedTables(t testing.TB, db *sqldb.DB) {
	t.Helper()
	id, text, stamp, groups := "integer PRIMARY KEY AUTOINCREMENT", "text", "TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP", `"groups"`
	switch db.Dialect().Name {
	case sqldb.Postgres:
		id = "SERIAL PRIMARY KEY"
	case sqldb.MySQL:
		id, text, stamp, groups = "int NOT NULL AUTO_INCREMENT PRIMARY KEY", "varchar(255)", "TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6)", "`groups`"
	}
	exec(t, db, "CREATE TABLE "+groups+" (id "+id+", guid "+text+" NULL UNIQUE, type "+text+" DEFAULT 'app')")
	exec(t, db, "CREATE TABLE destinations (id "+id+", group_id int, port int, protocol "+text+", start_port int, end_port int, UNIQUE (group_id, start_port, end_port, protocol))")
	exec(t, db, "CREATE TABLE policies (id "+id+", group_id int, destination_id int, UNIQUE (group_id, destination_id))")
	exec(t, db, "CREATE TABLE policies_info (id "+id+", last_updated "+stamp+")")
	for i := range 12 { // one row a tag, free at first
		exec(t, db, "INSERT INTO "+groups+" (id, guid, type) VALUES (?, NULL, NULL)", 1+i)
	}
	name := func(id int, guid, kind string) {
		exec(t, db, "UPDATE "+groups+" SET guid = ?, type = ? WHERE id = ?", guid, kind, id)
	}
	name(2, "web", "app")
	name(3, "api", "app")
	name(5, "worker", "app")
	name(7, string(identity.IngressRouter), "router")
	name(9, "a,b", "app")
	for i, d := range []struct {
		group, port, start, end int
		protocol                string
	}{{3, 8080, 8080, 8080, "tcp"}, {2, 0, 9000, 9100, "udp"}, {3, 70000, 70000, 70000, "tcp"}, {11, 1, 1, 1, "tcp"}, {9, 1, 1, 1, "tcp"}, {7, 1, 1, 1, "tcp"}, {3, 2, 2, 2, "icmp"}} {
		exec(t, db, "INSERT INTO destinations (id, group_id, port, protocol, start_port, end_port) VALUES (?, ?, ?, ?, ?, ?)", 1+i, d.group, d.port, d.protocol, d.start, d.end)
		exec(t, db, "INSERT INTO policies (group_id, destination_id) VALUES (2, ?)", 1+i)
	}
	exec(t, db, "INSERT INTO policies (group_id, destination_id) VALUES (5, 1)")
	exec(t, db, "INSERT INTO policies (group_id, destination_id) VALUES (2, 99)") // has no destination
	exec(t, db, "INSERT INTO policies_info (id, last_updated) VALUES (1, '2037-01-02 03:04:05.123456')")
	deployedGroups(t, db)
}

// deployedGroups makes the table of security groups, with a group that nobody can read.
func deployedGroups(t testing.TB, db *sqldb.DB) {
	t.Helper()
	text, lists := "text", "text"
	switch db.Dialect().Name {
	case sqldb.Postgres:
		lists = "jsonb"
	case sqldb.MySQL:
		text, lists = "mediumtext", "json"
	}
	exec(t, db, "CREATE TABLE security_groups (id bigint NOT NULL PRIMARY KEY, guid varchar(36) NOT NULL UNIQUE, name varchar(255) NOT NULL, rules "+text+
		", staging_default bool DEFAULT false, running_default bool DEFAULT false, staging_spaces "+lists+", running_spaces "+lists+")")
	for _, v := range []string{
		`7, 'g7', 'public', '[{"protocol":"all","destination":"10.0.0.1","ports":"","type":0,"code":0,"description":"","log":false}]', true, false, '[]', '["s2", "s1"]'`,
		`8, 'g8', 'torn', '[{', false, true, '[]', '[]'`,
		`900000000000, 'g9', 'late', '[]', false, true, '["s3"]', NULL`,
	} {
		exec(t, db, "INSERT INTO security_groups (id, guid, name, rules, staging_default, running_default, staging_spaces, running_spaces) VALUES ("+v+")")
	}
}

const deployedStamp = 2114478245123456000 // nanoseconds, of the time above in UTC

func TestImport(t *testing.T) {
	for _, apart := range []bool{false, true} {
		eachEngine(t, func(t *testing.T, db sqldb.Config) {
			from, source := sqldb.Config{}, db
			if apart { // from another engine, too
				source = testkit.Database(t, map[string]string{sqldb.SQLite: sqldb.MySQL, sqldb.MySQL: sqldb.Postgres, sqldb.Postgres: sqldb.SQLite}[db.Type])
				from = source
			}
			raw := connect(t, source)
			deployedTables(t, raw)
			s, watching := open(t, config(db)), open(t, config(db))
			got, err := s.Import(t.Context(), from)
			if err != nil {
				t.Fatal(err)
			}
			if got.Policies != 3 || got.Groups != 4 || got.SecurityGroups != 2 || got.Skipped != 8 || len(got.Reasons) != 8 {
				t.Errorf("imported %+v, want 3 policies, 4 groups, 2 security groups and 8 rows left out", got)
			}
			for _, part := range []string{"group 9", "70000", "group 11, is missing", "group 9, is missing", `another type than "app"`, "icmp", "group 0, is missing", "security group 8"} {
				if !slices.ContainsFunc(got.Reasons, func(r string) bool { return strings.Contains(r, part) }) {
					t.Errorf("no reason speaks of %q: %q", part, got.Reasons)
				}
			}
			want := []policy.Rule{
				{Policy: policytest.Of(t, "web api tcp 8080"), SourceTag: 2, DestinationTag: 3},
				{Policy: policytest.Of(t, "worker api tcp 8080"), SourceTag: 5, DestinationTag: 3},
				{Policy: policytest.Of(t, "web web udp 9000-9100"), SourceTag: 2, DestinationTag: 2},
			}
			for _, s := range []*policysql.Store{s, watching} {
				policytest.Eventually(t, "the policies are there", func() bool { return slices.Equal(rules(t, s), want) })
				if tag := tags(t, s)[identity.IngressRouter]; tag.Tag != 7 || tag.Kind != identity.Router {
					t.Errorf("the router has %+v, want tag 7", tag)
				}
				if sn := snapshot(t, s); sn.Stamp <= deployedStamp || sn.Stamp > deployedStamp+1e9 || sn.Revision != got.Revision {
					t.Errorf("at %v, stamp %d, want one right after %d", sn.Revision, sn.Stamp, int64(deployedStamp))
				}
			}
			want2 := []secgroup.Kept{
				{CloudController: true, Record: secgroup.Record{GUID: "g7", Name: "public", Rules: policytest.RulesTo("10.0.0.1"), StagingDefault: true, RunningSpaces: []string{"s1", "s2"}}},
				{CloudController: true, Record: secgroup.Record{GUID: "g9", Name: "late", Rules: "[]", RunningDefault: true, StagingSpaces: []string{"s3"}}},
			}
			for _, s := range []*policysql.Store{s, watching} {
				policytest.Eventually(t, "the security groups are there", func() bool { return cmp.Equal(groups(t, s.SecurityGroups()), want2) })
			}
			if again, err := s.Import(t.Context(), from); err != nil || again.Revision != got.Revision || again.Policies != 3 || again.SecurityGroups != 2 {
				t.Errorf("importing the same again: %+v, %v", again, err)
			}
			create(t, s, policytest.Of(t, "new api tcp 1"))
			if tag := tags(t, s)["new"]; tag.Tag != 1 {
				t.Errorf("a new group got %+v, want the lowest tag that was never used", tag)
			}
			if _, err := s.Import(t.Context(), from); err != nil {
				t.Errorf("importing again what is still there: %v", err)
			}
			remove(t, s, want[0].Policy)
			if _, err := s.Import(t.Context(), from); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "imported before") {
				t.Errorf("importing again after a change: %v, want a Conflict fault", err)
			}
			if n := len(rules(t, s)); n != 3 {
				t.Errorf("%d policies are there, want 3", n)
			}
		})
	}
}

func TestImportWantsAnEmptyStore(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s := open(t, config(db))
		if _, err := s.Import(t.Context(), sqldb.Config{}); !errors.Is(err, fault.NotFound) {
			t.Errorf("import without tables: %v, want a NotFound fault", err)
		}
		deployedTables(t, connect(t, db))
		p := policytest.Of(t, "a b tcp 1")
		create(t, s, p)
		if _, err := s.Import(t.Context(), sqldb.Config{}); !errors.Is(err, fault.Conflict) {
			t.Errorf("import beside policies: %v, want a Conflict fault", err)
		}
		remove(t, s, p) // its tags may still be on hosts
		if _, err := s.Import(t.Context(), sqldb.Config{}); !errors.Is(err, fault.Conflict) {
			t.Errorf("import beside tags: %v, want a Conflict fault", err)
		}
	})
}

// TestImportOfMany takes over as much as was ever seen.
func TestImportOfMany(t *testing.T) {
	if testing.Short() {
		t.Skip("62,000 policies")
	}
	db := testkit.Database(t, sqldb.Postgres)
	raw := connect(t, db)
	exec(t, raw, `CREATE TABLE "groups" (id SERIAL PRIMARY KEY, guid text UNIQUE, type text)`)
	exec(t, raw, "CREATE TABLE destinations (id SERIAL PRIMARY KEY, group_id int, port int, protocol text, start_port int, end_port int)")
	exec(t, raw, "CREATE TABLE policies (id SERIAL PRIMARY KEY, group_id int, destination_id int)")
	exec(t, raw, "CREATE TABLE policies_info (id SERIAL PRIMARY KEY, last_updated TIMESTAMP)")
	exec(t, raw, `INSERT INTO "groups" (id, guid, type) SELECT i, CASE WHEN i <= 20000 THEN md5(i::text)::uuid::text END, CASE WHEN i <= 20000 THEN 'app' END FROM generate_series(1, 65535) i`)
	exec(t, raw, "INSERT INTO destinations SELECT i, 1 + i % 20000, 0, 'tcp', i, i FROM generate_series(1, 62000) i")
	exec(t, raw, "INSERT INTO policies SELECT i, 1 + (i * 7) % 20000, i FROM generate_series(1, 62000) i")
	s := open(t, config(db))
	got, err := s.Import(t.Context(), sqldb.Config{})
	if err != nil || got.Policies != 62000 || got.Groups != 20000 || got.Skipped != 0 {
		t.Fatalf("imported %+v, %v", got, err)
	}
	policytest.Eventually(t, "all are there", func() bool { return s.Stats().Policies == 62000 })
	if st := s.Stats(); st.Used != 20000 {
		t.Errorf("stats are %+v", st)
	}
	create(t, s, policytest.Of(t, fmt.Sprintf("new new tcp %d", 1)))
	if tag := tags(t, s)["new"].Tag; tag != 20001 {
		t.Errorf("a new group got tag %v, want %v", tag, identity.Tag(20001))
	}
}
