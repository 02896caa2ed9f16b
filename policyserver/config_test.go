package policyserver_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policyserver"
)

// external and internal are what the deployed servers' job templates render.
const external = `{"listen_host":"0.0.0.0","listen_port":4002,"log_prefix":"cfnetworking","debug_server_host":"127.0.0.1","debug_server_port":31821,
"uaa_ca":"DIR/ca","uaa_client":"network-policy","uaa_client_secret":"s","uaa_url":"https://uaa.service.cf.internal","uaa_port":8443,"cc_url":"https://cc:9024","cc_ca_cert":"DIR/ca",
"skip_ssl_validation":false,"database":{"type":"postgres","user":"u","password":"p","host":"h","port":5432,"database_name":"d","timeout":120,"require_ssl":false,"ca_cert":"","skip_hostname_validation":false},
"database_migration_timeout":600,"max_idle_connections":10,"max_open_connections":200,"connections_max_lifetime_seconds":3600,"tag_length":2,"metron_address":"127.0.0.1:3457",
"log_level":"info","cleanup_interval":3600,"max_policies":150,"enable_space_developer_self_service":true,"enable_tls":true,"ca_cert_file":"DIR/ca","server_cert_file":"DIR/c","server_key_file":"DIR/k",
"request_timeout":5,"allowed_cors_domains":[]}`

const internal = `{"log_prefix":"cfnetworking","listen_host":"0.0.0.0","internal_listen_port":4003,"debug_server_host":"127.0.0.1","debug_server_port":31945,"health_check_port":31946,
"ca_cert_file":"DIR/ca","server_cert_file":"DIR/c","server_key_file":"DIR/k","database":{"type":"mysql","user":"u","password":"p","host":"h","port":3306,"database_name":"d","timeout":120},
"tag_length":2,"metron_address":"127.0.0.1:3457","log_level":"info","max_idle_connections":10,"max_open_connections":200,"connections_max_lifetime_seconds":3600,"request_timeout":5}`

func TestDeployedConfigurationsStart(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	e, err := policyserver.Load(w.file(t, "e.json", external))
	if err != nil {
		t.Fatal(err)
	}
	if *e.ListenPort != 4002 || e.InternalListenPort != nil || e.HealthCheckPort != nil || len(e.Auth) != 1 || e.Auth[0] != "uaa" || !e.SelfService || e.MaxPolicies != 150 {
		t.Errorf("external: %+v", e)
	}
	if len(e.Warnings) != 4 { // log_prefix, metron_address, database_migration_timeout, ca_cert_file
		t.Errorf("external: warnings %q, want four", e.Warnings)
	}
	i, err := policyserver.Load(w.file(t, "i.json", internal))
	if err != nil {
		t.Fatal(err)
	}
	if i.ListenPort != nil || *i.InternalListenPort != 4003 || *i.HealthCheckPort != 31946 || i.Auth != nil || len(i.Warnings) != 2 {
		t.Errorf("internal: %+v", i)
	}
}

func TestAllProblemsAreToldAtOnce(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"empty":    {`{}`, []string{"listen_port: missing"}},
		"external": {`{"listen_port":4002}`, []string{"auth: missing"}},
		"many": {`{"listen_port":-1,"internal_listen_port":70000,"log_level":"loud","tag_length":4,"max_policies":0,"cleanup_interval":0,"cleanup_max_share":2,"auth":["uaa","nothing","uaa"],
"max_tag":70000,"tag_quarantine_seconds":-1,"database":{"type":"oracle"},"debug_server_host":"","tag_lenght":2,"internal_clients":[]}`, []string{
			"listen_port: -1", "internal_listen_port: 70000", `log_level: "loud"`, "tag_length: 4", "max_policies: 0", "cleanup_interval: 0", "cleanup_max_share: 2", "uaa_client: missing",
			"uaa_client_secret: missing", "uaa_url: missing", "uaa_port: 0", "cc_url: missing", `auth: "nothing"`, `auth: "uaa" is there twice`, "max_tag: 70000", "tag_quarantine_seconds: -1",
			"database.type", "debug_server_host: missing", `tag_lenght: unknown key: did you mean "tag_length"?`, "ca_cert_file: missing", "server_cert_file: missing", "server_key_file: missing",
			"internal_clients: is empty",
		}},
		"methods": {`{"listen_port":1,"auth":["mtls","oidc","tokens"]}`, []string{"mtls: missing", "oidc: missing", "token_file: missing"}},
		"details": {`{"listen_port":1,"mtls":{"admins":["a"]},"oidc":{"issuer":"x","scopes":{"a":"root"}},"cc_url":"http://cc"}`, []string{
			"mtls.ca_file: missing", "enable_tls: is not set", "oidc.issuer", "oidc.audience: missing", "oidc.scopes", "cc_url: is set",
		}},
		"kinds": {`{"listen_port":"x"}`, []string{"listen_port: is a JSON string"}},
	} {
		_, err := policyserver.Load(w.file(t, "c.json", c.text))
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want an invalid configuration", name, err)
			continue
		}
		for _, text := range c.want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v\nlacks %s", name, err, text)
			}
		}
	}
	if _, err := policyserver.Load(""); err == nil {
		t.Error("no file was loaded")
	}
}

// TestEveryKeyIsDocumented: docs/operate/policy-server.md names all keys.
func TestEveryKeyIsDocumented(t *testing.T) {
	doc := readFile(t, "../docs/operate/policy-server.md")
	b, err := json.Marshal(policyserver.Defaults())
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]any
	if err := json.Unmarshal(b, &keys); err != nil {
		t.Fatal(err)
	}
	for k := range keys {
		if !strings.Contains(doc, "`"+k+"`") && !strings.Contains(doc, "`"+k+".") {
			t.Errorf("key %s is not documented", k)
		}
	}
}
