package controller

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "controller.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

// deployed is what the release of the deployed controller renders.
const deployed = `{"debug_server_port":46455,"health_check_port":19683,"listen_host":"0.0.0.0","listen_port":4103,
"ca_cert_file":"ca.crt","server_cert_file":"server.crt","server_key_file":"server.key","network":"10.255.0.0/16",
"subnet_prefix_length":24,"database":{"type":"postgres","user":"silk","password":"secret","host":"sql.example","port":5432,
"timeout":120,"database_name":"silk","require_ssl":false,"ca_cert":"/var/vcap/jobs/silk-controller/config/certs/database_ca.crt",
"skip_hostname_validation":false},"lease_expiration_seconds":604800,"metron_port":3457,"metrics_emit_seconds":30,
"staleness_threshold_seconds":3600,"log_prefix":"cfnetworking","max_open_connections":200,"max_idle_connections":10,
"connections_max_lifetime_seconds":3600}`

func TestADeployedFileLoads(t *testing.T) {
	c, err := load(t, deployed)
	if err != nil {
		t.Fatal(err)
	}
	want := sqldb.Config{Type: "postgres", User: "silk", Password: "secret", Host: "sql.example", Port: 5432, Name: "silk", Timeout: 120,
		CACert: "/var/vcap/jobs/silk-controller/config/certs/database_ca.crt"}
	if *c.Database != want || c.LeaseExpiration != 604800 || c.ReuseDelay != 3600 {
		t.Errorf("read %+v with database %+v", c, c.Database)
	}
	if got := strings.Join(c.Warnings, "\n"); len(c.Warnings) != 2 || !strings.Contains(got, "metron_port") || !strings.Contains(got, "log_prefix") {
		t.Errorf("warnings %q, want one each for metron_port and log_prefix", c.Warnings)
	}
}

// TestANetworkMayBeNamedByAnyOfItsAddresses: the deployed controller reads it so.
func TestANetworkMayBeNamedByAnyOfItsAddresses(t *testing.T) {
	c, err := load(t, strings.Replace(deployed, "10.255.0.0/16", "10.255.3.7/16", 1))
	if err != nil || c.Network.String() != "10.255.0.0/16" {
		t.Errorf("network %v, %v, want 10.255.0.0/16", c.Network, err)
	}
}

func TestTheSmallestFileMeansSQLite(t *testing.T) {
	c, err := load(t, `{"ca_cert_file":"a","server_cert_file":"b","server_key_file":"c"}`)
	if err != nil {
		t.Fatal(err)
	}
	if c.Database.Type != "sqlite" || c.Database.Path != DefaultPath || c.ListenPort != 4103 {
		t.Errorf("read %+v with database %+v", c, c.Database)
	}
}

func TestEveryProblemIsNamed(t *testing.T) {
	_, err := load(t, `{"listen_host":"","listen_port":70000,"netwrok":"x","subnet_prefix_length":31,"metrics_emit_seconds":0,"log_level":"loud",
		"database":{"type":"postgres","require_ssl":true,"timeout":-1,"tipe":1}}`)
	if !errors.Is(err, fault.Invalid) {
		t.Fatalf("%v, want an Invalid fault", err)
	}
	lines := strings.Split(err.Error(), "\n")
	for _, want := range []string{
		"listen_host: ", "listen_port: 70000", `netwrok: unknown key: did you mean "network"?`, "network: subnet prefix length 31",
		"metrics_emit_seconds: 0", `log_level: "loud"`, "ca_cert_file: missing", "server_cert_file: missing", "server_key_file: missing",
		"database.user: missing", "database.host: missing", "database.port: missing", "database.ca_cert: missing", "database.timeout: -1", "database.tipe: unknown",
	} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, want) }) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	_, err = load(t, `{"ca_cert_file":"a","server_cert_file":"b","server_key_file":"c","container_ca_cert_file":"x","container_ca_domains":["*.internal","a b"],
		"container_ca_trust_domain":"10.0.0.1","container_ca_intermediate_seconds":604801}`)
	for _, want := range []string{
		"container_ca_key_file: missing", "container_ca_domains[0]: ", "container_ca_domains[1]: ", "container_ca_trust_domain: ", "container_ca_intermediate_seconds: 604801: expected 3600 to 604800",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	for _, text := range []string{`{"network":"10.255.0.0"}`, `[]`, ``, `{"listen_port":"4103"}`} {
		if _, err := load(t, text); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want an Invalid fault", text, err)
		}
	}
	if _, err := Load(""); err == nil || !strings.Contains(err.Error(), "-config") {
		t.Errorf("no file: %v, want to be told of -config", err)
	}
}
