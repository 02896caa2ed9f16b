package policyagent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

// deployed is what the release that is deployed renders.
const deployed = `{
	"poll_interval": 5, "enable_asg_syncing": true, "asg_poll_interval": 60, "cni_datastore_path": "/var/vcap/data/container-metadata/store.json",
	"policy_server_url": "https://policy-server.service.cf.internal:4003", "vni": 1, "metron_address": "127.0.0.1:3457",
	"ca_cert_file": "/ca", "client_cert_file": "/cert", "client_key_file": "/key", "client_timeout_seconds": 5, "iptables_lock_file": "/lock",
	"debug_server_host": "127.0.0.1", "debug_server_port": 8721, "log_level": "info", "log_prefix": "cfnetworking",
	"iptables_c2c_logging": false, "iptables_asg_logging": false, "iptables_accepted_udp_logs_per_sec": 100, "iptables_denied_logs_per_sec": 1,
	"force_policy_poll_cycle_host": "127.0.0.1", "force_policy_poll_cycle_port": 8722, "enable_overlay_ingress_rules": true,
	"disable_container_network_policy": false, "overlay_network": "10.255.0.0/16", "underlay_ips": ["10.0.16.5", "10.0.17.5"],
	"deny_networks": {"always": [], "running": [], "staging": []}, "outbound_connections": {"limit": false, "logging": false, "burst": 1000, "rate_per_sec": 100},
	"loggregator": {"loggregator_use_v2_api": true, "loggregator_api_port": 3458}
}`

func load(t *testing.T, text string) (Config, []string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

func TestDeployedConfigurationIsTaken(t *testing.T) {
	c, warnings, err := load(t, deployed)
	if err != nil {
		t.Fatal(err)
	}
	if c.name() != "10.0.16.5" || !c.Ingress || !c.ASGSyncing || c.ForcePort != 8722 || c.DeniedLogs != 1 || c.UDPLogs != 100 || c.Datastore == "" {
		t.Errorf("%+v", c)
	}
	if len(warnings) != 5 {
		t.Errorf("warnings %q, want one for each of the five keys that mean nothing here", warnings)
	}
}

func TestConfigurationProblemsAreAllReported(t *testing.T) {
	_, _, err := load(t, `{
		"policy_server_url": "http://x,", "poll_interval": 0, "overlay_network": "x", "underlay_ips": ["y"], "host_tcp_services": ["10.0.0.1", "10.0.0.1:80"],
		"host_udp_services": ["[::1]:53"], "dns_servers": ["z"], "max_tag": 70000, "conntrack_mark_mask": 255, "log_level": "loud", "asg_poll_interval": 0,
		"deny_networks": {"always": ["10.0.0.0/8", "10.0.0.1"], "staging": ["fd00::/8"]}, "outbound_connections": {"burst": 0, "rate_per_sec": -1}, "vtep_name": "a/b", "pol_interval": 1
	}`)
	if !errors.Is(err, fault.Invalid) {
		t.Fatalf("%v, want it invalid", err)
	}
	for _, want := range []string{
		"policy_server_url: missing", "ca_cert_file", "client_cert_file", "client_key_file", "poll_interval: 0", "overlay_network", "underlay_ips[0]", "host_tcp_services[0]",
		"host_udp_services[0]", "dns_servers[0]", "max_tag: 70000", "conntrack_mark_mask", "log_level", "vtep_name", "asg_poll_interval: 0", "deny_networks.always[1]", "deny_networks.staging[0]", "outbound_connections.burst: 0",
		"outbound_connections.rate_per_sec: -1", `did you mean "poll_interval"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\ndoes not name %s", err, want)
		}
	}
	if strings.Contains(err.Error(), "host_tcp_services[1]") {
		t.Errorf("%v\nnames a service that is good", err)
	}
}

func TestSeveralServersAreSeparatedByCommas(t *testing.T) {
	c := Config{PolicyServerURL: "https://a:4003/, https://b:4003"}
	if got := c.servers(); !slices.Equal(got, []string{"https://a:4003", "https://b:4003"}) {
		t.Errorf("%q", got)
	}
}

func TestDefaultsAreEnough(t *testing.T) {
	c, warnings, err := load(t, `{"policy_server_url": "https://a:4003", "ca_cert_file": "a", "client_cert_file": "b", "client_key_file": "c", "host": "h"}`)
	if err != nil || len(warnings) > 0 || c.forceAddress() != "127.0.0.1:8722" || c.debugAddress() != "127.0.0.1:8721" {
		t.Errorf("%+v, %q, %v", c, warnings, err)
	}
}
