package cni_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// wrapped returns the deployed wrapper's configuration, with more keys or other values; nil takes one away.
func (h *host) wrapped(more ...any) string {
	cfg := map[string]any{
		"cniVersion": "1.0.0", "name": "cni-wrapper", "type": "cni-wrapper-plugin",
		"datastore": filepath.Join(h.dir, "metadata", "store.json"), "iptables_lock_file": filepath.Join(h.dir, "iptables.lock"),
		"delegate":         map[string]any{"cniVersion": "1.0.0", "name": "silk", "type": "silk-cni", "daemonPort": h.port, "endpointDir": filepath.Join(h.dir, "endpoints"), "datastore": filepath.Join(h.dir, "store.json"), "dataDir": "/nowhere", "policy": "none"},
		"instance_address": "10.0.16.15", "underlay_ips": []string{"10.0.16.15"}, "temporary_underlay_interface_names": []string{}, "no_masquerade_cidr_range": "10.255.0.0/16",
		"ingress_tag": "ffff0000", "vtep_name": "silk-vtep", "iptables_denied_logs_per_sec": 1, "iptables_accepted_udp_logs_per_sec": 100,
		"iptables_asg_logging": false, "iptables_c2c_logging": false, "dns_servers": []string{"169.254.0.2", "8.8.8.8"},
		"host_tcp_services": []string{"169.254.0.2:9001"}, "host_udp_services": []string{}, "deny_networks": map[string]any{"always": []string{"1.1.1.1/32"}, "running": []string{}, "staging": nil},
		"policy_agent_force_poll_address": "127.0.0.1:8722", "outbound_connections": map[string]any{"limit": false, "logging": false, "dry_run": false, "burst": 1000, "rate_per_sec": 100},
		"metadata": map[string]any{"policy_group_id": "group-1", "ports": "8080", "log_config": `{"guid":"<a>"}`},
	}
	for i := 0; i < len(more); i += 2 {
		cfg[more[i].(string)] = more[i+1]
		if more[i+1] == nil {
			delete(cfg, more[i].(string))
		}
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// TestWrapper: the whole life of a container by the wrapper's configuration, and what its stores say meanwhile.
func TestWrapper(t *testing.T) {
	h := newHost(t)
	file := func(name string) string { return read(t, filepath.Join(h.dir, name)) }
	first := h.container("first")
	if a := h.runWrapper("ADD", h.wrapped(), first.env()); a.code != 0 {
		t.Fatalf("ADD: %s", a.stdout)
	}
	if got, want := file("metadata/store.json"), `{"first":{"handle":"first","ip":"10.255.30.2","metadata":{"log_config":"{\"guid\":\"\u003ca\u003e\"}","policy_group_id":"group-1","ports":"8080"}}}`+"\n"; got != want {
		t.Errorf("store of metadata\n got %s\nwant %s", got, want)
	}
	if got := file("metadata/store.json_version"); got != "2" {
		t.Errorf("version %q", got)
	}
	if a := h.runWrapper("DEL", h.wrapped(), first.env()); a.code != 0 || a.stdout != "" || a.stderr != "" {
		t.Errorf("DEL: %+v", a)
	}
	if got := file("metadata/store.json") + file("metadata/store.json_version") + file("store.json"); got != "{}\n3{}\n" {
		t.Errorf("after DEL: %q", got)
	}
	before, files := h.dump(), h.files()

	c := h.container("c1")
	a := h.runWrapper("ADD", h.wrapped(), c.env())
	r := a.result(t)
	if r.IPs[0].Address != "10.255.30.3/32" || r.CNIVersion != "1.0.0" || fmt.Sprint(r.DNS) != "map[nameservers:[169.254.0.2 8.8.8.8]]" {
		t.Errorf("result %s", a.stdout)
	}
	if got := file("store.json"); got != `{"netns-c1":{"handle":"netns-c1","ip":"10.255.30.3","metadata":null}}`+"\n" {
		t.Errorf("silk's store %s", got)
	}
	if again := h.runWrapper("ADD", h.wrapped(), c.env()); again.stdout != a.stdout {
		t.Errorf("the same ADD again: %s", again.stdout)
	}
	if got := file("metadata/store.json_version"); got != "4" {
		t.Errorf("version %q", got)
	}
	if a := h.runWrapper("CHECK", h.wrapped(), c.env()); a.code != 0 {
		t.Errorf("CHECK: %s", a.stdout)
	}
	os.WriteFile(filepath.Join(h.dir, "metadata/store.json"), []byte("{}"), 0o600)
	if _, text := h.runWrapper("CHECK", h.wrapped(), c.env()).failure(t); !strings.Contains(text, "entry in store "+h.dir+"/metadata/store.json is missing") {
		t.Errorf("CHECK without the entry: %s", text)
	}
	if a := h.runWrapper("GC", h.wrapped("cniVersion", "1.1.0", "cni.dev/valid-attachments", []any{}), nil); a.code != 0 {
		t.Errorf("GC: %s", a.stdout)
	}
	os.WriteFile(filepath.Join(h.dir, "metadata/store.json"), []byte("{}\n"), 0o600)
	os.WriteFile(filepath.Join(h.dir, "metadata/store.json_version"), []byte("3"), 0o600)
	if got := h.dump() + h.files(); got != before+files {
		t.Errorf("before:\n%s\nafter:\n%s", before+files, got)
	}
	if a := h.runWrapper("STATUS", h.wrapped("cniVersion", "1.1.0"), nil); a.code != 0 {
		t.Errorf("STATUS: %s", a.stdout)
	}
	if a := h.runWrapper("VERSION", "", nil); !strings.Contains(a.stdout, `"1.0.0"`) {
		t.Errorf("VERSION: %s", a.stdout)
	}
}

// TestWrapperRefusals: texts and order of the deployed wrapper.
func TestWrapperRefusals(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	outbound := func(burst, rate int) map[string]int { return map[string]int{"burst": burst, "rate_per_sec": rate} }
	all := []any{}
	rows := []struct {
		key   string
		value any
		want  string
	}{ // each is found although all below it are wrong as well
		{"datastore", "", "missing datastore path"},
		{"iptables_lock_file", nil, "missing iptables lock file path"},
		{"delegate", map[string]string{"name": "silk"}, "delegate config is missing type"},
		{"instance_address", "", "missing instance address"},
		{"underlay_ips", []string{}, "missing underlay ips"},
		{"ingress_tag", "", "missing ingress tag"},
		{"vtep_name", "", "missing vtep device name"},
		{"iptables_denied_logs_per_sec", 0, "invalid denied logs per sec"},
		{"iptables_accepted_udp_logs_per_sec", -1, "invalid accepted udp logs per sec"},
		{"outbound_connections", outbound(0, 0), "invalid outbound connection burst"},
		{"outbound_connections", outbound(1, 0), "invalid outbound connection rate"},
		{"policy_agent_force_poll_address", "", "validator: PolicyAgentForcePollAddress: zero value"},
		{"delegate", map[string]string{"type": "bridge"}, `delegate "bridge": expected silk-cni`},
		{"dns_servers", []string{"x"}, `invalid DNS server "x", must be valid IP address`},
		{"host_tcp_services", []string{"1.2.3.4"}, "input rules: host tcp services: address 1.2.3.4: expected an address and a port such as 10.0.16.15:8080"},
		{"host_udp_services", []string{"a:1"}, "input rules: host udp services: address a:1: expected an address and a port such as 10.0.16.15:8080"},
		{"deny_networks", map[string]any{"staging": []string{"1.2.3.4"}}, "deny networks: invalid CIDR address: 1.2.3.4"},
		{"datastore_file_owner", "nobody-of-that-name", "datastore_file_owner: user: unknown user nobody-of-that-name"},
	}
	for i := len(rows) - 1; i >= 0; i-- {
		r := rows[i]
		if r.value == nil {
			r.value = ""
		}
		all = append(all, r.key, r.value)
		if code, text := h.runWrapper("ADD", h.wrapped(all...), c.env()).failure(t); code != 999 || text != r.want+"; " {
			t.Errorf("%s: code %d, %s, want %s", r.key, code, text, r.want)
		}
	}
	for _, config := range []string{"{", h.wrapped("underlay_ips", 7)} {
		if code, text := h.runWrapper("ADD", config, c.env()).failure(t); code != 999 || !strings.HasPrefix(text, "loading wrapper config: ") {
			t.Errorf("code %d, %s", code, text)
		}
	}
	closed := map[string]any{"type": "silk-cni", "daemonPort": h.port, "endpointDir": filepath.Join(h.dir, "endpoints")}
	if _, text := h.runWrapper("ADD", h.wrapped("delegate", closed), c.env()).failure(t); !strings.Contains(text, "policy is required and not in force") {
		t.Error(text)
	}
	if _, text := h.runWrapper("ADD", h.wrapped("prevResult", map[string]any{}), c.env()).failure(t); !strings.Contains(text, "cni-wrapper-plugin must be the first plugin") {
		t.Error(text)
	}
	for _, config := range []string{h.wrapped("delegate", nil), "{"} { // it says what is wrong, instead of falling over
		if code, text := h.runWrapper("ADD", config, c.env()).failure(t); code != 999 {
			t.Errorf("code %d, %s", code, text)
		}
	}
}

// TestWrapperDelNeverMindsItsConfiguration: a container goes whatever its configuration has become.
func TestWrapperDelNeverMindsItsConfiguration(t *testing.T) {
	h := newHost(t)
	first := h.container("first")
	if a := h.runWrapper("ADD", h.wrapped(), first.env()); a.code != 0 {
		t.Fatalf("ADD: %s", a.stdout)
	}
	h.runWrapper("DEL", h.wrapped(), first.env())
	before := h.dump()
	delegate := map[string]any{"endpointDir": filepath.Join(h.dir, "endpoints"), "name": "silk"}
	for name, config := range map[string]string{
		"nothing is right":   h.wrapped("datastore", 7, "iptables_lock_file", 7, "underlay_ips", 7, "delegate", delegate, "policy_agent_force_poll_address", 7, "runtimeConfig", 7, "outbound_connections", 7, "dns_servers", 7),
		"no type":            h.wrapped("delegate", delegate),
		"another version":    h.wrapped("cniVersion", "7.7.7", "delegate", delegate),
		"no name":            h.wrapped("name", nil, "delegate", map[string]any{"endpointDir": filepath.Join(h.dir, "endpoints"), "name": 7}),
		"store is a garbage": h.wrapped("datastore", "/proc/nowhere/store.json"),
		"owner is unknown":   h.wrapped("datastore_file_owner", "nobody-of-that-name"),
		"as it was":          h.wrapped(),
	} {
		c := h.container("c-" + strings.ReplaceAll(name, " ", "-"))
		if a := h.runWrapper("ADD", h.wrapped(), c.env()); a.code != 0 {
			t.Fatalf("%s: ADD: %s", name, a.stdout)
		}
		for range 2 {
			if a := h.runWrapper("DEL", config, c.env()); a.code != 0 {
				t.Errorf("%s: DEL: %s", name, a.stdout)
			}
		}
		if got := h.dump(); got != before {
			t.Errorf("%s: before:\n%s\nafter:\n%s", name, before, got)
		}
		h.runWrapper("DEL", h.wrapped(), c.env())
	}
	none := h.container("none")
	for _, config := range []string{"", "{", "[]", "null", `{"delegate":7}`} {
		if a := h.runWrapper("DEL", config, none.env()); a.code != 0 {
			t.Errorf("DEL with %q: %s", config, a.stdout)
		}
	}
}

// TestWrapperStore: it has its owner, and one that somebody broke is made again.
func TestWrapperStore(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "metadata", "store.json")
	owned := []any{"datastore_file_owner", "daemon", "datastore_file_group", "bin"}
	a, b := h.container("a"), h.container("b")
	if r := h.runWrapper("ADD", h.wrapped(owned...), a.env()); r.code != 0 {
		t.Fatal(r.stdout)
	}
	for _, f := range []string{"", "_lock", "_version"} {
		st, err := os.Stat(store + f)
		if err != nil {
			t.Fatal(err)
		}
		if s := st.Sys().(*syscall.Stat_t); s.Uid != 1 || s.Gid != 2 || st.Mode().Perm() != 0o600 {
			t.Errorf("store.json%s has owner %d, group %d and mode %v", f, s.Uid, s.Gid, st.Mode())
		}
	}
	for _, broken := range []string{`{"a":{`, `[]`} {
		os.WriteFile(store, []byte(broken), 0o600)
		os.WriteFile(store+"_version", []byte("x"), 0o600)
		if r := h.runWrapper("ADD", h.wrapped(owned...), b.env()); r.code != 0 || !strings.Contains(r.stderr, "was broken") {
			t.Errorf("ADD with a broken store: %+v", r)
		}
		if got := read(t, store); strings.Count(got, `"policy_group_id":"group-1"`) != 2 {
			t.Errorf("made again: %s", got)
		}
		if v, err := strconv.Atoi(read(t, store+"_version")); err != nil || v < 1e9 {
			t.Errorf("version %d, %v", v, err)
		}
		h.runWrapper("DEL", h.wrapped(), b.env())
	}
	h.runWrapper("DEL", h.wrapped(), a.env())
	if got := read(t, store); got != "{}\n" {
		t.Errorf("in the end: %s", got)
	}
}

// TestWrapperKilled kills the wrapper's process at each call by which it changes its store; the next operation puts it right.
func TestWrapperKilled(t *testing.T) {
	h := newHost(t)
	cfg := h.wrapped()
	first := h.container("first")
	h.runWrapper("ADD", cfg, first.env())
	h.runWrapper("DEL", cfg, first.env())
	before, kills := h.dump(), 0
	for _, command := range []string{"ADD", "DEL"} {
		for _, call := range []string{"renameat", "write", "flock"} {
			for n, killed := 1, true; killed && n < 40; n++ {
				c := h.container(fmt.Sprintf("%s-%s-%d", command, call, n))
				if command == "DEL" {
					h.runWrapper("ADD", cfg, c.env())
				}
				cmd := h.injectedInto("cni-wrapper-plugin", fmt.Sprintf("%s:signal=KILL:when=%d", call, n), command, cfg, c.env())
				out, err := cmd.CombinedOutput()
				if killed = err != nil && len(out) == 0; killed {
					kills++
				}
				if a := h.runWrapper(command, cfg, c.env()); a.code != 0 {
					t.Errorf("%s: again: %s", c.id, a.stdout)
				}
				if a := h.runWrapper("CHECK", cfg, c.env()); command == "ADD" && a.code != 0 {
					t.Errorf("%s: CHECK: %s", c.id, a.stdout)
				}
				h.runWrapper("DEL", cfg, c.env())
				if got := h.dump(); got != before {
					t.Fatalf("%s: the host was\n%s\nand is\n%s", c.id, before, got)
				}
				if got := read(t, filepath.Join(h.dir, "metadata/store.json")) + read(t, filepath.Join(h.dir, "store.json")); got != "{}\n{}\n" {
					t.Fatalf("%s: the stores are %s", c.id, got)
				}
			}
		}
	}
	if kills < 10 {
		t.Errorf("killed %d times only: the test does not tell much", kills)
	}
}

// TestWrapperPorts: ports lead to the container from the instance's address, unless the runtime says another.
func TestWrapperPorts(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	ip(t, h.ns, "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	ip(t, h.ns, "link", "set", "up0", "up")
	ip(t, h.ns, "addr", "add", "10.0.16.15/24", "dev", "up0")
	ip(t, h.ns, "addr", "add", "10.0.16.16/24", "dev", "up0")
	if a := h.runWrapper("ADD", h.wrapped("runtimeConfig", map[string]any{"portMappings": []any{
		map[string]int{"host_port": 61000, "container_port": 8080}, map[string]any{"HostPort": 61001, "ContainerPort": 8080, "HostIP": "10.0.16.16"},
	}, "netOutRules": nil}), c.env()); a.code != 0 {
		t.Fatal(a.stdout)
	}
	for _, to := range []string{"10.0.16.15:61000", "10.0.16.16:61001"} {
		if err := reaches(t, h.ns, c.ns, "0.0.0.0:8080", to); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	for _, to := range []string{"10.0.16.16:61000", "10.0.16.15:61001"} {
		if _, err := fetch(h.ns, to); err == nil {
			t.Errorf("%s leads to the container", to)
		}
	}
	if a := h.runWrapper("DEL", h.wrapped(), c.env()); a.code != 0 {
		t.Error(a.stdout)
	}
	h.clean()
}
