package garden_test

import (
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"
)

// TestErrors: what Garden's operators know of failures, each as one line on stderr, nothing on stdout, exit status 1.
func TestErrors(t *testing.T) {
	c := newCell(t)
	ok := "--configFile=" + c.path("adapter.json")
	without := func(key string) func() { return func() { delete(c.adapter, key) } }
	rows := []struct {
		name  string
		args  []string
		stdin string
		as    func()
		want  string
	}{
		{name: "no args", want: "cfnetworking: this is a plugin for Garden-runC.  Don't run it directly."},
		{name: "help", args: []string{"-h"}, want: "cfnetworking: this is a plugin for Garden-runC.  Don't run it directly."},
		{name: "long help", args: []string{"--help"}, want: "cfnetworking: this is a plugin for Garden-runC.  Don't run it directly."},
		{name: "unknown flag", args: []string{"-x"}, want: "cfnetworking: parse args: flag provided but not defined: -x"},
		{name: "no config", args: []string{"--action", "up", "--handle", "h"}, want: "cfnetworking: parse args: missing required flag 'configFile'"},
		{name: "absent config", args: []string{"--configFile", "/nowhere/a.json"}, want: "cfnetworking: parse args: file does not exist: /nowhere/a.json"},
		{name: "unreadable config", args: []string{"--configFile", c.dir}, want: "cfnetworking: parse args: reading config file: read " + c.dir + ": is a directory"},
		{name: "bad config", args: []string{"--configFile", c.path("bad.json")}, want: "cfnetworking: parse args: parsing config (" + c.path("bad.json") + "): unexpected end of JSON input"},
		{name: "cni_plugin_dir", args: []string{ok}, as: without("cni_plugin_dir"), want: "cfnetworking: parse args: missing required config 'cni_plugin_dir'"},
		{name: "cni_config_dir", args: []string{ok}, as: without("cni_config_dir"), want: "cfnetworking: parse args: missing required config 'cni_config_dir'"},
		{name: "bind_mount_dir", args: []string{ok}, as: without("bind_mount_dir"), want: "cfnetworking: parse args: missing required config 'bind_mount_dir'"},
		{name: "state_file", args: []string{ok}, as: without("state_file"), want: "cfnetworking: parse args: missing required config 'state_file'"},
		{name: "start_port", args: []string{ok}, as: without("start_port"), want: "cfnetworking: parse args: missing required config 'start_port'"},
		{name: "total_ports", args: []string{ok}, as: without("total_ports"), want: "cfnetworking: parse args: missing required config 'total_ports'"},
		{name: "log_prefix", args: []string{ok}, as: without("log_prefix"), want: "cfnetworking: parse args: missing required config 'log_prefix'"},
		{name: "iptables_lock_file", args: []string{ok}, as: without("iptables_lock_file"), want: "cfnetworking: parse args: missing required config 'iptables_lock_file'"},
		{name: "proxy_port", args: []string{ok}, as: without("proxy_port"), want: "cfnetworking: parse args: missing required config 'proxy_port'"},
		{name: "proxy_uid", args: []string{ok}, as: without("proxy_uid"), want: "cfnetworking: parse args: missing required config 'proxy_uid'"},
		{name: "range", args: []string{ok}, as: func() { c.adapter["start_port"] = 65536 }, want: "cfnetworking: parse args: invalid config 'start_port' 65536, 'total_ports' 5000: expected ports from 1 to 65535"},
		{name: "stray", args: []string{ok, "x"}, want: "cfnetworking: parse args: unexpected extra args: [x]"},
		{name: "no handle", args: []string{ok}, want: "cfnetworking: parse args: missing required flag 'handle'"},
		{name: "no action", args: []string{ok, "--handle", "h"}, want: "cfnetworking: parse args: missing required flag 'action'"},
		{name: "other action", args: []string{ok, "--handle", "h", "--action", "sideways"}, want: "cell: unrecognized action: sideways"},
		{name: "bad handle", args: []string{ok, "--handle", "../h", "--action", "up"}, want: `cell: handle "../h": expected letters, digits and . _ - after the first`},
		{name: "bad stdin", args: []string{"--action", "up", "--handle", "h", ok}, stdin: "{", want: "cell: unexpected end of JSON input"},
		{name: "no CNI directory", args: []string{ok, "--handle", "h", "--action", "up"}, stdin: "{}", as: func() { c.adapter["cni_config_dir"] = c.path("gone") },
			want: "cell: load cni config: error loading config: lstat " + c.path("gone") + ": no such file or directory"},
		{name: "bad CNI file", args: []string{ok, "--handle", "h", "--action", "up"}, stdin: "{}", as: func() { c.adapter["cni_config_dir"] = c.path("badcni") },
			want: "cell: load cni config: unable to load config from " + c.path("badcni", "a.conflist") + ": error parsing configuration list: unexpected end of JSON input"},
		{name: "empty CNI directory", args: []string{ok, "--handle", "h", "--action", "up"}, stdin: "{}", as: func() { c.adapter["cni_config_dir"] = c.path("empty") },
			want: "cell: cni up failed: no ip allocated"},
		{name: "no namespace", args: []string{ok, "--handle", "h", "--action", "up"}, stdin: `{"Pid":0}`,
			want: "cell: failed mounting /proc/self/fd/3 to " + c.path("netns", "h") + ": "},
		{name: "no process", args: []string{ok, "--handle", "h", "--action", "up"}, stdin: `{"Pid":4194305}`,
			want: "cell: failed mounting /proc/4194305/ns/net to " + c.path("netns", "h") + ": "},
	}
	c.write("bad.json", "")
	c.write("badcni/a.conflist", "")
	if err := os.Mkdir(c.path("empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := c.dump()
	usual := c.adapter
	for _, r := range rows {
		c.adapter = maps.Clone(usual)
		if r.as != nil {
			r.as()
		}
		a := c.finish(c.command(r.stdin, r.args...))
		line, more := strings.CutSuffix(a.stderr, "\n")
		if a.code != 1 || a.stdout != "" || !more || strings.Contains(line, "\n") || line != r.want && !(strings.HasSuffix(r.want, ": ") && strings.HasPrefix(line, r.want)) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want %q", r.name, a.code, a.stdout, a.stderr, r.want)
		}
		if after := c.dump(); after != before {
			t.Fatalf("%s: before:\n%s\nafter:\n%s", r.name, before, after)
		}
	}
}

// TestUpAndDown: the shape of what Garden gets, the namespace by a process and by file descriptor 3, keys in any case.
func TestUpAndDown(t *testing.T) {
	c := newCell(t)
	c.adapter["search_domains"] = []string{"apps.internal"}
	ns, f := c.container()
	c.up("first", `{"Pid":0}`, f) // what stays on a host is there from here on
	c.down("first")
	before := c.dump()

	a := c.run("up", "h-1", `{"Pid":0,"Properties":{"policy_group_id":"group-1","ports":"8080"}}`, f)
	want := `{"properties":{"garden.network.container-ip":"10.255.30.3","garden.network.host-ip":"255.255.255.255","garden.network.mapped-ports":"[]","garden.network.interface":"eth0"},"search_domains":["apps.internal"]}` + "\n"
	if a.code != 0 || a.stdout != want {
		t.Errorf("up: exit %d, %s\n got %s\nwant %s", a.code, a.stderr, a.stdout, want)
	}
	if r := dumpFiles(t, c.path("endpoints")); !strings.Contains(r, `\"policy_group\":\"group-1\"`) || !strings.Contains(r, `\"metadata\":{\"policy_group_id\":\"group-1\",\"ports\":\"8080\"}`) {
		t.Errorf("record %s", r)
	}
	if got := dumpFiles(t, c.path("cache")); !strings.Contains(got, "silk-h-1-eth0") {
		t.Errorf("libcni's cache: %s", got)
	}
	if again := c.run("up", "h-1", `{"pid":0,"properties":{"policy_group_id":"group-1","ports":"8080"}}`, f); again.stdout != want {
		t.Errorf("the same up again: exit %d: %s%s", again.code, again.stdout, again.stderr)
	}
	c.down("h-1")
	if after := c.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}

	var pid int
	if err := ns.Do(func() error {
		cmd := sleeper()
		if err := cmd.Start(); err != nil {
			return err
		}
		pid = cmd.Process.Pid
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	c.write("cni/10-silk.conflist", strings.Replace(read(t, c.path("cni/10-silk.conflist")), `"type":"silk-cni"`, `"type":"silk-cni","advertise":{"group":true},"tls":[{}],"dns":{"nameservers":["169.254.0.2"]}`, 1))
	if got := c.run("up", "h-3", `{"Pid":0,"Properties":{"policy_group_id":"group-1"}}`, f); !strings.Contains(got.stdout, `"dns_servers":["169.254.0.2"]`) {
		t.Errorf("up with names and a resolver: %+v", got)
	}
	if r := dumpFiles(t, c.path("endpoints")); !strings.Contains(r, `\"advertise\":{\"names\":[\"group-1.apps.internal\"]},\"tls\":[{\"listen\":61443,\"forward\":8080}]`) {
		t.Errorf("record %s", r)
	}
	c.down("h-3")
	if got := c.up("h-2", fmt.Sprintf(`{"Pid":%d,"Properties":{}}`, pid)).Properties["garden.network.container-ip"]; got != "10.255.30.5" {
		t.Errorf("address %s", got)
	}
	c.down("h-2")
	c.down("h-2")
	if after := c.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestDownNeedsNothing: a container can be got rid of whatever is missing or broken.
func TestDownNeedsNothing(t *testing.T) {
	c := newCell(t)
	c.down("never-there")
	c.down("../../etc/passwd")
	_, f := c.container()
	c.up("first", `{}`, f)
	c.down("first")
	before := c.dump()
	usual := maps.Clone(c.adapter)
	list := read(t, c.path("cni/10-silk.conflist"))
	for name, damage := range map[string]func(){
		"no namespace":          func() { kernelUnbind(c.path("netns", "h")) },
		"plain file":            func() { kernelUnbind(c.path("netns", "h")); c.write("netns/h", "") },
		"no CNI directory":      func() { os.RemoveAll(c.path("cni")) },
		"empty CNI directory":   func() { os.Remove(c.path("cni/10-silk.conflist")) },
		"garbage CNI":           func() { c.write("cni/10-silk.conflist", "{") },
		"another CNI network":   func() { c.write("cni/10-silk.conflist", strings.Replace(list, `"silk"`, `"other"`, 1)) },
		"no cache":              func() { os.RemoveAll(c.path("cache")) },
		"garbage cache":         func() { c.write("cache/results/silk-h-eth0", "{") },
		"garbage in state file": func() { c.write("state/ports.json", `{"acquired_ports":{"h":[61`) },
		"no state file":         func() { os.Remove(c.path("state/ports.json")) },
	} {
		t.Run(name, func(t *testing.T) {
			_, f := c.container()
			c.up("h", `{}`, f)
			damage()
			c.down("h")
			c.down("h")
			c.adapter = maps.Clone(usual)
			c.write("cni/10-silk.conflist", list)
			os.RemoveAll(c.path("state"))
			os.RemoveAll(c.path("cache"))
			if after := c.dump(); withoutFiles(after) != withoutFiles(before) {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// withoutFiles leaves out what a test broke itself.
func withoutFiles(dump string) string {
	var out strings.Builder
	for line := range strings.Lines(dump) {
		if !strings.Contains(line, "/cache/") && !strings.Contains(line, "/state/") {
			out.WriteString(line)
		}
	}
	return out.String()
}
