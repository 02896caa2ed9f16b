package cni_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
	types040 "github.com/containernetworking/cni/pkg/types/040"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

// TestNamesAreRecorded: by what configuration and arguments which names and ports are in the record.
func TestNamesAreRecorded(t *testing.T) {
	h := newHost(t)
	three := 3
	for i, tt := range []struct {
		advertise, tls, args string
		names                *endpoint.Advertisement
		ports                []endpoint.TLSListener
	}{
		{advertise: `null`, tls: `null`},
		{tls: `[]`},
		{advertise: `{"group":true}`, names: &endpoint.Advertisement{Names: []string{"team-a.apps.internal"}}},
		{advertise: `{"names":["${args.NOMAD_JOB}","${config.name}.x","${args.NOMAD_JOB}"],"group":true,"port":8080,"index":"${args.I}"}`, args: "NOMAD_JOB=Api;I=3",
			names: &endpoint.Advertisement{Names: []string{"api.apps.internal", "silk.x.apps.internal", "team-a.apps.internal"}, Port: 8080, Index: &three}},
		{advertise: `{"domain":"Silk.","names":["*.${args.A}","${args.B}","full.example."],"index":3}`, args: "A=b;B=b.c", names: &endpoint.Advertisement{Names: []string{"*.b.silk", "b.c.silk", "full.example"}, Index: &three}},
		{advertise: "{\"names\":[\"\\u0061\"]}", names: &endpoint.Advertisement{Names: []string{"a.apps.internal"}}},
		{tls: `[{}]`, ports: []endpoint.TLSListener{{Listen: 61443, Forward: 8080}}},
		{tls: `[{"listen":443},{"forward":9000,"alpn":["h2","http/1.1"],"client_auth":true}]`,
			ports: []endpoint.TLSListener{{Listen: 443, Forward: 8080}, {Listen: 61443, Forward: 9000, ALPN: []string{"h2", "http/1.1"}, ClientAuth: true}}},
	} {
		c := h.container(fmt.Sprintf("c%d", i))
		more := []any{"policy_group", "team-a"}
		if tt.advertise != "" {
			more = append(more, "advertise", json.RawMessage(tt.advertise))
		}
		if tt.tls != "" {
			more = append(more, "tls", json.RawMessage(tt.tls))
		}
		first := h.run("ADD", h.config(more...), c.env("CNI_ARGS", tt.args)).result(t)
		r := h.record(c)
		if diff := cmp.Diff(tt.names, r.Advertise); diff != "" {
			t.Errorf("%s: names (-want +got):\n%s", tt.advertise, diff)
		}
		if diff := cmp.Diff(tt.ports, r.TLS); diff != "" {
			t.Errorf("%s: ports (-want +got):\n%s", tt.tls, diff)
		}
		if diff := cmp.Diff(first, h.run("ADD", h.config(more...), c.env("CNI_ARGS", tt.args)).result(t)); diff != "" {
			t.Errorf("%s %s: the second result differs:\n%s", tt.advertise, tt.tls, diff)
		}
		if a := h.run("CHECK", h.config(more...), c.env("CNI_ARGS", tt.args)); a.code != 0 {
			t.Errorf("CHECK: %s", a.stdout)
		}
		h.del(c, "advertise", 7, "tls", 7, "dns", 7) // what undoes does not judge
	}
	h.clean()
}

