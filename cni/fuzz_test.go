package cni

import (
	"bytes"
	"encoding/json"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/plainjson"
	"code.cloudfoundry.org/silk/registration/name"
)

func FuzzConfig(f *testing.F) {
	f.Add(`{"cniVersion":"1.1.0","name":"silk","type":"silk-cni","daemonPort":23954,"datastore":"/x","metadata":{"policy_group_id":"a"},"runtimeConfig":{"ips":["10.255.30.9/24"]}}`, "IP=10.255.30.9;K=V")
	f.Add(`{"name":"silk","policy_group":"${args.K}${config.name}","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}],"cni.dev/attachments":null}`, "K=V")
	f.Add(`{"name":"silk","rate":1000,"burst":1000,"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080,"hostIP":"0.0.0.0"},{"Host_Port":"x"}],"bandwidth":{"ingressRate":8}}}`, "")
	f.Add(`{"name":"silk","runtimeConfig":{"netOutRules":[ {"a":["]\\"",{}]} ,{}, [] ]}}`, "")
	f.Add(`{"name":"silk","runtimeConfig":{"netOutRules":[{"a":1},"x",2,null]}}`, "")
	f.Add(`{"name":"silk","mtu":-1,"policy":"x","no_masquerade_cidr_range":"::/0","daemonPort":99999,"policy_agent_force_poll_address":"x"}`, ";;=")
	f.Fuzz(func(t *testing.T, input, args string) {
		for _, lenient := range []bool{false, true} {
			cfg, err := decode([]byte(input), lenient)
			if err != nil {
				failureOf(err).output("")
				continue
			}
			if !endpoint.ValidID(cfg.Name) || cfg.EndpointDir == "" {
				t.Fatalf("%q passed as %+v", input, cfg)
			}
			c := &call{cfg: cfg, args: args, input: []byte(input)}
			valid := cfg.validate() == nil
			if g, err := c.group(); err == nil && (g == "" || len(g) > maxGroup) {
				t.Fatalf("group %q", g)
			}
			if a, err := c.requested(); err == nil && a.IsValid() && !a.Is4() {
				t.Fatalf("requested %v", a)
			}
			if valid && cfg.MTU != 0 && (cfg.MTU < minMTU || cfg.MTU > maxMTU) {
				t.Fatalf("MTU %d passed", cfg.MTU)
			}
			list, listed, err := cfg.attachments()
			if err == nil && !listed && len(list) > 0 {
				t.Fatalf("attachments %v that nobody listed", list)
			}
			for _, k := range list {
				if k.Container == "" || k.Interface == "" {
					t.Fatalf("attachment %+v passed", k)
				}
			}
			cfg.unsupported()
			if list := cfg.RuntimeConfig.NetOutRules; !isNull(list) {
				var all []json.RawMessage
				want := json.Unmarshal(list, &all) == nil
				for _, v := range all {
					want = want && v[0] == '{'
				}
				if got := objects(list); got != want {
					t.Fatalf("%s is taken for a list of objects: %v", list, got)
				}
			}
			if maps, err := cfg.portMaps(); err == nil {
				for _, m := range maps {
					if m.HostPort == 0 || m.ContainerPort == 0 || m.Protocol == "" || m.HostIP.IsValid() && !m.HostIP.Is4() {
						t.Fatalf("port map %+v passed", m)
					}
				}
			}
			if l, err := cfg.limits(); err == nil && l != nil && l.Validate(1450) == nil && l.IngressRate == 0 && l.EgressRate == 0 {
				t.Fatalf("limits %+v limit nothing", l)
			}
		}
	})
}

