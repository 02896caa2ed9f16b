package garden

import (
	"encoding/json"
	"strings"
	"testing"
)

// FuzzState: what is taken for a state file can be written and is then read for the same; what is not never makes anybody panic.
func FuzzState(f *testing.F) {
	for _, s := range []string{`{"acquired_ports":{"h":[61000,61001]}}`, `{"acquired_ports":{"h":[610`, ``, `null`, `{}`, `[]`, `{"Acquired_Ports":{"a":null,"b":[]}}`, `{"acquired_ports":{"x":[-1,70000]}}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseState([]byte(text))
		if s.Acquired == nil {
			t.Fatal("no map")
		}
		if err != nil {
			return
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseState(b)
		if err != nil || len(again.Acquired) != len(s.Acquired) {
			t.Fatalf("%s is read as %v, %v", b, again, err)
		}
		c := chooser{pool: &pool{first: 61000, count: 10}, owner: map[int]string{}}
		for h, list := range s.Acquired {
			c.own(h, list)
		}
		ports, err := c.choose("x", []portRequest{0, 7000})
		for _, p := range ports {
			if p < 1 || p > maxPort {
				t.Fatalf("ports %v, %v", ports, err)
			}
		}
	})
}

// FuzzConfig: a configuration that is taken is within its limits.
func FuzzConfig(f *testing.F) {
	f.Add(`{"cni_plugin_dir":"a","cni_config_dir":"b","bind_mount_dir":"c","state_file":"d","start_port":61000,"total_ports":5000,"log_prefix":"e","iptables_lock_file":"f","proxy_port":15001,"proxy_uid":0,"proxy_redirect_cidr":"10.0.0.0/8"}`)
	f.Add(`{"CNI_plugin_dir":null,"proxy_uid":-1}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, text string) {
		c, _, err := parseConfig([]byte(text))
		if err != nil {
			return
		}
		if c.StartPort < 1 || c.StartPort+c.TotalPorts-1 > maxPort || c.ProxyUID == nil || c.timeout() <= 0 || c.Interface == "" || c.redirectCIDR.IsValid() && !c.redirectCIDR.Addr().Is4() {
			t.Fatalf("%+v", c)
		}
	})
}

// FuzzHost: what the kernel says is read, or refused, and never leads to ports that are none.
func FuzzHost(f *testing.F) {
	f.Add("  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A 0\n   1: 00000000:0016 00000000:0000 07 0\n   2: 0100007F:1F91 0100007F:1F90 01\n", "8080,9000-9010")
	f.Add("", "")
	f.Add("x\n 0: :: : ZZ\n", "1-")
	f.Fuzz(func(t *testing.T, sockets, reserved string) {
		ports := map[int]bool{}
		if readListening(strings.NewReader(sockets), ports) == nil {
			for p := range ports {
				if p < 0 || p > maxPort {
					t.Fatal(p)
				}
			}
		}
		if list, err := parsePortList(reserved); err == nil {
			for p := range list {
				if p < 0 || p > maxPort {
					t.Fatal(p)
				}
			}
		}
	})
}
