package cni_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
	"github.com/google/go-cmp/cmp"
)

func unbind(path string) { kernel.UnbindNS(path) }

func ip(t testing.TB, ns *kernel.NS, args ...string) string {
	t.Helper()
	var out []byte
	if err := ns.Do(func() (err error) { out, err = exec.Command("ip", args...).CombinedOutput(); return err }); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
	return string(out)
}

// TestDaemons holds what each answer of a daemon, or none, means for ADD and for STATUS.
func TestDaemons(t *testing.T) {
	for _, tt := range []struct {
		name, reply string
		add, status int // codes
		text        string
	}{
		{"ours, ready", ready, 0, 0, ""},
		{"ours, degraded", strings.Replace(ready, `"ready"`, `"degraded","reason":"controller away"`, 1), 0, 0, ""},
		{"an earlier release's", `{"overlay_subnet":"10.255.30.0/24","mtu":1450}`, 0, 0, ""},
		{"ours, starting", `{"overlay_network":"10.255.0.0/16","status":"starting","reason":"no lease yet"}`, 11, 50, "no lease yet"},
		{"ours, fenced", strings.Replace(ready, `"ready"`, `"fenced","reason":"lease lost"`, 1), 11, 51, "lease lost"},
		{"no JSON", `hello`, 11, 50, "answer is not what was expected"},
		{"no subnet", `{"overlay_subnet":"","mtu":1450}`, 11, 50, `subnet ""`},
		{"no MTU", `{"overlay_subnet":"10.255.30.0/24"}`, 11, 50, "mtu 0"},
		{"single address", `{"overlay_subnet":"10.255.0.12/32","mtu":1450}`, 11, 50, "has no address for a container"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.reply = func() string { return tt.reply }
			c := h.container("c1")
			for command, want := range map[string]int{"ADD": tt.add, "STATUS": tt.status} {
				a := h.run(command, h.config(), c.env())
				if want == 0 {
					if a.code != 0 {
						t.Errorf("%s: %s", command, a.stdout)
					}
					continue
				}
				if code, text := a.failure(t); code != want || !strings.Contains(text, tt.text) {
					t.Errorf("%s: code %d %q, want %d with %q", command, code, text, want, tt.text)
				}
			}
			h.del(c)
			h.clean()
		})
	}
}

func TestDaemonAway(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	first := h.add(c)
	away := h.config("daemonPort", 1)
	if d := cmp.Diff(first, h.run("ADD", away, c.env()).result(t)); d != "" {
		t.Errorf("ADD of what exists needs the daemon (-first +again):\n%s", d)
	}
	other := h.container("c2")
	for command, want := range map[string]int{"ADD": 11, "STATUS": 50} {
		if code, text := h.run(command, away, other.env()).failure(t); code != want || !strings.Contains(text, "hint: see whether silk-daemon runs and listens on 127.0.0.1:1") {
			t.Errorf("%s: code %d %q", command, code, text)
		}
	}
	changed := h.config("daemonPort", 1, "metadata", map[string]any{"policy_group_id": "another"})
	if code, text := h.run("ADD", changed, c.env()).failure(t); code != 11 {
		t.Errorf("ADD with another group: code %d %q", code, text)
	}
	ip(t, c.ns, "route", "del", "default")
	if code, text := h.run("ADD", away, c.env()).failure(t); code != 11 {
		t.Errorf("ADD of what is broken: code %d %q", code, text)
	}
	h.add(c)
	if a := h.run("CHECK", away, c.env()); a.code != 0 {
		t.Errorf("CHECK needs the daemon: %s", a.stdout)
	}
	if a := h.run("DEL", away, c.env()); a.code != 0 {
		t.Errorf("DEL needs the daemon: %s", a.stdout)
	}
	h.clean()
}

// TestDaemonThatSaysNothing: a question that is not answered ends.
func TestDaemonThatSaysNothing(t *testing.T) {
	h := newHost(t)
	var l net.Listener
	if err := h.ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close() // the kernel accepts, nobody answers
	c := h.container("c1")
	code, text := h.run("STATUS", h.config("daemonPort", l.Addr().(*net.TCPAddr).Port), c.env()).failure(t)
	if code != 50 || !strings.Contains(text, "timeout") {
		t.Errorf("code %d %q", code, text)
	}
}