// FuzzNames: what the keys advertise, tls and dns may become, and that they are read as encoding/json reads them.
func FuzzNames(f *testing.F) {
	f.Add(`{"domain":"apps.internal","names":["${args.K}","full.example."],"group":true,"port":8080,"index":"${args.I}"}`, "K=v.*;I=7", "team-a")
	f.Add(`{"names":["*"],"index":3,"Group":null}`, "K=", "a/b")
	f.Add(`[{},{"listen":443,"forward":80,"alpn":["h2"],"client_auth":true},null]`, "", "")
	f.Add(`{"nameservers":["169.254.0.2"],"search":["apps.internal"],"options":["ndots:2"],"Domain":"x"}`, "", "")
	f.Fuzz(func(t *testing.T, value, args, group string) {
		if !json.Valid([]byte(value)) {
			return
		}
		v := bytes.TrimSpace([]byte(value))
		problems := 0
		bad := func(string, string, ...any) { problems++ }
		same := func(short, long any, ok bool) {
			if ok && !reflect.DeepEqual(short, long) {
				t.Fatalf("%s became\n%+v, with encoding/json\n%+v", value, short, long)
			}
		}
		c := &call{args: args, input: []byte(`{"name":"silk"}`)}
		if !isNull(v) {
			a := readAdvertise(v, bad)
			c.cfg.advertise = a
			if out, err := c.advertisement(group); err == nil && problems == 0 {
				for _, n := range out.Names {
					parsed, err := name.Parse(n)
					full := slices.ContainsFunc(a.Names, func(s string) bool { return strings.HasSuffix(s, ".") })
					if domain, _ := name.Parse(a.Domain); err != nil || string(parsed) != n || !full && !parsed.Below(domain) {
						t.Fatalf("%s %s made the name %q below %q: %v", value, args, n, domain, err)
					}
				}
				if out.Index != nil && (*out.Index < 0 || *out.Index > maxIndex) || len(out.Names) > maxNames+1 {
					t.Fatalf("%s %s made %+v", value, args, out)
				}
			}
		}
		var short, long advertise
		same(&short, &long, plainjson.Each(v, short.plain) && json.Unmarshal(v, &long) == nil)
		var shortDNS, longDNS resultDNS
		same(&shortDNS, &longDNS, plainjson.Each(v, shortDNS.plain) && json.Unmarshal(v, &longDNS) == nil)
		var shortTLS, longTLS listener
		same(&shortTLS, &longTLS, plainjson.Each(v, shortTLS.plain) && json.Unmarshal(v, &longTLS) == nil)
		problems = 0
		for _, l := range readTLS(v, bad) {
			if problems == 0 && (l.Listen == 0 || l.Forward == 0 || l.Listen == l.Forward) {
				t.Fatalf("%s made %+v", value, l)
			}
		}
		problems = 0
		if d := readDNS(v, bad); d != nil && problems == 0 && strings.ContainsAny(strings.Join(slices.Concat(d.Nameservers, d.Search, d.Options, []string{d.Domain}), ""), " \n\t") {
			t.Fatalf("%s made %+v", value, d)
		}
	})
}

func FuzzArgs(f *testing.F) {
	f.Add("IP=10.255.30.9;IgnoreUnknown=1")
	f.Add("=")
	f.Fuzz(func(t *testing.T, s string) {
		args, err := parseArgs(s)
		if err != nil {
			return
		}
		for k, v := range args {
			if !strings.Contains(s, k+"="+v) {
				t.Fatalf("%q gave %q=%q", s, k, v)
			}
		}
	})
}

func FuzzStore(f *testing.F) {
	f.Add(`{"a":{"handle":"a","ip":"10.255.30.2","metadata":null}}`)
	f.Add(`null`)
	f.Add(`{"a":7,"a":{}}`)
	f.Add(" \n")
	f.Fuzz(func(t *testing.T, content string) {
		entries, err := parseStore([]byte(content))
		if err != nil {
			return
		}
		if entries == nil {
			t.Fatal("no entries and no error")
		}
		b, err := json.Marshal(entries)
		if err != nil {
			t.Fatalf("%q cannot be written again: %v", content, err)
		}
		again, err := parseStore(b)
		if err != nil || len(again) != len(entries) {
			t.Fatalf("%q became %q: %v", content, b, err)
		}
	})
}

