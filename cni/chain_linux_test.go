package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// pluginsVersion is the release of the standard plugins that silk-cni is chained with, beside the distribution's.
const pluginsVersion = "v1.9.1"

// builtPlugins is the directory of those, built from their module.
var builtPlugins = sync.OnceValues(func() (string, error) {
	dir, err := binary()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "plugins")
	args := []string{"install", "-trimpath"}
	for _, p := range chained {
		args = append(args, "github.com/containernetworking/plugins/plugins/meta/"+p+"@"+pluginsVersion)
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go %v: %w: %s", args, err, out)
	}
	return dir, nil
})

// chained are the plugins that may follow silk-cni.
var chained = []string{"bandwidth", "portmap", "tuning", "firewall"}

// standard returns a directory of the standard plugins that speak the version.
func standard(t testing.TB, version string) string {
	t.Helper()
	dir, err := "/usr/lib/cni", error(nil)
	if version == "1.1.0" {
		dir, err = builtPlugins()
	}
	for _, p := range chained {
		if err == nil {
			_, err = os.Stat(filepath.Join(dir, p))
		}
	}
	if err == nil {
		_, err = exec.LookPath("iptables")
	}
	testkit.Require(t, "tools", err)
	return dir
}

// outside is a machine beyond the host: 192.0.2.2, the host is 192.0.2.1.
func (h *host) outside() *kernel.NS {
	h.t.Helper()
	ns := netns.New(h.t)
	h.tool("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1") // its addresses come when they like
	ip(h.t, h.ns, "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	ip(h.t, h.ns, "link", "set", "up1", "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()))
	ip(h.t, h.ns, "addr", "add", "192.0.2.1/24", "dev", "up0")
	ip(h.t, h.ns, "link", "set", "up0", "up")
	ip(h.t, ns, "addr", "add", "192.0.2.2/24", "dev", "up1")
	ip(h.t, ns, "link", "set", "up1", "up")
	ip(h.t, ns, "link", "set", "lo", "up")
	return ns
}

// chain is a list that begins with silk-cni, and what the runtime says to it.
type chain struct {
	h    *host
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	args map[string]any
}

func (h *host) chain(version, plugins string, args map[string]any) *chain {
	h.t.Helper()
	own, err := binary()
	if err != nil {
		h.t.Fatal(err)
	}
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":%q,"name":"silk","plugins":[%s,%s]}`, version, h.config("cniVersion", version), plugins))
	if err != nil {
		h.t.Fatal(err)
	}
	return &chain{h, libcni.NewCNIConfigWithCacheDir([]string{own, standard(h.t, version)}, filepath.Join(h.dir, "cache"), nil), list, args}
}

func (c *chain) do(f func(rt *libcni.RuntimeConf) error, x container) {
	c.h.t.Helper()
	rt := &libcni.RuntimeConf{ContainerID: x.id, NetNS: x.path, IfName: "eth0", CapabilityArgs: c.args}
	if err := c.h.ns.Do(func() error { return f(rt) }); err != nil {
		c.h.t.Fatal(err)
	}
}

func (c *chain) add(x container) *types100.Result {
	c.h.t.Helper()
	var r *types100.Result
	c.do(func(rt *libcni.RuntimeConf) error {
		result, err := c.cni.AddNetworkList(c.h.t.Context(), c.list, rt)
		if err == nil {
			r, err = types100.NewResultFromResult(result)
		}
		return err
	}, x)
	return r
}

func (c *chain) check(x container) {
	c.h.t.Helper()
	if c.list.CNIVersion == "0.3.1" {
		return
	}
	list := *c.list
	if list.CNIVersion != "1.1.0" { // portmap 1.1.1 looks for what it makes for IPv6 addresses only
		list.Plugins = slices.DeleteFunc(slices.Clone(list.Plugins), func(p *libcni.PluginConfig) bool { return p.Network.Type == "portmap" })
	}
	c.do(func(rt *libcni.RuntimeConf) error { return c.cni.CheckNetworkList(c.h.t.Context(), &list, rt) }, x)
}

func (c *chain) del(x container) {
	c.h.t.Helper()
	c.do(func(rt *libcni.RuntimeConf) error { return c.cni.DelNetworkList(c.h.t.Context(), c.list, rt) }, x)
}

// serveOnce answers the next connection in a namespace with what it is told.
func serveOnce(t testing.TB, ns *kernel.NS, addr string, answer func(net.Conn)) {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", addr); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		l.Close()
		if err == nil {
			answer(c)
			c.Close()
		}
	}()
}

