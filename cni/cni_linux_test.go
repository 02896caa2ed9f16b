package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/cni"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// host is a host: a namespace with a daemon's info endpoint, and directories.
type host struct {
	t     testing.TB
	ns    *kernel.NS
	dir   string
	port  int
	reply func() string // what the daemon answers
}

const ready = `{"overlay_subnet":"10.255.30.0/24","overlay_network":"10.255.0.0/16","mtu":1450,"vtep":"silk-vtep","status":"ready"}`

func newHost(t testing.TB) *host {
	t.Helper()
	h := &host{t: t, ns: netns.New(t), dir: t.TempDir(), reply: func() string { return ready }}
	h.up("lo")
	var l net.Listener
	if err := h.ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	h.port = l.Addr().(*net.TCPAddr).Port
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, h.reply()) })}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return h
}

func (h *host) up(device string) {
	h.t.Helper()
	if err := h.ns.Do(func() error { return kernelUp(device) }); err != nil {
		h.t.Fatal(err)
	}
}

// container is a network namespace with a name.
type container struct {
	id, path string
	ns       *kernel.NS
}

func (h *host) container(id string) container {
	h.t.Helper()
	c := container{id, filepath.Join(h.dir, "netns-"+id), netns.New(h.t)}
	if err := c.ns.Bind(c.path); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { kernel.UnbindNS(c.path) })
	return c
}

// config returns the network configuration, with more keys or other values.
func (h *host) config(more ...any) string {
	cfg := map[string]any{
		"cniVersion": "1.1.0", "name": "silk", "type": "silk-cni",
		"daemonPort": h.port, "endpointDir": filepath.Join(h.dir, "endpoints"),
	}
	for i := 0; i < len(more); i += 2 {
		cfg[more[i].(string)] = more[i+1]
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// answer is what the plugin gave.
type answer struct {
	code           int
	stdout, stderr string
}

// failure reads an error that the plugin printed.
func (a answer) failure(t testing.TB) (code int, text string) {
	t.Helper()
	var e struct {
		Code         int
		Msg, Details string
	}
	if a.code == 0 {
		t.Fatalf("it succeeded: %s", a.stdout)
	}
	if err := json.Unmarshal([]byte(a.stdout), &e); err != nil {
		t.Fatalf("error %q: %v", a.stdout, err)
	}
	return e.Code, e.Msg + "; " + e.Details
}

// run runs silk-cni in this process, in the host's namespace.
func (h *host) run(command, config string, env map[string]string) answer {
	h.t.Helper()
	return h.call(cni.Run, command, config, env)
}

// runWrapper is run for cni-wrapper-plugin.
func (h *host) runWrapper(command, config string, env map[string]string) answer {
	h.t.Helper()
	return h.call(cni.RunWrapper, command, config, env)
}

func (h *host) call(plugin func(context.Context, cni.Env) int, command, config string, env map[string]string) answer {
	h.t.Helper()
	var stdout, stderr bytes.Buffer
	getenv := func(k string) string {
		if k == "CNI_COMMAND" {
			return command
		}
		return env[k]
	}
	var a answer
	if err := h.ns.Do(func() error {
		a.code = plugin(context.Background(), cni.Env{Getenv: getenv, Stdin: strings.NewReader(config), Stdout: &stdout, Stderr: &stderr})
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	a.stdout, a.stderr = stdout.String(), stderr.String()
	return a
}

func (c container) env(more ...string) map[string]string {
	env := map[string]string{"CNI_CONTAINERID": c.id, "CNI_NETNS": c.path, "CNI_IFNAME": "eth0", "CNI_PATH": "/nowhere"}
	for i := 0; i < len(more); i += 2 {
		env[more[i]] = more[i+1]
	}
	return env
}

// result is what tests look at in the result of an ADD.
type result struct {
	CNIVersion string
	Interfaces []struct {
		Name, Mac, Sandbox string
		MTU                int
	}
	IPs []struct {
		Version, Address, Gateway string
		Interface                 int
	}
	Routes []struct{ Dst, GW string }
	DNS    any
}

func (a answer) result(t testing.TB) result {
	t.Helper()
	if a.code != 0 {
		t.Fatalf("exit %d: %s%s", a.code, a.stdout, a.stderr)
	}
	var r result
	if err := json.Unmarshal([]byte(a.stdout), &r); err != nil {
		t.Fatalf("result %q: %v", a.stdout, err)
	}
	return r
}

func (h *host) add(c container, more ...any) result {
	h.t.Helper()
	return h.run("ADD", h.config(more...), c.env()).result(h.t)
}

func (h *host) del(c container, more ...any) {
	h.t.Helper()
	if a := h.run("DEL", h.config(more...), c.env()); a.code != 0 || a.stdout != "" {
		h.t.Errorf("DEL %s: exit %d: %s%s", c.id, a.code, a.stdout, a.stderr)
	}
}

func TestAddAndDel(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	h.add(c) // translation and ip_forward are the host's and stay
	h.del(c)
	before := h.dump()
	if r := h.add(c); r.IPs[0].Address != "10.255.30.3/32" {
		t.Errorf("address %s, want the one after that of the first ADD", r.IPs[0].Address)
	}
	if a := h.run("CHECK", h.config(), c.env()); a.code != 0 {
		t.Errorf("CHECK: %s", a.stdout)
	}
	h.del(c)
	h.del(c)
	if after := h.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