func TestSubnetFile(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(h.dir, "subnet.env")
	for content, want := range map[string]string{
		"FLANNEL_NETWORK=10.255.0.0/16\nFLANNEL_SUBNET=10.255.77.1/24\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n": "10.255.77.2/32 1400",
		"FLANNEL_SUBNET=10.255.77.0/24\n":                  "FLANNEL_MTU is missing",
		"FLANNEL_MTU=1400\n":                               "FLANNEL_SUBNET or",
		"FLANNEL_SUBNET=x\nFLANNEL_MTU=1400\n":             `subnet "x"`,
		"FLANNEL_SUBNET=10.255.77.0/24\nFLANNEL_MTU=big\n": "invalid syntax",
		"": "is missing",
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		c := h.container("c1")
		a := h.run("ADD", h.config("daemonPort", 0, "subnetFile", file), c.env())
		if strings.HasPrefix(want, "10.") {
			r := a.result(t)
			if got := fmt.Sprint(r.IPs[0].Address, " ", r.Interfaces[1].MTU); got != want {
				t.Errorf("%q: %s, want %s", content, got, want)
			}
			if out := ip(t, h.ns, "link", "show", r.Interfaces[0].Name); !strings.Contains(out, "mtu 1400") {
				t.Error(out)
			}
		} else if code, text := a.failure(t); code != 11 || !strings.Contains(text, want) {
			t.Errorf("%q: code %d %q, want %q", content, code, text, want)
		}
		h.del(c)
		kernel.UnbindNS(c.path)
	}
	if code, _ := h.run("STATUS", h.config("daemonPort", 0, "subnetFile", "/nowhere"), nil).failure(t); code != 50 {
		t.Errorf("no file: code %d, want 50", code)
	}
}

func TestMTUOfTheConfiguration(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	h.add(c, "mtu", 1300)
	for ns, dev := range map[*kernel.NS]string{h.ns: "s-010255030002", c.ns: "eth0"} {
		if out := ip(t, ns, "link", "show", dev); !strings.Contains(out, "mtu 1300") {
			t.Error(out)
		}
	}
}

// TestPolicyRequired: without the policy agent's table a container would be open, so there is none.
func TestPolicyRequired(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	required := [][]any{{"policy", "required"}, {"policy_agent_force_poll_address", "127.0.0.1:1"}}
	for _, more := range required {
		for command, want := range map[string]int{"ADD": 11, "STATUS": 50} {
			if code, text := h.run(command, h.config(more...), c.env()).failure(t); code != want || !strings.Contains(text, "nft table inet silk-policy is absent") {
				t.Errorf("%v %s: code %d %q", more, command, code, text)
			}
		}
	}
	h.clean()
	nft := func(command string) {
		t.Helper()
		if err := h.ns.Do(func() error { return exec.Command("nft", command).Run() }); err != nil {
			t.Fatal(err)
		}
	}
	for _, made := range []string{"add table inet silk-policy", "add table inet silk-policy; add chain inet silk-policy forward; add chain inet silk-policy input", "add table inet silk-policy { flags dormant; }; add chain inet silk-policy base"} {
		nft(made) // neither keeps anything from anybody
		if code, text := h.run("ADD", h.config("policy", "required"), c.env()).failure(t); code != 11 {
			t.Errorf("%s: code %d %q", made, code, text)
		}
		nft("delete table inet silk-policy")
	}
	h.clean()
	nft("add table inet silk-policy; " + judging)
	for _, more := range required {
		h.add(c, more...)
		h.del(c)
		if a := h.run("STATUS", h.config(more...), c.env()); a.code != 0 {
			t.Errorf("%v: %s", more, a.stdout)
		}
	}
	h.add(c, "policy", "required")
	if err := h.ns.Do(func() error { return exec.Command("nft", "delete", "table", "inet", "silk-policy").Run() }); err != nil {
		t.Fatal(err)
	}
	if _, text := h.run("CHECK", h.config("policy", "required"), c.env()).failure(t); !strings.Contains(text, "silk-policy is absent") {
		t.Error(text)
	}
}

func TestPolicyAgentIsTold(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	if err := h.ns.Do(func() error {
		return exec.Command("nft", "add table inet silk-policy; "+judging).Run()
	}); err != nil {
		t.Fatal(err)
	}
	// The daemon's endpoint stands for the agent's: it answers every path.
	if a := h.run("ADD", h.config("policy_agent_force_poll_address", fmt.Sprintf("127.0.0.1:%d", h.port)), c.env()); a.code != 0 || a.stderr != "" {
		t.Errorf("%+v", a)
	}
	h.del(c)
	if a := h.run("ADD", h.config("policy_agent_force_poll_address", "127.0.0.1:1"), c.env()); a.code != 0 || !strings.Contains(a.stderr, "the container is closed until vxlan-policy-agent has made its rules") {
		t.Errorf("%+v", a)
	}
}

