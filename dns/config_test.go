package dns_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	program "code.cloudfoundry.org/silk/dns"
	"code.cloudfoundry.org/silk/fault"
)

// deployed returns a file as the deployed release renders it.
func deployed(t testing.TB, name string) object {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var o object
	if err := json.Unmarshal(b, &o); err != nil {
		t.Fatal(err)
	}
	return o
}

// with returns a copy of o with other values; nil leaves a key out.
func (o object) with(more object) object {
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	for k, v := range more {
		if out[k] = v; v == nil {
			delete(out, k)
		}
	}
	return out
}

func parse(t testing.TB, o object) (program.Config, error) {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return program.ParseConfig(b)
}

func TestDeployedFilesAreRead(t *testing.T) {
	c, err := parse(t, deployed(t, "service-discovery-controller"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Form != program.Controller || c.Port != "8054" || c.LogLevelPort != 8055 || c.ReadHeaderTimeout.Duration != 30*time.Second || c.Staleness != 180 ||
		c.NATS.Hosts[1].Port != 4222 || c.NATS.User != "nats" || len(c.ListenDNS) != 0 || c.DebugPort != nil || c.Index != "0" {
		t.Errorf("controller: %+v", c)
	}
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "address_ranges") {
		t.Errorf("warnings %q, want one about ranges", c.Warnings)
	}
	c, err = parse(t, deployed(t, "bosh-dns-adapter"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Form != program.Adapter || c.Port != "8053" || c.ControllerPort != "8054" || c.LogLevelPort != 8066 || len(c.Warnings) != 0 || c.DebugPort != nil {
		t.Errorf("adapter: %+v", c)
	}
}

func TestUnknownKeys(t *testing.T) {
	for _, name := range []string{"service-discovery-controller", "bosh-dns-adapter"} {
		c, err := parse(t, deployed(t, name).with(object{"new_in_a_later_release": 1, "nats": object{"cluster": "x"}, "DEBUG_server_port": 0}))
		if name == "bosh-dns-adapter" {
			c, err = parse(t, deployed(t, name).with(object{"new_in_a_later_release": 1, "nats.cluster": "x"}))
		}
		all := strings.Join(c.Warnings, "\n")
		if err != nil || !strings.Contains(all, "new_in_a_later_release") || !strings.Contains(all, "nats.cluster") {
			t.Errorf("%s: %v, warnings %q, want two about keys", name, err, c.Warnings)
		}
	}
	_, err := parse(t, object{"domains": []string{"apps.internal"}, "listen_dnss": []string{}})
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), `did you mean "listen_dns"?`) {
		t.Errorf("%v, want advice", err)
	}
}

func TestOwnForm(t *testing.T) {
	c, err := program.ParseConfig([]byte(`{"domains":["Apps.Internal."]}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Form != program.Own || !slices.Equal(c.ListenDNS, []string{"169.254.0.2:53"}) || !slices.Equal(c.AddressRanges, []string{"10.255.0.0/16"}) || *c.DebugPort != 8056 || c.AdvertiseInterval != 20 {
		t.Errorf("%+v", c)
	}
	if c, err = parse(t, deployed(t, "bosh-dns-adapter").with(object{"domains": []string{"a"}})); err != nil || c.Form != program.Own || len(c.Warnings) != 1 {
		t.Errorf("an adapter's file with domains: %v, %+v", err, c)
	}
	if c, err = parse(t, deployed(t, "service-discovery-controller").with(object{"domains": []string{"a"}, "address_ranges": []string{"10.0.0.0/8"}})); err != nil || c.Form != program.Own ||
		!slices.Equal(c.AddressRanges, []string{"10.0.0.0/8"}) || len(c.Warnings) != 0 {
		t.Errorf("a controller's file with domains: %v, %+v", err, c)
	}
	if again, err := program.ParseConfig([]byte(`{"domains":["a"]}`)); err != nil || again.AddressRanges[0] != "10.255.0.0/16" {
		t.Errorf("defaults changed with the file before: %+v, %v", again.AddressRanges, err)
	}
}

// TestProblems names every rule that a file can break, by the path of the key.
func TestProblems(t *testing.T) {
	own := object{"domains": []string{"apps.internal"}}
	sdc, adapter := deployed(t, "service-discovery-controller"), deployed(t, "bosh-dns-adapter")
	for _, c := range []struct {
		base, change object
		want         string
	}{
		{object{}, nil, "domains: missing"},
		{object{}, object{"nats": object{}}, "domains: missing"},
		{sdc, object{"port": 8054}, "port"},
		{sdc, object{"port": ""}, "port"},
		{sdc, object{"port": "65536"}, "port"},
		{sdc, object{"address": nil}, "address: missing"},
		{sdc, object{"server_cert": nil}, "server_cert: missing"},
		{sdc, object{"server_key": nil}, "server_key: missing"},
		{sdc, object{"ca_cert": nil}, "ca_cert: missing"},
		{sdc, object{"metron_port": 0}, "metron_port: 0"},
		{sdc, object{"staleness_threshold_seconds": 0}, "staleness_threshold_seconds: 0"},
		{sdc, object{"pruning_interval_seconds": 0}, "pruning_interval_seconds: 0"},
		{sdc, object{"resume_pruning_delay_seconds": -1}, "resume_pruning_delay_seconds: -1"},
		{sdc, object{"warm_duration_seconds": -1}, "warm_duration_seconds: -1"},
		{sdc, object{"metrics_emit_seconds": 0}, "metrics_emit_seconds: 0"},
		{sdc, object{"read_header_timeout": 30}, "30s"},
		{sdc, object{"read_header_timeout": "soon"}, "soon"},
		{sdc, object{"nats": object{"hosts": []object{{"hostname": "a", "port": 70000}}}}, "port"},
		{sdc, object{"nats": object{"hosts": []object{{"hostname": "a"}}}}, "nats.hosts[0].port: missing"},
		{sdc, object{"nats": object{"hosts": []object{{"hostname": "a,b", "port": 1}}}}, "nats.hosts[0].hostname"},
		{sdc, object{"nats": object{"tls_enabled": true, "ca_certs": "/nonexistent"}}, "error reading NATS CA certs"},
		{sdc, object{"nats": object{"tls_enabled": true, "ca_certs": "config_test.go"}}, "unable to build NATS CA pool"},
		{adapter, object{"port": nil}, "port: missing"},
		{adapter, object{"service_discovery_controller_address": ","}, "service_discovery_controller_address: missing"},
		{adapter, object{"service_discovery_controller_port": ""}, "service_discovery_controller_port: missing"},
		{adapter, object{"client_cert": nil}, "client_cert: missing"},
		{adapter, object{"client_key": nil}, "client_key: missing"},
		{adapter, object{"ca_cert": nil}, "ca_cert: missing"},
		{adapter, object{"log_level_address": nil}, "log_level_address: missing"},
		{adapter, object{"log_level_port": 0}, "log_level_port: missing"},
		{adapter, object{"internal_route_vip_range": "127.128.0.0"}, "internal_route_vip_range"},
		{adapter, object{"server_cert": "x"}, "adapter_address and adapter_port instead"},
		{adapter, object{"listen_dns": []string{"127.0.0.1:53"}}, "domains: missing"},
		{own, object{"domains": []string{}}, "domains: missing"},
		{own, object{"domains": []string{"a..b"}}, "domains[0]"},
		{own, object{"domains": []string{"*.a"}}, "domains[0]"},
		{own, object{"domains": []string{strings.Repeat("a.", 121) + "a"}}, "domains[0]"},
		{own, object{"listen_dns": []string{"127.0.0.1:53", "[::1]:53", "[::ffff:127.0.0.1]:53"}}, "listen_dns[2]"},
		{own, object{"forward": []string{"10.0.0.2:53", "169.254.0.2:53"}}, "forward[1]"},
		{own, object{"listen_dns": []string{"0.0.0.0:53"}, "forward": []string{"127.0.0.1:53"}}, "forward[0]"},
		{own, object{"forward": []string{"224.0.0.1:53"}}, "forward[0]"},
		{own, object{"nats": object{"hosts": []object{{"hostname": "10.0.16.5:4222", "port": 4222}}}}, "nats.hosts[0].hostname"},
		{own, object{"listen_dns": []string{"169.254.0.2"}}, "listen_dns[0]"},
		{own, object{"listen_dns": []string{}}, "listen_dns: missing"},
		{own, object{"forward": []string{"10.0.0.2"}}, "forward[0]"},
		{own, object{"forward": []string{"0.0.0.0:53"}}, "forward[0]"},
		{own, object{"ttl_seconds": -1}, "ttl_seconds"},
		{own, object{"address_ranges": []string{}}, "address_ranges: missing"},
		{own, object{"address_ranges": []string{"10.255.0.0"}}, "address_ranges[0]"},
		{own, object{"endpoint_dir": "/x", "advertise_interval_seconds": 180}, "advertise_interval_seconds"},
		{own, object{"debug_server_port": 65536}, "debug_server_port"},
		{own, object{"adapter_port": "1"}, "adapter_address: missing"},
		{own, object{"address": "127.0.0.1"}, "server_cert: missing"},
		{own, object{"nats": object{"pass": "x"}}, "nats.user"},
		{own, object{"log_level": "loud"}, "log_level"},
	} {
		o := c.base.with(c.change)
		if _, err := parse(t, o); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want an Invalid fault with %q", c.change, err, c.want)
		}
	}
	_, err := parse(t, own.with(object{"ttl_seconds": -1, "forward": []string{"x"}, "log_level": "y", "z": 1}))
	for _, want := range []string{"ttl_seconds", "forward[0]", "log_level", "z: unknown key"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s: all problems are expected at once", err, want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, name := range []string{"service-discovery-controller", "bosh-dns-adapter"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, s := range []string{`{}`, `null`, `[]`, `{"domains":null}`, `{"domains":["a"],"read_header_timeout":null,"listen_dns":["[::1]:53"],"nats":null}`, `{"DOMAINS":["a"],"Domains":7}`,
		`{"domains":["a"],"service_discovery_controller_address":"a,,b","address":"x","port":"1"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := program.ParseConfig(b)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Errorf("%v is no Invalid fault", err)
			}
			return
		}
		for _, a := range append(slices.Clone(c.ListenDNS), c.Forward...) {
			if !strings.Contains(a, ":") {
				t.Errorf("address %q was accepted", a)
			}
		}
		if c.Staleness < 1 || c.Pruning < 1 || c.Form == program.Own && len(c.Domains) == 0 || c.Form == program.Adapter && len(c.NATS.Hosts) > 0 {
			t.Errorf("accepted: %+v", c)
		}
	})
}