func FuzzSubnetFile(f *testing.F) {
	f.Add("FLANNEL_NETWORK=10.255.0.0/16\nFLANNEL_SUBNET=10.255.77.1/24\nFLANNEL_MTU=1400\n")
	f.Add("FLANNEL_SUBNET=\"10.255.77.1/24\"\r\nFLANNEL_MTU='1400'\n")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := parseSubnetFile(text)
		if err == nil && (!n.subnet.IsValid() || n.subnet != n.subnet.Masked() || n.mtu < minMTU || n.mtu > maxMTU) {
			t.Fatalf("%q passed as %+v", text, n)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	const head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	f.Add(head + "Content-Length: 47\r\n\r\n" + `{"overlay_subnet":"10.255.30.0/24","mtu":1450}` + "\n")
	f.Add(head + "Transfer-Encoding: chunked\r\n\r\n2f\r\n" + `{"overlay_subnet":"10.255.30.0/24","mtu":1450}` + "\n\r\n0\r\n\r\n")
	f.Add(head + "\r\n{}")
	f.Add("HTTP/1.1 503 Service Unavailable\r\nContent-Length: -1\r\n\r\n")
	f.Add(head + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\n")
	f.Fuzz(func(t *testing.T, text string) {
		body, err := readAnswer(io.LimitReader(strings.NewReader(text), maxAnswer))
		slow, err2 := readAnswer(iotest.OneByteReader(io.LimitReader(strings.NewReader(text), maxAnswer)))
		if (err == nil) != (err2 == nil) || string(body) != string(slow) {
			t.Fatalf("%q: %q %v at once, %q %v by bytes", text, body, err, slow, err2)
		}
		if err != nil {
			return
		}
		if n, err := parseNetwork(body); err == nil && n.status != statusStarting && n.status != statusFenced && (!n.subnet.IsValid() || n.mtu < minMTU) {
			t.Fatalf("%q passed as %+v", body, n)
		}
	})
}

func TestReadAnswer(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\n"
	for text, want := range map[string]string{
		head + "Content-Length: 5\r\n\r\nhello":                                          "hello",
		head + "content-length:5\r\n\r\nhello and more":                                  "hello",
		head + "\r\nuntil the end":                                                       "until the end",
		head + "Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\n\r\n": "hello!",
		"HTTP/1.0 200\r\n\r\nold":                                                        "old",
	} {
		if got, err := readAnswer(strings.NewReader(text)); err != nil || string(got) != want {
			t.Errorf("%q: %q %v, want %q", text, got, err, want)
		}
	}
	for _, bad := range []string{
		"", "garbage", "HTTP/1.1 200 OK\r\n", head + "Content-Length: 9\r\n\r\nshort", head + "Content-Length: x\r\n\r\n",
		head + "Content-Length: 99999999\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhe",
		"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy", "HTTP/2 200 OK\r\n\r\n",
	} {
		if got, err := readAnswer(strings.NewReader(bad)); err == nil {
			t.Errorf("%q passed: %q", bad, got)
		}
	}
}

// FuzzWrapper: whatever the wrapper's configuration is, what undoes gets a configuration that it can work with.
func FuzzWrapper(f *testing.F) {
	f.Add(`{"cniVersion":"1.0.0","name":"cni-wrapper","delegate":{"type":"silk-cni","name":"silk"},"runtimeConfig":{"portMappings":[{"host_port":1,"container_port":2},{"HOSTIP":"1.2.3.4"}]},"metadata":{"a":1},"instance_address":"10.0.0.1"}`)
	f.Add(`{"Delegate":{"Name":"x","CNIVersion":7},"runtimeConfig":{"portMappings":[null]},"CNIVERSION":"9"}`)
	f.Add(`{"delegate":null,"runtimeConfig":[],"dns_servers":[7]}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, input string) {
		for _, command := range []string{"DEL", "ADD"} {
			c := &call{wrapper: new(wrapper), command: command, input: []byte(input)}
			if err := c.unwrap(command == "ADD"); err != nil {
				if command == "DEL" {
					t.Fatalf("DEL: %v", err)
				}
				continue
			}
			cfg, err := decode(c.input, command == "DEL")
			if command == "DEL" && (err != nil || !slices.Contains(supported, cfg.CNIVersion)) {
				t.Fatalf("%q is for a DEL %s: %v", input, c.input, err)
			}
		}
	})
}
