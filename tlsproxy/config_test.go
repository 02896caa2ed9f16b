package tlsproxy

import (
	"os"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/config"
)

func TestConfigProblemsAreAllSaid(t *testing.T) {
	for text, want := range map[string][]string{
		`{}`:                           {`certificates: "": expected authority or directory`},
		`{"certificates":"directory"}`: {"certificate_directory: "},
		`{"certificates":"directory","certificate_directory":"/a/{contaner}","certificate_file":"../x","key_file":"","trust_domain":"a/b","policy_agent":"x","debug_server_port":0,"log_level":"loud",
			"max_connections":1,"max_connections_per_container":0,"max_handshakes_per_container":0,"max_unfinished_handshakes_per_container":1,"handshake_timeout_seconds":0,
			"connect_timeout_milliseconds":0,"keepalive_seconds":0,"drain_milliseconds":-1,"endpoint_dir":"","debug_server_host":""}`: {
			"certificate_directory:", "certificate_file:", "key_file:", "trust_domain:", "policy_agent:", "debug_server_port:", "log_level:", "max_connections:", "max_connections_per_container:",
			"max_handshakes_per_container:", "max_unfinished_handshakes_per_container:", "handshake_timeout_seconds:", "connect_timeout_milliseconds:", "keepalive_seconds:", "drain_milliseconds:",
			"endpoint_dir:", "debug_server_host:",
		},
		`{"certificates":"authority","names_url":"x","state_dir":"","client_ca_file":"/x"}`: {
			"connectivity_server_url:", "ca_cert_file:", "client_cert_file:", "client_key_file:", "underlay_ip:", "names_url:", "state_dir:", "client_ca_file:",
		},
		`{"certificates":"authority","names_url":"http://10.0.0.2:8056"}`:                             {"names_url: \"http://10.0.0.2:8056\": expected http://127.0.0.1"},
		`{"certificates":"authority","names_url":"http://127.0.0.1:8056/v1/names"}`:                   {"names_url:"},
		`{"certificates":"authority","names_url":"http://127.0.0.1"}`:                                 {"names_url:"},
		`{"certificates":"authority","names_url":"http://127.0.0.1:0"}`:                               {"names_url:"},
		`{"certificates":"authority","names_url":"https://127.0.0.1:8056"}`:                           {"names_url:"},
		`{"certificates":"authority","names_url":"http://x@127.0.0.1:8056"}`:                          {"names_url:"},
		`{"certificates":"directory","certificate_directory":"/a/{container}","certificat_file":"x"}`: {`did you mean "certificate_file"?`},
	} {
		c := DefaultConfig()
		_, err := config.Parse([]byte(text), &c)
		if err == nil {
			t.Errorf("%s is good", text)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s\ndoes not say %q:\n%v", text, w, err)
			}
		}
	}
	c := DefaultConfig()
	if _, err := config.Parse([]byte(`{"certificates":"directory","certificate_directory":"/var/vcap/data/instance_identity/{container}"}`), &c); err != nil {
		t.Error(err)
	}
}

// TestTheUnitBringsTheProgramBack within a second, with what connections need.
func TestTheUnitBringsTheProgramBack(t *testing.T) {
	b, err := os.ReadFile("../packaging/systemd/silk-tls.service")
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[k] = v
		}
	}
	pause, err := time.ParseDuration(values["RestartSec"])
	if c := DefaultConfig(); err != nil || values["Restart"] != "always" || values["StartLimitIntervalSec"] != "0" || pause+c.drain() > 700*time.Millisecond {
		t.Errorf("restart %s after %s and a drain of %v: %v", values["Restart"], values["RestartSec"], c.drain(), err)
	}
	if c := DefaultConfig(); values["LimitNOFILE"] != "262144" || 2*c.Connections+spareFiles+filesContainer*manyContainers > 262144 {
		t.Errorf("LimitNOFILE %s is not enough for %d connections", values["LimitNOFILE"], c.Connections)
	}
}