// TestTranslation: whoever runs the daemon, the container's traffic is translated, and what our daemon made is left alone.
func TestTranslation(t *testing.T) {
	pending := func(h *host, c nat.Config) []string {
		t.Helper()
		texts, err := nat.Explain(context.Background(), h.ns, c)
		if err != nil {
			t.Fatal(err)
		}
		return texts
	}
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	t.Run("earlier daemon", func(t *testing.T) {
		h := newHost(t)
		h.reply = func() string { return `{"overlay_subnet":"10.255.30.0/24","mtu":1450}` }
		h.add(h.container("c1"), "no_masquerade_cidr_range", "10.255.0.0/16")
		want := nat.Config{Local: p("10.255.30.0/24"), NoMasquerade: p("10.255.0.0/16"), VTEP: "silk-vtep"}
		if d := pending(h, want); len(d) > 0 {
			t.Errorf("%v", d)
		}
		h.reply = func() string { return `{"overlay_subnet":"10.255.31.0/24","mtu":1450}` } // another lease
		h.add(h.container("c2"), "no_masquerade_cidr_range", "10.255.0.0/16")
		want.Local = p("10.255.30.0/23")
		if d := pending(h, want); len(d) > 0 {
			t.Errorf("%v", d)
		}
	})
	t.Run("ours, not there yet", func(t *testing.T) {
		h := newHost(t)
		h.add(h.container("c1"))
		if d := pending(h, nat.Config{Local: p("10.255.30.0/24"), NoMasquerade: p("10.255.0.0/16"), VTEP: "silk-vtep"}); len(d) > 0 {
			t.Errorf("%v", d)
		}
	})
	t.Run("ours", func(t *testing.T) {
		h := newHost(t)
		made := nat.Config{Local: p("10.255.30.0/24"), NoMasquerade: p("192.168.0.0/16"), VTEP: "silk-vtep"}
		if err := nat.Set(context.Background(), h.ns, made); err != nil {
			t.Fatal(err)
		}
		c := h.container("c1")
		h.add(c)
		if d := pending(h, made); len(d) > 0 {
			t.Errorf("%v", d)
		}
		if err := nat.Remove(context.Background(), h.ns); err != nil {
			t.Fatal(err)
		}
		if _, text := h.run("CHECK", h.config(), c.env()).failure(t); !strings.Contains(text, "address translation is missing") {
			t.Error(text)
		}
	})
}

