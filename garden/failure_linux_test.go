package garden_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// alone makes a script the only plugin.
func (c *cell) alone(script string) {
	c.plugin("script", script)
	c.write("cni/10-silk.conflist", `{"cniVersion":"1.0.0","name":"silk","plugins":[{"type":"script"}]}`)
}

// attached is a plugin that attaches nothing and says that it did.
const attached = `cat >/dev/null; echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.255.30.9/32","interface":0}]}'`

// TestFailedUpLeavesNothing: whatever step fails, what the steps before it did is taken back.
func TestFailedUpLeavesNothing(t *testing.T) {
	c := newCell(t)
	_, f := c.container()
	c.up("first", `{}`, f)
	c.down("first")
	c.plugin("next", ``)
	for name, r := range map[string]struct {
		script, stdin, want string
		adapter             string
	}{
		"plugin fails":    {script: `[ $CNI_COMMAND = DEL ] || { echo '{"code":7,"msg":"no","details":"why"}'; exit 1; }`, want: `cell: cni up failed: add network list failed: plugin type="next" failed (add): no; why`},
		"no answer":       {script: `exit 1`, want: `cell: cni up failed: add network list failed: plugin type="next" failed (add): netplugin failed with no error message: exit status 1; taking it back: cni down`},
		"no IPv4 address": {script: `cat >/dev/null; echo '{"cniVersion":"1.0.0","ips":[{"address":"fd00::1/128"}]}'`, want: `cell: expected an IPv4 address in the CNI result`},
		"no interface": {script: `cat >/dev/null; echo '{"cniVersion":"1.0.0","interfaces":[{"name":"a"}],"ips":[{"address":"10.0.0.1/32","interface":3}]}'`,
			want: `cell: no corresponding interface found, interface index: 3, number of interfaces: 1`},
		"odd version":      {script: `cat >/dev/null; echo '{"cniVersion":"9.9.9"}'`, want: `cell: cni up failed: add network list failed: `},
		"too slow":         {script: `if [ $CNI_COMMAND = ADD ]; then sleep 60 & wait; fi`, want: `cell: cni up failed: add network list failed: plugin type="next" failed (add): next was killed: context deadline exceeded`},
		"no port":          {script: attached, stdin: `{"netin":[{"host_port":0,"container_port":1},{"host_port":0,"container_port":2},{"host_port":0,"container_port":3}]}`, want: "cell: allocating port: acquire port: port pool exhausted"},
		"port twice":       {script: attached, stdin: `{"netin":[{"host_port":7000,"container_port":1},{"host_port":7000,"container_port":2}]}`, want: "cell: allocating port: acquire port: port 7000 is asked for twice"},
		"bad port":         {script: attached, stdin: `{"netin":[{"host_port":70000,"container_port":1}]}`, want: "cell: allocating port: acquire port: port 70000: expected 1 to 65535, or 0 for any"},
		"bad inner port":   {script: attached, stdin: `{"netin":[{"host_port":0,"container_port":0}]}`, want: "cell: container port 0: expected 1 to 65535"},
		"port of the host": {script: attached, stdin: fmt.Sprintf(`{"netin":[{"host_port":%d,"container_port":1}]}`, c.port), want: fmt.Sprintf("cell: allocating port: acquire port: port %d: a program of the host listens on it", c.port)},
	} {
		t.Run(name, func(t *testing.T) {
			c.adapter["cni_timeout_seconds"], c.adapter["total_ports"] = 2, 2
			c.plugin("next", r.script)
			c.chain("next")
			if r.stdin != "" { // one that is never asked, or does not understand ports
				c.alone(r.script)
			}
			os.RemoveAll(c.path("state"))
			before := c.dump()
			a := c.run("up", "h", r.stdin+strings.Repeat("{}", 1-min(1, len(r.stdin))), f)
			if a.code != 1 || a.stdout != "" || !strings.HasPrefix(a.stderr, r.want) || strings.Count(a.stderr, "\n") != 1 {
				t.Errorf("exit %d, stdout %q, stderr\n%q, want\n%q", a.code, a.stdout, a.stderr, r.want)
			}
			if name == "no answer" { // a DEL that fails as well is told, and goes on being possible
				c.plugin("next", "")
				c.down("h")
			}
			os.RemoveAll(c.path("state"))
			if after := c.dump(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// TestWhatPluginsGet: every plugin gets Garden's word, without having declared a capability; a DEL gets what the ADD gave.
func TestWhatPluginsGet(t *testing.T) {
	c := newCell(t)
	c.plugin("script", `cat >`+c.dir+`/$CNI_COMMAND; env | grep ^CNI_ | sort >`+c.dir+`/env; [ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.1/32"},{"version":"6","address":"fd00::1/128"}],"dns":{"nameservers":["169.254.0.2"]}}'`)
	c.write("cni/a.conf", `{"cniVersion":"0.4.0","name":"one","type":"script","some":{"key":1}}`)
	os.Remove(c.path("cni/10-silk.conflist"))
	_, f := c.container()
	o := c.up("h", `{"Pid":0,"Properties":{"a":"b"},"netin":[{"host_port":0,"container_port":8080},{"host_port":9000,"container_port":22}],"netout_rules":[{"protocol":1,"networks":[{"start":"1.1.1.1","end":"2.2.2.2"}]}]}`, f)
	want := `{"cniVersion":"0.4.0","metadata":{"a":"b"},"name":"one","runtimeConfig":{"netOutRules":[{"networks":[{"end":"2.2.2.2","start":"1.1.1.1"}],"protocol":1}],"portMappings":[{"container_port":8080,"host_port":61000},{"container_port":22,"host_port":9000}]},"some":{"key":1},"type":"script"}`
	if got := read(t, c.path("ADD")); got != want {
		t.Errorf("ADD\n got %s\nwant %s", got, want)
	}
	wantEnv := "CNI_ARGS=\nCNI_COMMAND=ADD\nCNI_CONTAINERID=h\nCNI_IFNAME=eth0\nCNI_NETNS=" + c.path("netns", "h") + "\nCNI_PATH=" + c.path("plugins") + "\n"
	if got := read(t, c.path("env")); got != wantEnv {
		t.Errorf("environment\n got %s\nwant %s", got, wantEnv)
	}
	if p := o.Properties; p["garden.network.mapped-ports"] != `[{"HostPort":61000,"ContainerPort":8080},{"HostPort":9000,"ContainerPort":22}]` || p["garden.network.container-ipv6"] != "fd00::1" || p["garden.network.interface"] != "" {
		t.Errorf("properties %v", p)
	}
	if !slices.Equal(o.DNSServers, []string{"169.254.0.2"}) || o.SearchDomains != nil {
		t.Errorf("DNS %v %v", o.DNSServers, o.SearchDomains)
	}
	if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{"h":[61000,9000]}}`+"\n" {
		t.Errorf("state file %s", got)
	}
	c.down("h")
	if got := read(t, c.path("DEL")); !strings.Contains(got, `"prevResult":{`) || strings.Contains(got, "runtimeConfig") || strings.Contains(got, "metadata") {
		t.Errorf("DEL got %s", got)
	}
	if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{}}`+"\n" {
		t.Errorf("state file %s", got)
	}
	c.up("none", `{}`, f)
	if got := read(t, c.path("ADD")); !strings.Contains(got, `"runtimeConfig":{"netOutRules":null,"portMappings":null}`) || strings.Contains(got, "metadata") {
		t.Errorf("ADD without anything got %s", got)
	}
	c.down("none")
}

// TestPorts: no port is given twice, nor one that a program of the host has, and what another container has cannot be asked for.
func TestPorts(t *testing.T) {
	c := newCell(t)
	c.alone(attached)
	c.adapter["total_ports"] = 6
	c.tool("sysctl", "-w", "net.ipv4.ip_local_port_range=61001 61002")
	c.listen(61000)
	_, f := c.container()
	netin := func(ports ...int) string {
		var list []string
		for _, p := range ports {
			list = append(list, fmt.Sprintf(`{"host_port":%d,"container_port":8080}`, p))
		}
		return `{"netin":[` + strings.Join(list, ",") + `]}`
	}
	give := func(handle string, want ...int) {
		t.Helper()
		var got []int
		for _, m := range c.up(handle, netin(make([]int, len(want))...), f).ports(t) {
			got = append(got, m.HostPort)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s got %v, want %v", handle, got, want)
		}
	}
	give("a", 61003, 61004) // 61000 has a listener, and the kernel may give 61001 and 61002 to programs
	if a := c.run("up", "b", netin(61004), f); !strings.Contains(a.stderr, "port 61004 is container a's") {
		t.Errorf("another's port: exit %d: %s", a.code, a.stderr)
	}
	give("a", 61003, 61004) // an up that is repeated
	give("b", 61005, 61001)
	c.up("c", netin(8080), f)
	if a := c.run("up", "d", netin(8080), f); !strings.Contains(a.stderr, "port 8080 is container c's") {
		t.Errorf("another's port outside of the pool: exit %d: %s", a.code, a.stderr)
	}
	if a := c.run("up", "d", netin(0, 0), f); a.stderr != "cell: allocating port: acquire port: port pool exhausted\n" {
		t.Errorf("too many: exit %d: %s", a.code, a.stderr)
	}
	give("d", 61002)
	c.down("a")
	give("e", 61003, 61004)
	for _, h := range []string{"b", "c", "d", "e"} {
		c.down(h)
	}
	if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{}}`+"\n" {
		t.Errorf("state file %s", got)
	}
}

// TestBrokenStateFile: one that is torn or empty neither keeps containers from starting nor forgets whose the ports are.
func TestBrokenStateFile(t *testing.T) {
	c := newCell(t)
	c.alone(attached)
	_, f := c.container()
	for name, text := range map[string]string{"torn": `{"acquired_ports":{"other":[61000`, "empty": "", "null": "null", "another form": `[1]`, "another type": `{"acquired_ports":{"x":"y"}}`} {
		c.write("state/ports.json", text)
		if got := c.up("h", `{"netin":[{"host_port":0,"container_port":1}]}`, f).ports(t)[0].HostPort; got != 61000 {
			t.Errorf("%s: port %d", name, got)
		}
		c.down("h")
		if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{}}`+"\n" {
			t.Errorf("%s: state file %s", name, got)
		}
		broken, _ := filepath.Glob(c.path("state/ports.json.broken-*"))
		if keeps := len(broken) == 1 && read(t, broken[0]) == text; keeps != (text != "" && text != "null") {
			t.Errorf("%s: kept %v", name, broken)
		}
		os.RemoveAll(c.path("state"))
	}
}

// TestPortsOutliveTheirFile: what the file has forgotten, the endpoints' records know.
func TestPortsOutliveTheirFile(t *testing.T) {
	c := newCell(t)
	const in = `{"netin":[{"host_port":0,"container_port":8080},{"host_port":7000,"container_port":22}]}`
	_, f := c.container()
	c.up("old", in, f)
	for name, text := range map[string]string{"torn": `{"acquired_ports":{"old":[610`, "empty": "", "another's": `{"acquired_ports":{}}` + "\n"} {
		c.write("state/ports.json", text)
		_, f := c.container()
		if got := c.up("new", `{"netin":[{"host_port":0,"container_port":8080}]}`, f).ports(t)[0].HostPort; got != 61001 {
			t.Errorf("%s: the next container got %d", name, got)
		}
		want := `{"acquired_ports":{"new":[61001],"old":[61000,7000]}}`
		if name == "another's" { // it is whole: what it says counts, beside what the records say
			want = `{"acquired_ports":{"new":[61001]}}`
		}
		if got := read(t, c.path("state/ports.json")); got != want+"\n" {
			t.Errorf("%s: state file %s", name, got)
		}
		c.down("new")
		if a := c.run("up", "new", `{"netin":[{"host_port":7000,"container_port":22}]}`, f); !strings.Contains(a.stderr, "port 7000 is container old's") {
			t.Errorf("%s: %+v", name, a)
		}
	}
	os.Remove(c.path("state/ports.json"))
	_, f2 := c.container()
	if got := c.up("new", `{"netin":[{"host_port":0,"container_port":8080}]}`, f2).ports(t)[0].HostPort; got != 61001 {
		t.Errorf("no file: the next container got %d", got)
	}
	c.down("new")
	c.down("old")
	if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{}}`+"\n" {
		t.Errorf("state file %s", got)
	}
}

// TestDownWaitsForUp: a down that comes while an up is at work lets it end, and then removes all of it; so does one that comes
// after an up was killed while its plugin goes on.
func TestDownWaitsForUp(t *testing.T) {
	c := newCell(t)
	_, f := c.container()
	c.plugin("next", `if [ $CNI_COMMAND = ADD ]; then touch `+c.dir+`/adding; sleep 1; fi; cat >/dev/null; echo '{"cniVersion":"1.0.0","ips":[{"address":"10.255.30.9/32"}]}'`)
	c.chain("next")
	c.up("first", `{}`, f)
	c.down("first")
	before := c.dump()
	for _, kill := range []bool{false, true} {
		os.Remove(c.path("adding"))
		cmd := c.command(`{}`, "--configFile="+c.path("adapter.json"), "--action", "up", "--handle", "h")
		cmd.ExtraFiles = []*os.File{f}
		c.start(cmd)
		testkit.Until(t, 20*time.Second, "the plugin does not run", func() bool { _, err := os.Stat(c.path("adding")); return err == nil })
		if kill {
			cmd.Process.Kill()
		}
		c.down("h")
		if err := cmd.Wait(); (err != nil) != kill {
			t.Errorf("killed %t: up ended with %v", kill, err)
		}
		if after := c.dump(); after != before {
			t.Errorf("killed %t: before:\n%s\nafter:\n%s", kill, before, after)
		}
	}
}

// TestSeveralConfigurations: which one counts is told.
func TestSeveralConfigurations(t *testing.T) {
	c := newCell(t)
	c.write("cni/05-other.conf", `{`)
	c.write("cni/20-other.conflist", `{`)
	_, f := c.container()
	a := c.run("up", "h", `{}`, f)
	if want := "cell: 3 CNI configurations in " + c.path("cni") + ": " + c.path("cni/10-silk.conflist") + " is used, the first .conflist or else the first .conf in lexical order\n"; a.code != 0 || a.stderr != want {
		t.Errorf("exit %d: %s", a.code, a.stderr)
	}
	c.down("h")
}