// TestNamesOfALiveContainer: those that it was made with stay; an ADD that wants others says so, a CHECK does not mind.
func TestNamesOfALiveContainer(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	base := []any{"advertise", json.RawMessage(`{"names":["a","b"],"index":1}`), "tls", json.RawMessage(`[{"alpn":["h2"]}]`)}
	h.add(c, base...)
	for want, more := range map[string][]any{
		"set of names":         {"advertise", json.RawMessage(`{"names":["b","a"],"index":1}`)},
		"set of names ":        {"advertise", json.RawMessage(`{"names":["a","b"],"index":2}`)},
		"set of names  ":       {"advertise", nil},
		"set of ports for TLS": {"tls", json.RawMessage(`[{}]`)},
	} {
		config := h.config(append(append([]any{}, base...), more...)...)
		if code, text := h.run("ADD", config, c.env()).failure(t); code != 100 || !strings.Contains(text, strings.TrimSpace(want)+": detach it first") {
			t.Errorf("%v: code %d %q, want %q", more, code, text, want)
		}
		if a := h.run("CHECK", config, c.env()); a.code != 0 {
			t.Errorf("CHECK with %v: %s", more, a.stdout)
		}
	}
	if r := h.record(c); r.Advertise == nil || len(r.TLS) != 1 {
		t.Errorf("record %+v", r)
	}
	h.del(c)
}

// TestBadNames: every problem is told, with its place.
func TestBadNames(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	long := strings.Repeat("x", 64)
	for _, tt := range []struct {
		advertise, tls, dns, args string
		want                      []string
	}{
		{advertise: `{"domain":"-","port":70000}`, want: []string{`advertise.domain: name "-"`, "advertise: names nothing", "advertise.port: is 70000: expected 1 to 65535, or 0"}},
		{advertise: `{"nmes":["a"]}`, want: []string{`advertise: json: unknown field "nmes": expected an object with domain, names, group, port and index`}},
		{advertise: `[]`, want: []string{"advertise: json: cannot unmarshal array"}},
		{advertise: `{"names":["${args.A}","${args.B}","${c}","${"]}`, args: "A=" + long, want: []string{"advertise.names[0]: name", "letters, digits", `advertise.names[1] "${args.B}": args.B is not there`, `unknown variable "c"`, "${ without }"}},
		{advertise: `{"names":["${args.A}"]}`, args: "A=*", want: []string{"advertise.names[0]: name \"*\": a wildcard is not to come from a variable"}},
		{advertise: `{"names":["${args.A}"]}`, args: "A=bank.example.", want: []string{"advertise.names[0]: name \"bank.example..apps.internal\": part"}},
		{advertise: `{"names":["${args.A}.${args.B}","*.${args.B}","x-${args.B}"]}`, args: "A=a;B=a.web", want: []string{
			`advertise.names[0] "${args.A}.${args.B}": args.B: is "a.web": expected no dot`, `advertise.names[1] "*.${args.B}": args.B`, `advertise.names[2] "x-${args.B}": args.B`}},
		{advertise: `{"group":true}`, args: "", want: []string{`advertise.group: the policy group is to be a name: name "a/b.apps.internal": part "a/b"`}},
		{advertise: `{"names":["a"],"index":"${args.I}"}`, args: "I=-1", want: []string{`advertise.index: is "-1": expected 0 to 2147483647`}},
		{advertise: `{"names":["a"],"index":[]}`, want: []string{"advertise.index: is []: expected a number, or a template"}},
		{advertise: `{"names":["a"],"index":-1}`, want: []string{`advertise.index: is "-1"`}},
		{tls: `{}`, want: []string{"tls: is no list: expected one of objects with listen"}},
		{tls: `[{"port":1},{"listen":70000,"forward":-1},{"alpn":["","h2","h2","a b"]}]`, want: []string{`tls[0]: json: unknown field "port"`, "tls[1].listen: is 70000: expected 1 to 65535, or 0 for 61443", "tls[1].forward: is -1", `tls[2].alpn[0]: is ""`, `tls[2].alpn[2]: "h2" is there twice`, `tls[2].alpn[3]: is "a b"`}},
		{tls: `[{},{}]`, want: []string{"tls[1].listen: port 61443 is an earlier element's"}},
		{tls: `[{"forward":61443}]`, want: []string{"tls[0].forward: TLS ends at port 61443"}},
		{tls: `[` + strings.Repeat(`{},`, 16) + `{}]`, want: []string{"tls: has 17 elements: expected at most 16"}},
		{dns: `{"nameservers":["x",""],"search":["a b"],"options":["ndots:2\nnameserver 1.1.1.1"],"domain":"a\u00e4"}`, want: []string{`dns.nameservers[0]: is "x": expected an IP address`, `dns.nameservers[1]: is ""`, `dns.search: "a b"`, `dns.options: "ndots:2\n`, `dns.domain: "aä"`}},
		{dns: `{"search":7}`, want: []string{"dns: json: cannot unmarshal number"}},
	} {
		more := []any{"policy_group", "a/b"}
		for key, v := range map[string]string{"advertise": tt.advertise, "tls": tt.tls, "dns": tt.dns} {
			if v != "" {
				more = append(more, key, json.RawMessage(v))
			}
		}
		code, text := h.run("ADD", h.config(more...), c.env("CNI_ARGS", tt.args)).failure(t)
		if code != 7 {
			t.Errorf("%+v: code %d %q", tt, code, text)
		}
		for _, w := range tt.want {
			if !strings.Contains(text, w) {
				t.Errorf("%+v:\n got %s\nwant %s", tt, text, w)
			}
		}
	}
	h.clean()
}