func TestDelNeedsNothing(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	bad := h.config("daemonPort", "text", "mtu", -7, "policy", "perhaps", "datastore", 7)
	for _, tt := range []struct {
		name, config string
		env          map[string]string
		prepare      func()
	}{
		{"without ADD", h.config(), c.env(), func() {}},
		{"unusable configuration", bad, c.env(), func() { h.add(c) }},
		{"no CNI_NETNS", h.config(), c.env("CNI_NETNS", ""), func() { h.add(c) }},
		{"namespace gone", h.config(), c.env("CNI_NETNS", "/nowhere"), func() { h.add(c) }},
		{"namespace is the host's now", h.config(), c.env("CNI_NETNS", "/proc/self/ns/net"), func() { h.add(c) }},
		{"garbage record", h.config(), c.env(), func() {
			h.add(c)
			if err := os.WriteFile(filepath.Join(h.dir, "endpoints", h.records()[0]), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"records lost", h.config(), c.env(), func() { h.add(c); os.RemoveAll(filepath.Join(h.dir, "endpoints")) }},
		{"bad CNI_ARGS", h.config(), c.env("CNI_ARGS", "x"), func() { h.add(c) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.prepare()
			for range 2 {
				if a := h.run("DEL", tt.config, tt.env); a.code != 0 || a.stdout != "" {
					t.Errorf("%+v", a)
				}
			}
			h.clean()
		})
	}
}

func TestGC(t *testing.T) {
	one := func(id, ifname string) map[string]string {
		return map[string]string{"containerID": id, "ifname": ifname}
	}
	const spec, old = "cni.dev/valid-attachments", "cni.dev/attachments"
	for _, tt := range []struct {
		name string
		more []any
		want string // who is left
	}{
		{"no list", nil, "c1 c2 c3"},
		{"null", []any{spec, nil}, "c1 c2 c3"},
		{"both null", []any{spec, nil, old, nil}, "c1 c2 c3"},
		{"empty", []any{spec, []any{}}, ""},
		{"empty, first spelling of libcni", []any{old, []any{}}, ""},
		{"one", []any{spec, []any{one("c2", "eth0")}}, "c2"},
		{"union", []any{spec, []any{one("c2", "eth0")}, old, []any{one("c3", "eth0")}}, "c2 c3"},
		{"union with null", []any{spec, nil, old, []any{one("c3", "eth0")}}, "c3"},
		{"another interface", []any{spec, []any{one("c2", "eth1")}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			store := filepath.Join(h.dir, "store.json")
			for _, id := range []string{"c1", "c2", "c3"} {
				h.add(h.container(id), "datastore", store)
			}
			other := h.container("o1")
			h.add(other, "name", "other", "datastore", store)
			if a := h.run("GC", h.config(append(tt.more, "datastore", store)...), nil); a.code != 0 || a.stdout != "" {
				t.Fatalf("%+v", a)
			}
			var left []string
			foreign := false
			for _, f := range h.records() {
				network, rest, _ := strings.Cut(f, "@")
				id, _, _ := strings.Cut(rest, "@")
				if network == "other" {
					foreign = true
				} else {
					left = append(left, id)
				}
			}
			if got := strings.Join(left, " "); got != tt.want || !foreign {
				t.Errorf("left %q (other network's: %v), want %q", got, foreign, tt.want)
			}
			if got, want := strings.Count(h.dump(), "peer 10.255.30."), 1+len(left); got != want {
				t.Errorf("%d devices, want %d", got, want)
			}
			b, err := os.ReadFile(store)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := strings.Count(string(b), `"ip"`), 1+len(left); got != want {
				t.Errorf("store %s has %d entries, want %d", b, got, want)
			}
		})
	}
	t.Run("a list that cannot be read removes nothing", func(t *testing.T) {
		h := newHost(t)
		h.add(h.container("c1"))
		for _, bad := range []any{"text", map[string]int{}, []any{7}, []any{one("", "eth0")}, []any{one("c2", "")}} {
			if code, _ := h.run("GC", h.config(spec, bad), nil).failure(t); code != 6 {
				t.Errorf("%v: code %d, want 6", bad, code)
			}
		}
		if len(h.records()) != 1 {
			t.Error("the endpoint is gone")
		}
	})
}

func TestStatusWarnsOfAFullSubnet(t *testing.T) {
	h := newHost(t)
	h.reply = func() string { return `{"overlay_subnet":"10.255.30.0/30","mtu":1450}` }
	c := h.container("c1")
	h.add(c)
	h.add(h.container("c2"))
	a := h.run("STATUS", h.config(), nil)
	if a.code != 0 || !strings.Contains(a.stderr, "subnet 10.255.30.0/30 is full: all 2 addresses are taken") {
		t.Errorf("%+v", a)
	}
	code, text := h.run("ADD", h.config(), h.container("c3").env()).failure(t)
	if code != 11 || !strings.Contains(text, "all 2 are taken") || !strings.Contains(text, "c1/eth0") {
		t.Errorf("code %d %q", code, text)
	}
	h.del(c)
	h.add(h.container("c4"))
}

func TestCheck(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	if code, text := h.run("CHECK", h.config(), c.env()).failure(t); code != 3 {
		t.Errorf("not attached: code %d %q, want 3", code, text)
	}
	r := h.run("ADD", h.config(), c.env())
	r.result(t)
	prev := func(replace ...string) string {
		return h.config("prevResult", json.RawMessage(strings.NewReplacer(replace...).Replace(r.stdout)))
	}
	if a := h.run("CHECK", prev(), c.env()); a.code != 0 || a.stdout != "" {
		t.Errorf("%+v", a)
	}
	if _, text := h.run("CHECK", prev("10.255.30.2/32", "10.255.30.9/32"), c.env()).failure(t); !strings.Contains(text, "address 10.255.30.2 is missing in prevResult") {
		t.Error(text)
	}
	// A plugin that came after us changed the interface, and says so in the result; of a lower MTU, none does.
	ip(t, c.ns, "link", "set", "eth0", "mtu", "1300")
	if _, text := h.run("CHECK", h.config(), c.env()).failure(t); !strings.Contains(text, "mtu of eth0 is 1300: expected 1450") {
		t.Error(text)
	}
	if a := h.run("CHECK", prev(), c.env()); a.code != 0 {
		t.Errorf("%+v", a)
	}
	ip(t, c.ns, "link", "set", "eth0", "mtu", "1500")
	if _, text := h.run("CHECK", prev(), c.env()).failure(t); !strings.Contains(text, "mtu of eth0 is 1500: expected 1450") {
		t.Error(text)
	}
	if a := h.run("CHECK", prev(`"mtu": 1450,
            "sandbox"`, `"mtu": 1500,
            "sandbox"`), c.env()); a.code != 0 {
		t.Errorf("%+v", a)
	}
	ip(t, h.ns, "route", "del", "10.255.30.2")
	if code, text := h.run("CHECK", h.config(), c.env()).failure(t); code != 100 || !strings.Contains(text, "route to 10.255.30.2 on s-010255030002 is missing") {
		t.Errorf("%d %s", code, text)
	}
}
