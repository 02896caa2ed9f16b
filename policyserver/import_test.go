package policyserver_test

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// TestImportKeepsPoliciesAndTags takes over what a deployed server has, by the program.
func TestImportKeepsPoliciesAndTags(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	theirs := testkit.Database(t, sqldb.Postgres)
	db, err := sqldb.Open(t.Context(), theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, text := range []string{
		`CREATE TABLE groups (id serial PRIMARY KEY, guid text UNIQUE, type text DEFAULT 'app')`,
		`CREATE TABLE destinations (id serial PRIMARY KEY, group_id int REFERENCES groups(id), port int, protocol text, start_port int, end_port int)`,
		`CREATE TABLE policies (id serial PRIMARY KEY, group_id int REFERENCES groups(id), destination_id int REFERENCES destinations(id))`,
		`CREATE TABLE policies_info (id int PRIMARY KEY, last_updated timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP)`,
		`INSERT INTO policies_info (id) VALUES (1)`,
		`INSERT INTO groups (id, guid, type) VALUES (1, NULL, NULL), (7, 'web', 'app'), (9, 'api', 'app'), (12, 'INGRESS_ROUTER', 'router')`,
		`INSERT INTO destinations (id, group_id, port, protocol, start_port, end_port) VALUES (1, 9, 8080, 'tcp', 8080, 8080), (2, 7, 0, 'udp', 5, 6)`,
		`INSERT INTO policies (id, group_id, destination_id) VALUES (1, 7, 1), (2, 9, 2)`,
	} {
		if _, err := db.Exec(t.Context(), text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	bin := testkit.Program(t, "policy-server")
	config := func(name string, keys map[string]any) string {
		b, err := json.Marshal(keys)
		if err != nil {
			t.Fatal(err)
		}
		return w.file(t, name, string(b))
	}
	ours := w.both(t, nil)
	from := w.both(t, map[string]any{"database": theirs})
	out, err := exec.Command(bin, "import", "-config-file", config("ours.json", ours), "-from", config("theirs.json", from)).CombinedOutput()
	if err != nil || !strings.Contains(string(out), `"policies":2`) {
		t.Fatalf("import: %v\n%s", err, out)
	}
	r := start(t, w.load(t, ours), quiet(t))
	c := person(t, "https://"+r.External, w.client(t, "x"), "admin")
	if ps, err := c.List(t.Context(), policy.Filter{}); err != nil || len(ps) != 2 || ps[0] != of(t, "web api tcp 8080") || ps[1] != of(t, "api web udp 5-6") {
		t.Errorf("policies %v, %v", ps, err)
	}
	tags, err := c.Tags(t.Context())
	want := []identity.Tagged{{Group: "web", Tag: 7, Kind: identity.App}, {Group: "api", Tag: 9, Kind: identity.App}, {Group: identity.IngressRouter, Tag: 12, Kind: identity.Router}}
	if err != nil || len(tags) != len(want) {
		t.Fatalf("tags %v, %v, want %v", tags, err, want)
	}
	for i, tag := range tags {
		if tag != want[i] {
			t.Errorf("tag %+v, want %+v", tag, want[i])
		}
	}
}
