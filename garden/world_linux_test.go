package garden_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// programs is the directory of the real binaries, built once for all tests.
var programs string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if len(os.Args) > 1 && os.Args[1] == driverArg {
			return driverMain(os.Args[2:])
		}
		flag.Parse()
		if flag.Lookup("test.fuzz").Value.String() != "" || flag.Lookup("test.list").Value.String() != "" {
			return m.Run()
		}
		dir, remove, err := testkit.Programs()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer remove()
		programs = dir
		return m.Run()
	}())
}

// cell is a host of Garden: a namespace with a daemon's answer, and directories.
type cell struct {
	t       testing.TB
	ns      *kernel.NS
	dir     string
	port    int
	adapter map[string]any
}

const ready = `{"overlay_subnet":"10.255.30.0/24","overlay_network":"10.255.0.0/16","mtu":1450,"vtep":"silk-vtep","status":"ready"}`

func newCell(t testing.TB) *cell {
	t.Helper()
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	t.Cleanup(func() { ns.Close() })
	c := &cell{t: t, ns: ns, dir: t.TempDir()}
	c.tool("ip", "link", "set", "lo", "up")
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	c.port = l.Addr().(*net.TCPAddr).Port
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, ready) })}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	c.adapter = map[string]any{
		"cni_plugin_dir": programs, "cni_config_dir": c.path("cni"), "bind_mount_dir": c.path("netns"), "state_file": c.path("state", "ports.json"),
		"start_port": 61000, "total_ports": 5000, "log_prefix": "cell", "iptables_lock_file": c.path("iptables.lock"), "proxy_port": 15001, "proxy_uid": 0,
		"cni_cache_dir": c.path("cache"),
	}
	c.write("cni/10-silk.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"silk","plugins":[{"type":"silk-cni","daemonPort":%d,"endpointDir":%q}]}`, c.port, c.path("endpoints")))
	t.Cleanup(func() { // of failed tests
		mounts, _ := filepath.Glob(c.path("netns", "*"))
		for _, m := range mounts {
			kernel.UnbindNS(m)
		}
	})
	return c
}

func (c *cell) path(names ...string) string {
	return filepath.Join(append([]string{c.dir}, names...)...)
}

func (c *cell) write(name, text string) {
	c.t.Helper()
	if err := os.MkdirAll(filepath.Dir(c.path(name)), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.path(name), []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// plugin installs a shell script as a plugin beside the real ones.
func (c *cell) plugin(name, script string) {
	c.t.Helper()
	dir := c.path("plugins")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	for _, p := range []string{"silk-cni"} {
		os.Symlink(filepath.Join(programs, p), filepath.Join(dir, p))
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/bash\n"+script), 0o755); err != nil {
		c.t.Fatal(err)
	}
	c.adapter["cni_plugin_dir"] = dir
}

// chain makes a plugin follow silk-cni.
func (c *cell) chain(plugin string) {
	c.write("cni/10-silk.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"silk","plugins":[{"type":"silk-cni","daemonPort":%d,"endpointDir":%q},{"type":%q}]}`, c.port, c.path("endpoints"), plugin))
}

// tool runs a program on the host.
func (c *cell) tool(name string, args ...string) string {
	c.t.Helper()
	var out []byte
	err := c.ns.Do(func() (err error) { out, err = exec.Command(name, args...).CombinedOutput(); return err })
	if err != nil {
		c.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// answer is what the program gave.
type answer struct {
	code           int
	stdout, stderr string
}

// command returns the program with arguments, in the host's configuration.
func (c *cell) command(stdin string, args ...string) *exec.Cmd {
	c.t.Helper()
	b, err := json.Marshal(c.adapter)
	if err != nil {
		c.t.Fatal(err)
	}
	c.write("adapter.json", string(b))
	cmd := exec.Command(filepath.Join(programs, "garden-external-networker"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	return cmd
}

func (c *cell) start(cmd *exec.Cmd) {
	c.t.Helper()
	if err := c.ns.Do(cmd.Start); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cell) finish(cmd *exec.Cmd) answer {
	c.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	c.start(cmd)
	cmd.Wait()
	return answer{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// run runs the program as Garden does: what the operator adds comes first.
func (c *cell) run(action, handle, stdin string, files ...*os.File) answer {
	c.t.Helper()
	cmd := c.command(stdin, "--configFile="+c.path("adapter.json"), "--action", action, "--handle", handle)
	cmd.ExtraFiles = files
	return c.finish(cmd)
}

// container is a namespace that Garden made.
func (c *cell) container() (*kernel.NS, *os.File) {
	c.t.Helper()
	ns, err := kernel.NewNS()
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { ns.Close() })
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", ns.FD()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { f.Close() })
	return ns, f
}

// output is what Garden makes of an up's answer.
type output struct {
	Properties    map[string]string `json:"properties"`
	DNSServers    []string          `json:"dns_servers"`
	SearchDomains []string          `json:"search_domains"`
}

func (o output) ports(t testing.TB) (list []struct{ HostPort, ContainerPort int }) {
	t.Helper()
	if err := json.Unmarshal([]byte(o.Properties["garden.network.mapped-ports"]), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

func (c *cell) up(handle, stdin string, files ...*os.File) output {
	c.t.Helper()
	a := c.run("up", handle, stdin, files...)
	if a.code != 0 {
		c.t.Fatalf("up %s: exit %d: %s", handle, a.code, a.stderr)
	}
	var o output
	if err := json.Unmarshal([]byte(a.stdout), &o); err != nil {
		c.t.Fatalf("up %s: %v: %s", handle, err, a.stdout)
	}
	return o
}

func (c *cell) down(handle string) {
	c.t.Helper()
	if a := c.run("down", handle, "null"); a.code != 0 || a.stdout != "" {
		c.t.Fatalf("down %s: exit %d: %s%s", handle, a.code, a.stdout, a.stderr)
	}
}

// dump returns everything that operations change, in words: what the kernel has, and files.
func (c *cell) dump() string {
	c.t.Helper()
	return testkit.Network(c.t, c.ns.Do) + dumpFiles(c.t, c.path("netns"), c.path("state"), c.path("cache"), c.path("endpoints"))
}

// dumpFiles returns the files in directories, with what is in them, except the cursor of addresses.
func dumpFiles(t testing.TB, dirs ...string) string {
	t.Helper()
	var out strings.Builder
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if os.IsNotExist(err) {
				return nil
			}
			if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".cursor-") || d.Name() == ".ports" {
				return err
			}
			b, _ := os.ReadFile(path)
			fmt.Fprintf(&out, "%s %q\n", path, b)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

// listen has a program of the host listen on a port.
func (c *cell) listen(port int) {
	c.t.Helper()
	var l net.Listener
	if err := c.ns.Do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port)); return err }); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { l.Close() })
}
