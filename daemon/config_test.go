package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

// deployed is a file as an existing deployment renders it.
const deployed = `{
  "underlay_ip": "10.0.16.5", "vxlan_interface_name": "", "subnet_prefix_length": 24, "overlay_network": "10.255.0.0/16",
  "health_check_port": 23954, "vtep_name": "silk-vtep", "connectivity_server_url": "https://silk-controller.service.cf.internal:4103",
  "ca_cert_file": "ca.crt", "client_cert_file": "client.crt", "client_key_file": "client.key", "vni": 1, "vtep_port": 4789,
  "poll_interval": 30, "debug_server_port": 22233, "datastore": "/var/vcap/data/silk/store.json", "partition_tolerance_seconds": 604800,
  "client_timeout_seconds": 5, "metron_port": 3457, "log_prefix": "cfnetworking", "log_level": "info", "single_ip_only": false
}`

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadTakesADeployedFile(t *testing.T) {
	c, warnings, err := Load(write(t, deployed))
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 2 {
		t.Errorf("warnings %q, want two", warnings)
	}
	if c.Underlay().String() != "10.0.16.5" || c.Overlay().String() != "10.255.0.0/16" || c.noMasquerade() != c.Overlay() || c.StateDir != "/var/lib/silk" {
		t.Errorf("read %+v", c)
	}
}

func TestLoadSaysWhatIsWrong(t *testing.T) {
	if _, _, err := Load("/no/such/file"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "load config file: reading file /no/such/file") {
		t.Errorf("missing file: %v", err)
	}
	if _, _, err := Load(write(t, "{")); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "load config file: unmarshaling contents") {
		t.Errorf("half a file: %v", err)
	}
	for key, c := range map[string]struct{ from, to string }{
		"underlay_ip":                 {`"10.0.16.5"`, `"10.0.16"`},
		"overlay_network":             {`"10.255.0.0/16"`, `"10.255.0.0"`},
		"subnet_prefix_length":        {`"subnet_prefix_length": 24`, `"subnet_prefix_length": 16`},
		"vtep_name":                   {`"silk-vtep"`, `"a-name-that-is-too-long"`},
		"connectivity_server_url":     {`"https:`, `"http:`},
		"vni":                         {`"vni": 1`, `"vni": 16777216`},
		"poll_interval":               {`"poll_interval": 30`, `"poll_interval": 0`},
		"partition_tolerance_seconds": {`604800`, `-1`},
		"log_level":                   {`"info"`, `"loud"`},
		"health_check_port":           {`23954`, `65536`},
		"debug_server_port":           {`22233`, `"22233"`},
		"datastor":                    {`"datastore"`, `"datastor"`},
		"ca_cert_file":                {`"ca.crt"`, `""`},
	} {
		text := strings.Replace(deployed, c.from, c.to, 1)
		if text == deployed {
			t.Fatalf("%s: the case changes nothing", key)
		}
		_, _, err := Load(write(t, text))
		if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "invalid config") || !strings.Contains(err.Error(), key+":") {
			t.Errorf("%s: %v, want an Invalid fault that names it", key, err)
		}
	}
}
