package cni

import (
	"encoding/json"
	"reflect"
	"testing"

	"code.cloudfoundry.org/silk/lease/mac"
)

// What is read without encoding/json must be what encoding/json would have read.
func FuzzPlain(f *testing.F) {
	f.Add(`{"cniVersion":"1.0.0","name":"silk","type":"silk-cni","daemonPort":23954,"mtu":null,"metadata": {"policy_group_id":"a"} ,"runtimeConfig":{"aliases":{}},"capabilities":{"ips":true}}`)
	f.Add(`{"name":"silk","runtimeConfig":{"portMappings":[{"host_port":1}],"netOutRules": [ {} ] ,"bandwidth":null},"runtimeConfig":{"netOutRules":null}}`)
	f.Add(`{"overlay_subnet":"10.255.30.0/24","overlay_network":"10.255.0.0/16","mtu":1450,"vtep":"silk-vtep","status":"ready"}`)
	f.Add(`{"policy_group_id":"a","policy_group_id":null,"Name":"b","MTU":1,"STATUS":""}`)
	f.Add(`{"name":"a","name":null,"mtu":1.0,"runtimeConfig":{"ips":["10.255.30.9"]},"prevResult":null}`)
	f.Fuzz(func(t *testing.T, input string) {
		var c, wantC config
		if c.plain([]byte(input)) {
			if err := json.Unmarshal([]byte(input), &wantC); err != nil || !reflect.DeepEqual(c, wantC) {
				t.Fatalf("%q became\n%+v, with encoding/json\n%+v, %v", input, c, wantC, err)
			}
		}
		var a, wantA answer
		if a.plain([]byte(input)) {
			if err := json.Unmarshal([]byte(input), &wantA); err != nil || a != wantA {
				t.Fatalf("%q became\n%+v, with encoding/json\n%+v, %v", input, a, wantA, err)
			}
		}
		if json.Valid([]byte(input)) && input[0] == '{' {
			var m struct {
				Group string `json:"policy_group_id"`
			}
			want := json.Unmarshal([]byte(input), &m)
			if got, err := groupOf([]byte(input)); (err == nil) != (want == nil) || err == nil && got != m.Group {
				t.Fatalf("%q has group %q, %v; with encoding/json %q, %v", input, got, err, m.Group, want)
			}
		}
	})
}

// What is written without encoding/json must be what encoding/json would have written.
func FuzzPlainResult(f *testing.F) {
	f.Add("1.0.0", "eth0", "/run/netns/c1", 0, "4", 1, "")
	f.Add("1.1.0", "eth0", "/run/netns/<c1>", 1450, "", 0, "apps.internal")
	f.Fuzz(func(t *testing.T, version, name, netns string, mtu int, family string, n int, domain string) {
		r := result{
			CNIVersion: version,
			Interfaces: []resultDevice{{Name: name, MAC: mac.Addr{0xaa}, MTU: mtu & 0xffff}, {Name: "eth0", MTU: mtu & 0xffff, Sandbox: netns}},
			IPs:        []resultIP{{Version: family, Interface: n & 1, Address: "10.255.30.2/32", Gateway: "169.254.0.1"}},
			Routes:     []resultRoute{{Dst: "0.0.0.0/0", GW: "169.254.0.1"}},
		}
		if n&2 != 0 {
			r.DNS = &resultDNS{Nameservers: []string{"169.254.0.2", domain}[:n>>2&1], Domain: domain, Search: []string{domain}[:n>>3&1], Options: []string{domain, name}[:n>>4&1]}
		}
		want, err := json.MarshalIndent(r, "", indent)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := r.plain(); ok && string(got) != string(want) {
			t.Fatalf("wrote\n%s\nencoding/json\n%s", got, want)
		}
	})
}

// The usual input must take the short way: that is what it is for.
func TestTheUsualIsPlain(t *testing.T) {
	var c config
	if !c.plain([]byte(`{"cniVersion":"1.0.0","name":"silk","type":"silk-cni","daemonPort":23954,"runtimeConfig":{},"metadata":{"policy_group_id":"a"},"advertise":{"group":true},"tls":[{}],"dns":{}}`)) {
		t.Error("a configuration is not plain")
	}
	var a answer
	if !a.plain([]byte(`{"overlay_subnet":"10.255.30.0/24","overlay_network":"10.255.0.0/16","mtu":1450,"vtep":"silk-vtep","status":"ready"}` + "\n")) {
		t.Error("an answer is not plain")
	}
	if _, ok := (result{CNIVersion: "1.0.0", Interfaces: []resultDevice{{Name: "eth0", Sandbox: "/run/netns/c1"}}, DNS: &resultDNS{Nameservers: []string{"169.254.0.2"}}}).plain(); !ok {
		t.Error("a result is not plain")
	}
}