// fetch reads all that a server says.
func fetch(ns *kernel.NS, addr string) (string, error) {
	var c net.Conn
	if err := ns.Do(func() (err error) { c, err = net.DialTimeout("tcp4", addr, 20*time.Second); return err }); err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

// dials connects, and closes the connection.
func dials(ns *kernel.NS, addr string, patience time.Duration) error {
	return ns.Do(func() error {
		c, err := net.DialTimeout("tcp4", addr, patience)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// reaches lets one namespace fetch a word from another.
func reaches(t testing.TB, from, to *kernel.NS, listen, dial string) error {
	t.Helper()
	serveOnce(t, to, listen, func(c net.Conn) { io.WriteString(c, "word") })
	got, err := fetch(from, dial)
	if err == nil && got != "word" {
		err = fmt.Errorf("got %q", got)
	}
	return err
}

// links are the plugins with which a chain is tested, each by what it does to traffic.
var links = []struct {
	name, config string
	args         map[string]any
	prepare      func(t testing.TB, h *host)
	works        func(t testing.TB, h *host, c container, outside *kernel.NS, r *types100.Result)
}{
	{
		name: "bandwidth", config: `{"type":"bandwidth","capabilities":{"bandwidth":true}}`,
		args: map[string]any{"bandwidth": map[string]int{"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}},
		works: func(t testing.TB, h *host, c container, outside *kernel.NS, r *types100.Result) {
			if len(r.Interfaces) != 3 || !strings.HasPrefix(r.Interfaces[2].Name, "bwp") {
				t.Errorf("interfaces %v, want the plugin's own as the third", r.Interfaces)
			}
			body := bytes.Repeat([]byte("x"), 1_200_000) // at a million bytes a second
			for name, way := range map[string]struct{ from, to *kernel.NS }{"ingress": {outside, c.ns}, "egress": {c.ns, outside}} {
				at, start := "192.0.2.2:9000", time.Now()
				if way.from == outside { // who is connected to sends; connections begin in the container
					serveOnce(t, outside, at, func(c net.Conn) { c.Write(body) })
					if got, err := fetch(c.ns, at); err != nil || len(got) != len(body) {
						t.Errorf("%s: %d bytes, %v", name, len(got), err)
					}
				} else {
					done := make(chan int64, 1)
					serveOnce(t, outside, at, func(c net.Conn) { n, _ := io.Copy(io.Discard, c); done <- n })
					if err := send(c.ns, at, body); err != nil {
						t.Errorf("%s: %v", name, err)
					} else if n := <-done; n != int64(len(body)) {
						t.Errorf("%s: %d bytes", name, n)
					}
				}
				if took := time.Since(start); took < 800*time.Millisecond {
					t.Errorf("%s: %d bytes took %v", name, len(body), took)
				}
			}
		},
	},
	{
		name: "portmap", config: `{"type":"portmap","snat":true,"capabilities":{"portMappings":true}}`,
		args: map[string]any{"portMappings": []map[string]any{{"hostPort": 8081, "containerPort": 8080, "protocol": "tcp"}}},
		works: func(t testing.TB, h *host, c container, outside *kernel.NS, _ *types100.Result) {
			if err := reaches(t, outside, c.ns, "0.0.0.0:8080", "192.0.2.1:8081"); err != nil {
				t.Errorf("from outside: %v", err)
			}
			if err := reaches(t, h.ns, c.ns, "0.0.0.0:8080", "192.0.2.1:8081"); err != nil {
				t.Errorf("from the host: %v", err)
			}
		},
	},
	{
		name: "tuning", config: `{"type":"tuning","mtu":1300,"sysctl":{"net.ipv4.ip_unprivileged_port_start":"80"}}`,
		works: func(t testing.TB, h *host, c container, outside *kernel.NS, _ *types100.Result) {
			if got := ip(t, c.ns, "link", "show", "eth0"); !strings.Contains(got, "mtu 1300") {
				t.Errorf("device %s", got)
			}
			if err := c.ns.Do(func() error {
				v, err := kernel.Sysctl("net/ipv4/ip_unprivileged_port_start")
				if err == nil && v != "80" {
					err = errors.New(v)
				}
				return err
			}); err != nil {
				t.Errorf("sysctl: %v", err)
			}
			if err := reaches(t, c.ns, outside, "192.0.2.2:9000", "192.0.2.2:9000"); err != nil {
				t.Error(err)
			}
		},
	},
	{
		name: "firewall", config: `{"type":"firewall","backend":"iptables"}`,
		prepare: func(t testing.TB, h *host) { h.tool("iptables", "-P", "FORWARD", "DROP") },
		works: func(t testing.TB, h *host, c container, outside *kernel.NS, _ *types100.Result) {
			if err := reaches(t, c.ns, outside, "192.0.2.2:9000", "192.0.2.2:9000"); err != nil {
				t.Error(err)
			}
			other := h.container("beside-" + c.id) // which the firewall plugin was not told of
			h.add(other)
			if err := dials(other.ns, "192.0.2.2:9001", time.Second); !os.IsTimeout(err) { // who comes through is refused
				t.Error("a container that the firewall does not know reaches the outside: the test does not tell anything")
			}
			h.del(other)
		},
	},
}

// tool runs a program on the host.
func (h *host) tool(name string, args ...string) string {
	h.t.Helper()
	var out []byte
	if err := h.ns.Do(func() (err error) { out, err = exec.Command(name, args...).CombinedOutput(); return err }); err != nil {
		h.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// send connects and writes.
func send(ns *kernel.NS, addr string, body []byte) error {
	var c net.Conn
	if err := ns.Do(func() (err error) { c, err = net.DialTimeout("tcp4", addr, 20*time.Second); return err }); err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	_, err := c.Write(body)
	return err
}

var passing = regexp.MustCompile(`counter packets \d+ bytes \d+|(?m)^192\.0\.2\.2 dev up0 .*\n`)

// chainDump is dump without what traffic changes.
func chainDump(h *host) string { return passing.ReplaceAllString(h.dump(), "") }

// TestChains: what follows silk-cni in a list works on what it made, and goes without a trace.
func TestChains(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, l := range links {
			if l.name == "firewall" && version == "0.3.1" {
				continue // it begins with 0.4.0
			}
			t.Run(version+"/"+l.name, func(t *testing.T) {
				h := newHost(t)
				outside := h.outside()
				if l.prepare != nil {
					l.prepare(t, h)
				}
				list := h.chain(version, l.config, l.args)
				first := h.container("first") // what stays on a host is there from here on
				list.add(first)
				list.del(first)
				before := chainDump(h)
				c := h.container("c1")
				r := list.add(c)
				if got := r.IPs[0].Address.String(); got != "10.255.30.3/32" || len(r.Interfaces) < 2 || r.Interfaces[1].Name != "eth0" || len(r.Routes) != 1 {
					b, err := json.Marshal(r)
					t.Errorf("result %s, %v", b, err)
				}
				list.check(c)
				l.works(t, h, c, outside, r)
				list.check(c)
				list.del(c)
				list.del(c)
				h.clean()
				h.tool("conntrack", "-F") // of the host and the outside
				if after := chainDump(h); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
			})
		}
	}
}

// TestWholeChain: all of them at once, one after the other.
func TestWholeChain(t *testing.T) {
	for _, version := range []string{"1.0.0", "1.1.0"} {
		h := newHost(t)
		outside := h.outside()
		var configs []string
		args := map[string]any{}
		for _, l := range links {
			configs = append(configs, l.config)
			for k, v := range l.args {
				args[k] = v
			}
		}
		list := h.chain(version, strings.Join(configs, ","), args)
		c := h.container("c1")
		r := list.add(c)
		list.check(c)
		for _, l := range links {
			if l.prepare != nil {
				l.prepare(t, h)
			}
			l.works(t, h, c, outside, r)
		}
		list.check(c)
		list.del(c)
		h.clean()
	}
}

// TestOnlyTheFirst: silk-cni after another plugin is refused with the reason, and leaves nothing.
func TestOnlyTheFirst(t *testing.T) {
	h := newHost(t)
	own, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"silk","plugins":[{"type":"tuning"},%s]}`, h.config("cniVersion", "1.0.0")))
	if err != nil {
		t.Fatal(err)
	}
	second := *list
	second.Plugins = list.Plugins[1:]
	cni := libcni.NewCNIConfigWithCacheDir([]string{own, standard(t, "1.0.0")}, filepath.Join(h.dir, "cache"), nil)
	c := h.container("c1")
	before := h.dump()
	for _, prev := range []string{`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[]}`, `{}`} {
		p, err := libcni.InjectConf(second.Plugins[0], map[string]any{"prevResult": json.RawMessage(prev)})
		if err != nil {
			t.Fatal(err)
		}
		one := second
		one.Plugins = []*libcni.PluginConfig{p}
		rt := &libcni.RuntimeConf{ContainerID: c.id, NetNS: c.path, IfName: "eth0"}
		err = h.ns.Do(func() error { _, err := cni.AddNetworkList(context.Background(), &one, rt); return err })
		if err == nil || !strings.Contains(err.Error(), "silk-cni must be the first plugin of its list; prevResult: another plugin has made an interface already") {
			t.Errorf("prevResult %s: %v", prev, err)
		}
	}
	if after := h.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