func TestDNSInTheResult(t *testing.T) {
	h := newHost(t)
	for i, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for j, tt := range []struct{ key, want string }{
			{`{"nameservers":["169.254.0.2","fd00::2"],"domain":"a","search":["apps.internal","b"],"options":["ndots:2"]}`, `{"nameservers":["169.254.0.2","fd00::2"],"domain":"a","search":["apps.internal","b"],"options":["ndots:2"]}`},
			{"{\"search\":[\"\\u0061pps.internal\"],\"more\":1}", `{"search":["apps.internal"]}`},
			{`{"nameservers":[]}`, ""},
			{`null`, ""},
		} {
			c := h.container(fmt.Sprintf("c%d-%d", i, j))
			a := h.run("ADD", h.config("cniVersion", version, "dns", json.RawMessage(tt.key)), c.env())
			if a.code != 0 {
				t.Fatalf("%s: %s", version, a.stdout)
			}
			var got struct{ DNS json.RawMessage }
			if err := json.Unmarshal([]byte(a.stdout), &got); err != nil {
				t.Fatal(err)
			}
			var compact strings.Builder
			compact.WriteString(strings.Join(strings.Fields(string(got.DNS)), ""))
			if compact.String() != tt.want {
				t.Errorf("%s: %s gave %s, want %s", version, tt.key, got.DNS, tt.want)
			}
			var err error
			if version < "1.0.0" {
				_, err = types040.NewResult([]byte(a.stdout))
			} else {
				_, err = types100.NewResult([]byte(a.stdout))
			}
			if err != nil {
				t.Errorf("%s: the library refuses it: %v", version, err)
			}
			h.del(c)
		}
	}
}

// TestWrapperNames: the keys may stand beside the wrapper's or in its delegate, and dns_servers are the servers as ever.
func TestWrapperNames(t *testing.T) {
	h := newHost(t)
	for i, config := range []string{
		h.wrapped("advertise", json.RawMessage(`{"group":true}`), "tls", json.RawMessage(`[{}]`), "dns", json.RawMessage(`{"nameservers":["1.1.1.1"],"search":["apps.internal"]}`)),
		strings.Replace(h.wrapped(), `"delegate":{`, `"delegate":{"advertise":{"group":true},"tls":[{}],"dns":{"search":["apps.internal"]},`, 1),
	} {
		c := h.container(fmt.Sprintf("c%d", i))
		r := h.runWrapper("ADD", config, c.env()).result(t)
		if got, want := fmt.Sprint(r.DNS), "map[nameservers:[169.254.0.2 8.8.8.8] search:[apps.internal]]"; got != want {
			t.Errorf("%d: dns %s, want %s", i, got, want)
		}
		got := h.record(c)
		if diff := cmp.Diff(&endpoint.Advertisement{Names: []string{"group-1.apps.internal"}}, got.Advertise); diff != "" || len(got.TLS) != 1 {
			t.Errorf("%d: %+v (-want +got):\n%s", i, got.TLS, diff)
		}
	}
}
