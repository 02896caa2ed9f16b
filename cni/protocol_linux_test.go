package cni_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	types040 "github.com/containernetworking/cni/pkg/types/040"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

func TestVersion(t *testing.T) {
	h := newHost(t)
	a := h.run("VERSION", "", nil)
	var got struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal([]byte(a.stdout), &got); err != nil || a.code != 0 {
		t.Fatal(a, err)
	}
	if got.CNIVersion != "1.1.0" || strings.Join(got.SupportedVersions, " ") != "0.3.1 0.4.0 1.0.0 1.1.0" {
		t.Errorf("%+v", got)
	}
}

func TestWithoutCommand(t *testing.T) {
	a := newHost(t).run("", "", nil)
	if a.code != 0 || a.stdout != "" || !strings.Contains(a.stderr, "CNI protocol versions supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0") {
		t.Errorf("%+v", a)
	}
}

// TestRefusals holds the error codes of the specification.
func TestRefusals(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	env := func(more ...string) map[string]string { return c.env(more...) }
	without := func(name string) map[string]string {
		e := env()
		delete(e, name)
		return e
	}
	own := filepath.Join(t.TempDir(), "own")
	if err := h.ns.Bind(own); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unbind(own) })
	for _, tt := range []struct {
		name, command, config string
		env                   map[string]string
		code                  int
		text                  string
	}{
		{"unknown command", "FROB", h.config(), env(), 4, "unknown CNI_COMMAND: FROB"},
		{"no environment", "ADD", h.config(), nil, 4, "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME] missing"},
		{"no netns", "CHECK", h.config(), without("CNI_NETNS"), 4, "[CNI_NETNS] missing"},
		{"no container", "DEL", h.config(), without("CNI_CONTAINERID"), 4, "[CNI_CONTAINERID] missing"},
		{"bad container", "ADD", h.config(), env("CNI_CONTAINERID", "../x"), 4, "invalid characters in containerID"},
		{"long interface", "ADD", h.config(), env("CNI_IFNAME", strings.Repeat("x", 16)), 4, "interface name should be less than 16 characters"},
		{"interface with a slash", "ADD", h.config(), env("CNI_IFNAME", "a/b"), 4, "interface name contains"},
		{"no JSON", "ADD", "{", env(), 6, "error unmarshall network config"},
		{"a list", "DEL", "[]", env(), 7, "missing network name"},
		{"no name", "ADD", `{"cniVersion":"1.0.0"}`, env(), 7, "missing network name"},
		{"bad name", "ADD", `{"cniVersion":"1.0.0","name":"a/b"}`, env(), 7, "invalid characters found in network name"},
		{"no version", "ADD", `{"name":"silk"}`, env(), 1, "incompatible CNI versions"},
		{"old version", "ADD", h.config("cniVersion", "0.2.0"), env(), 1, "incompatible CNI versions"},
		{"version of the future", "ADD", h.config("cniVersion", "9.0.0"), env(), 1, "incompatible CNI versions"},
		{"CHECK of 0.3.1", "CHECK", h.config("cniVersion", "0.3.1"), env(), 1, "config version does not allow CHECK"},
		{"GC of 1.0.0", "GC", h.config("cniVersion", "1.0.0"), env(), 1, "config version does not allow GC"},
		{"STATUS of 1.0.0", "STATUS", h.config("cniVersion", "1.0.0"), env(), 1, "config version does not allow STATUS"},
		{"no daemon and no file", "ADD", h.config("daemonPort", 0), env(), 7, "daemonPort: missing"},
		{"all that is wrong at once", "ADD", h.config("daemonPort", -1, "mtu", -5, "policy", "maybe", "endpointDir", "x", "metadata", []int{}, "no_masquerade_cidr_range", "10.0.0.1"), env(), 7, "daemonPort: is -1"},
		{"negative MTU", "ADD", h.config("mtu", -1), env(), 7, "mtu: is -1: expected 68 to 65535"},
		{"namespace that is not there", "ADD", h.config(), env("CNI_NETNS", "/nowhere"), 8, "open network namespace"},
		{"namespace that is a file", "ADD", h.config(), env("CNI_NETNS", "/etc/hostname"), 8, "not a namespace"},
		{"the plugin's own namespace", "ADD", h.config(), env("CNI_NETNS", own), 8, "should not be the same"},
		{"not the first of the list", "ADD", h.config("prevResult", map[string]any{}), env(), 7, "must be the first plugin"},
		{"port mappings", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": []any{map[string]int{"hostPort": 80}}}), env(), 7, "portMappings[0]: container port is 0: cannot allocate port 0"},
		{"IPv6 port mapping", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": []any{map[string]any{"hostPort": 80, "containerPort": 80, "hostIP": "::"}}}), env(), 7, `hostIP is "::": expected an IPv4 address`},
		{"port twice", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": []any{map[string]int{"HostPort": 80, "ContainerPort": 80}, map[string]any{"host_port": 80, "container_port": 81, "hostIP": "10.0.0.1"}}}), env(), 7, "host port tcp 10.0.0.1:80 is given twice"},
		{"port mapping of icmp", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": []any{map[string]any{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}}}), env(), 7, `protocol "icmp": expected tcp, udp or sctp`},
		{"egress rules", "ADD", h.config("runtimeConfig", map[string]any{"netOutRules": []int{1}}), env(), 7, "runtimeConfig.netOutRules: is no JSON list of objects"},
		{"bandwidth", "ADD", h.config("runtimeConfig", map[string]any{"bandwidth": map[string]int{"ingressRate": 8000000, "ingressBurst": 8000}}), env(), 7, "ingress burst of 8000 bits is too small for 8000000 bit/s and frames of 1464 bytes: expected at least 11712"},
		{"too many port mappings", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": manyPorts()}), env(), 7, "portMappings: expected at most 1024"},
		{"port of the overlay", "ADD", h.config("runtimeConfig", map[string]any{"portMappings": []any{map[string]any{"hostPort": 80, "containerPort": 80, "hostIP": "10.255.30.0"}}}), env(), 7, "is one of the overlay's"},
		{"status with a rate without burst", "STATUS", h.config("rate", 100000), env(), 50, "expected at least 102400"},
		{"rate without burst", "ADD", h.config("rate", 100000), env(), 7, "expected at least 102400"},
		{"bandwidth that is none", "ADD", h.config("runtimeConfig", map[string]any{"bandwidth": map[string]int{"ingressRate": -1}}), env(), 7, "runtimeConfig.bandwidth"},
		{"hardware address", "ADD", h.config("runtimeConfig", map[string]any{"mac": "02:00:00:00:00:01"}), env(), 2, "runtimeConfig.mac"},
		{"two addresses", "ADD", h.config("runtimeConfig", map[string]any{"ips": []string{"10.255.30.9", "10.255.30.10"}}), env(), 7, "expected one IPv4 address"},
		{"IPv6 address", "ADD", h.config("runtimeConfig", map[string]any{"ips": []string{"fd00::1/64"}}), env(), 7, "expected one IPv4 address"},
		{"address of another subnet", "ADD", h.config(), env("CNI_ARGS", "IP=10.255.31.9"), 7, "is not one of this host's"},
		{"CNI_ARGS", "ADD", h.config(), env("CNI_ARGS", "nonsense"), 4, "invalid CNI_ARGS"},
		{"template with an unknown variable", "ADD", h.config("policy_group", "${x}"), env(), 7, `unknown variable "x"`},
		{"template without its argument", "ADD", h.config("policy_group", "a-${args.POD}"), env(), 7, "args.POD is not there"},
		{"template that does not end", "ADD", h.config("policy_group", "${args.POD"), env(), 7, "without }"},
		{"group that is no text", "ADD", h.config("metadata", map[string]int{"policy_group_id": 7}), env(), 7, "policy_group_id"},
		{"long group", "ADD", h.config("policy_group", strings.Repeat("x", 256)), env(), 7, "1 to 255 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, text := h.run(tt.command, tt.config, tt.env).failure(t)
			if code != tt.code || !strings.Contains(text, tt.text) {
				t.Errorf("code %d %q, want %d with %q", code, text, tt.code, tt.text)
			}
		})
	}
	h.clean()
}

// clean fails the test if a record or a container device is left.
func (h *host) clean() {
	h.t.Helper()
	if f := h.records(); len(f) > 0 {
		h.t.Errorf("records left: %v", f)
	}
	if d := h.dump(); strings.Contains(d, "s-010255") {
		h.t.Errorf("devices left:\n%s", d)
	}
}

// records returns the names of the records.
func (h *host) records() []string {
	h.t.Helper()
	all, err := os.ReadDir(filepath.Join(h.dir, "endpoints"))
	if err != nil && !os.IsNotExist(err) {
		h.t.Fatal(err)
	}
	var names []string
	for _, f := range all {
		if !strings.HasPrefix(f.Name(), ".") {
			names = append(names, f.Name())
		}
	}
	return names
}

// TestResults holds the form of the result in every version, as the types of the specification's own library read it.
func TestResults(t *testing.T) {
	h := newHost(t)
	for i, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		c := h.container(fmt.Sprintf("c%d", i))
		a := h.run("ADD", h.config("cniVersion", version), c.env())
		if a.code != 0 {
			t.Fatalf("%s: %s", version, a.stdout)
		}
		var tree map[string]any
		if err := json.Unmarshal([]byte(a.stdout), &tree); err != nil {
			t.Fatal(err)
		}
		addr, host := fmt.Sprintf("10.255.30.%d", 2+i), fmt.Sprintf("s-010255030%03d", 2+i)
		mac := fmt.Sprintf("0a:ff:1e:%02x", 2+i)
		ip := map[string]any{"interface": 1.0, "address": addr + "/32", "gateway": "169.254.0.1"}
		devices := []any{map[string]any{"name": host, "mac": "aa:aa:" + mac}, map[string]any{"name": "eth0", "mac": "ee:ee:" + mac, "sandbox": c.path}}
		if version < "1.0.0" {
			ip["version"] = "4"
		}
		if version == "1.1.0" {
			for _, d := range devices {
				maps.Copy(d.(map[string]any), map[string]any{"mtu": 1450.0})
			}
		}
		want := map[string]any{"cniVersion": version, "interfaces": devices, "ips": []any{ip}, "routes": []any{map[string]any{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}}}
		if diff := cmp.Diff(want, tree); diff != "" {
			t.Errorf("%s (-want +got):\n%s", version, diff)
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
		// The same again, for the same container.
		if b := h.run("ADD", h.config("cniVersion", version), c.env()); b != a {
			t.Errorf("%s: the second ADD gave\n%v\nthe first\n%v", version, b, a)
		}
		h.del(c)
	}
	h.clean()
}

func TestAddressesAreRequested(t *testing.T) {
	h := newHost(t)
	for i, tt := range []struct {
		config string
		args   string
		want   string
	}{
		{h.config("runtimeConfig", map[string]any{"ips": []string{"10.255.30.77/24"}}), "", "10.255.30.77/32"},
		{h.config("runtimeConfig", map[string]any{"ips": []string{"10.255.30.78"}}), "IP=10.255.30.5", "10.255.30.78/32"},
		{h.config(), "IgnoreUnknown=1;IP=10.255.30.79;K8S_POD_NAME=x", "10.255.30.79/32"},
		{h.config(), "", "10.255.30.2/32"},
	} {
		c := h.container(fmt.Sprintf("c%d", i))
		r := h.run("ADD", tt.config, c.env("CNI_ARGS", tt.args)).result(t)
		if r.IPs[0].Address != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.config, tt.args, r.IPs[0].Address, tt.want)
		}
	}
	c := h.container("late")
	if code, text := h.run("ADD", h.config(), c.env("CNI_ARGS", "IP=10.255.30.77")).failure(t); code != 100 || !strings.Contains(text, "is taken by c0/eth0") {
		t.Errorf("%d %s", code, text)
	}
}

func TestGroups(t *testing.T) {
	h := newHost(t)
	for i, tt := range []struct {
		config, args, want string
	}{
		{h.config(), "", "silk"},
		{h.config("policy_group", "team-a"), "", "team-a"},
		{h.config("policy_group", "${args.K8S_POD_NAMESPACE}/${config.name}"), "K8S_POD_NAMESPACE=prod", "prod/silk"},
		{h.config("policy_group", "${config.team}", "team", "blue"), "", "blue"},
		{h.config("policy_group", "x", "metadata", map[string]string{"policy_group_id": "app-guid", "space_id": "s"}), "", "app-guid"},
		{h.config("metadata", map[string]string{"policy_group_id": ""}), "", "silk"},
	} {
		c := h.container(fmt.Sprintf("c%d", i))
		h.run("ADD", tt.config, c.env("CNI_ARGS", tt.args)).result(t)
		var r struct {
			Group    string `json:"policy_group"`
			Metadata json.RawMessage
		}
		b, err := os.ReadFile(filepath.Join(h.dir, "endpoints", h.records()[i]))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &r); err != nil || r.Group != tt.want {
			t.Errorf("%s %s: group %q, want %q (%v)", tt.config, tt.args, r.Group, tt.want, err)
		}
	}
}

// manyPorts maps more ports than a container may have.
func manyPorts() (list []any) {
	for p := range 1025 {
		list = append(list, map[string]any{"hostPort": p + 1, "containerPort": 1})
	}
	return list
}
