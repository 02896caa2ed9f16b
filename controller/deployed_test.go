package controller_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease"
)

// rendered is a configuration as the release of the deployed controller renders it, for a server that is reached by TCP and TLS. The
// ports, the three files, the engine, its port, require_ssl and ca_cert are left open.
const rendered = `{"debug_server_port":%d,"health_check_port":%d,"listen_host":"127.0.0.1","listen_port":%d,
"ca_cert_file":%q,"server_cert_file":%q,"server_key_file":%q,"network":"10.255.0.0/16",
"subnet_prefix_length":24,"database":{"type":%q,"user":"network_connectivity","password":"it's \"secret\"","host":"127.0.0.1","port":%d,
"timeout":120,"database_name":"network_connectivity","require_ssl":%v,"ca_cert":%q,
"skip_hostname_validation":false},"lease_expiration_seconds":604800,"metron_port":3457,"metrics_emit_seconds":30,
"staleness_threshold_seconds":3600,"log_prefix":"cfnetworking","max_open_connections":200,"max_idle_connections":10,
"connections_max_lifetime_seconds":3600}`

// TestADeployedFileStartsOverTLS starts the program with such a file against servers that refuse who comes without TLS or password.
func TestADeployedFileStartsOverTLS(t *testing.T) {
	bin, c := testkit.Program(t, "silk-controller"), issue(t)
	stranger, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for engine, begin := range map[string]func(*testing.T, testkit.Options) *testkit.Server{sqldb.Postgres: strictPostgres, sqldb.MySQL: strictMariaDB} {
		t.Run(engine, func(t *testing.T) {
			cert, key, err := c.ca.Issue("database-"+engine, netip.MustParseAddr("127.0.0.1"))
			if err != nil {
				t.Fatal(err)
			}
			port := freePort(t)
			s := begin(t, testkit.Options{Cert: cert, Key: key, Port: port})
			file := func(ssl bool, ca string) []byte {
				f := c.controller
				return fmt.Appendf(nil, rendered, freePort(t), freePort(t), freePort(t), f.CA, f.Cert, f.Key, engine, port, ssl, ca)
			}
			refused(t, bin, "an authority that did not sign", file(true, stranger.CertFile()))
			refused(t, bin, "no TLS", file(false, c.ca.CertFile()))
			p := launchFile(t, bin, file(true, c.ca.CertFile()))
			l := acquire(t, dial(t, c, p.API), 1, lease.Block)
			db, err := sqldb.Open(t.Context(), s.Config("network_connectivity"))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			var subnet string
			if err := db.QueryRow(t.Context(), "SELECT overlay_subnet FROM subnets").Scan(&subnet); err != nil || subnet != l.Subnet.String() {
				t.Errorf("the server has %q, %v, want %v", subnet, err, l.Subnet)
			}
		})
	}
}

// refused starts the program and expects it to give up at once, since the server will not think better of it.
func refused(t *testing.T, bin, what string, text []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "controller.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, "-config", path)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "database") || strings.Contains(string(out), "secret") {
		t.Errorf("%s: %v, want exit 1 and a word about the database, without the password:\n%s", what, err, out)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	p, err := testkit.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// strictPostgres starts a server whose file of rules lets in by TCP only who comes with TLS and a password.
func strictPostgres(t *testing.T, o testkit.Options) *testkit.Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "silk-hba-") // that the server's own user may read
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	hba := filepath.Join(dir, "pg_hba.conf")
	rules := "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
	for _, err := range []error{os.Chmod(dir, 0o755), os.WriteFile(hba, []byte(rules), 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	o.Args = []string{"-c", "hba_file=" + hba}
	return strict(t, sqldb.Postgres, testkit.StartPostgres, o,
		`CREATE ROLE network_connectivity LOGIN PASSWORD 'it''s "secret"'`, "CREATE DATABASE network_connectivity OWNER network_connectivity")
}

// strictMariaDB starts a server with a user who has to come with TLS and a password.
func strictMariaDB(t *testing.T, o testkit.Options) *testkit.Server {
	t.Helper()
	return strict(t, sqldb.MySQL, testkit.StartMariaDB, o, "CREATE DATABASE network_connectivity",
		`CREATE USER network_connectivity@'127.0.0.1' IDENTIFIED BY 'it''s "secret"' REQUIRE SSL`,
		"GRANT ALL ON network_connectivity.* TO network_connectivity@'127.0.0.1'")
}

func strict(t *testing.T, engine string, begin func(context.Context, testkit.Options) (*testkit.Server, error), o testkit.Options, statements ...string) *testkit.Server {
	t.Helper()
	s, err := begin(t.Context(), o)
	testkit.Require(t, engine, err)
	t.Cleanup(s.Stop)
	for _, q := range statements {
		if err := s.Admin(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	return s
}
