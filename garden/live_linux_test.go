package garden_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// record returns the endpoint of a container.
func (c *cell) record(handle string) endpoint.Record {
	c.t.Helper()
	d, err := endpoint.Open(c.path("endpoints"))
	if err != nil {
		c.t.Fatal(err)
	}
	r, err := d.Lookup(endpoint.Key{Network: "silk", Container: handle, Interface: "eth0"})
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// answers reports who answers on a port of the host.
func (c *cell) answers(port int) string {
	var b []byte
	err := c.ns.Do(func() error {
		conn, err := net.DialTimeout("tcp4", fmt.Sprintf("127.0.0.1:%d", port), 20*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		b, err = io.ReadAll(conn)
		return err
	})
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// serve has a container answer on a port.
func (c *cell) serve(ns *kernel.NS, port int, word string) {
	c.t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port)); return err }); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, word)
			conn.Close()
		}
	}()
}

// TestNetIn: a container that lives gets one more port, by number or any, also when an earlier attempt was killed.
func TestNetIn(t *testing.T) {
	c := newCell(t)
	ns, f := c.container()
	_, f2 := c.container()
	c.up("first", `{"netin":[{"host_port":0,"container_port":8080}]}`, f)
	c.down("first")
	before := c.dump()
	c.up("h", `{"netin":[{"host_port":0,"container_port":8080}]}`, f)
	c.up("other", `{"netin":[{"host_port":7000,"container_port":8080}]}`, f2)
	c.serve(ns, 8080, "web")
	c.serve(ns, 2222, "ssh")
	netIn := func(host, inside int) answer {
		ip := c.record("h").Address()
		return c.run("net-in", "h", fmt.Sprintf(`{"HostIP":"10.0.16.15","HostPort":%d,"ContainerIP":"%v","ContainerPort":%d}`, host, ip, inside))
	}
	for _, r := range []struct {
		host, inside int
		want         string
	}{{0, 2222, `{"host_port":61001,"container_port":2222}`}, {9000, 2222, `{"host_port":9000,"container_port":2222}`}, {9000, 2222, `{"host_port":9000,"container_port":2222}`}, {8080, 0, `{"host_port":8080,"container_port":8080}`}} {
		if a := netIn(r.host, r.inside); a.code != 0 || a.stdout != r.want+"\n" || a.stderr != "" {
			t.Errorf("net-in %d to %d: %+v, want %s", r.host, r.inside, a, r.want)
		}
	}
	for port, want := range map[int]string{61000: "web", 61001: "ssh", 9000: "ssh", 8080: "web"} {
		if got := c.answers(port); got != want {
			t.Errorf("port %d answers %q, want %q", port, got, want)
		}
	}
	if got := len(c.record("h").PortMaps); got != 4 {
		t.Errorf("%d port maps are recorded", got)
	}
	if got := read(t, c.path("state/ports.json")); got != `{"acquired_ports":{"h":[61000,61001,9000,8080],"other":[7000]}}`+"\n" {
		t.Errorf("state file %s", got)
	}
	kept := c.dump()
	for _, r := range []struct {
		stdin, want string
	}{
		{`{"HostPort":7000,"ContainerPort":1}`, "allocating port: acquire port: port 7000 is container other's"},
		{`{"HostPort":9000,"ContainerPort":1}`, "allocating port: acquire port: port 9000 leads to the container already"},
		{fmt.Sprintf(`{"HostPort":%d,"ContainerPort":1}`, c.port), "a program of the host listens on it"},
		{`{"HostPort":70000,"ContainerPort":1}`, "port 70000: expected 1 to 65535, or 0 for any"},
		{`{"HostPort":1,"ContainerPort":70000}`, "container port 70000: expected 1 to 65535, or 0 for that of the host"},
		{`{"ContainerIP":"10.255.30.99"}`, `not "10.255.30.99"`},
		{`{`, "unexpected end of JSON input"},
	} {
		if a := c.run("net-in", "h", r.stdin); a.code != 1 || a.stdout != "" || !strings.Contains(a.stderr, r.want) {
			t.Errorf("%s: %+v, want %s", r.stdin, a, r.want)
		}
	}
	for _, action := range []string{"net-in", "net-out", "bulk-net-out"} {
		if a := c.run(action, "nobody", `{}`); a.code != 1 || !strings.Contains(a.stderr, "container nobody is not up") && !strings.Contains(a.stderr, "rule") {
			t.Errorf("%s of nobody: %+v", action, a)
		}
	}
	if after := c.dump(); after != kept {
		t.Errorf("what was refused left something:\n%s", difference(kept, after))
	}
	// An attempt was killed when the port was its and did not lead anywhere yet.
	c.write("state/ports.json", `{"acquired_ports":{"h":[61000,61001,9000,8080,9001,61002],"other":[7000]}}`+"\n")
	if a := netIn(9001, 8080); a.code != 0 {
		t.Errorf("the port of an attempt that was killed: %+v", a)
	}
	if a := netIn(0, 8080); !strings.Contains(a.stdout, `"host_port":61002`) {
		t.Errorf("the port of an attempt that was killed: %+v", a)
	}
	// And one was killed when the port was recorded, and the kernel did not have it yet.
	c.tool("nft", "delete element inet silk nat-ports { tcp . 9001 }")
	if a := netIn(9001, 8080); a.code != 0 || c.answers(9001) != "web" {
		t.Errorf("the recorded port of an attempt that was killed: %+v, it answers %q", a, c.answers(9001))
	}
	c.down("h")
	c.down("other")
	if after := c.dump(); after != before {
		t.Errorf("the host is another:\n%s", difference(before, after))
	}
}

// TestNetOut: a container that lives may reach more, which is recorded and which the policy agent is told.
func TestNetOut(t *testing.T) {
	c := newCell(t)
	asked := c.agent()
	_, f := c.container()
	a, b := `{"networks":[{"end":"10.0.0.2","start":"10.0.0.1"}],"ports":[{"end":81,"start":80}],"protocol":1}`, `{"icmps":{"code":0,"type":8},"log":true,"networks":[{"end":"10.0.0.2","start":"10.0.0.1"}],"protocol":3}`
	c.up("h", `{"netout_rules":[`+a+`]}`, f)
	asked.Store(0)
	want := func(step string, rules ...string) {
		t.Helper()
		if got := string(c.record("h").NetOut); got != "["+strings.Join(rules, ",")+"]" {
			t.Errorf("%s: recorded are %s", step, got)
		}
	}
	want("up", a)
	ip := c.record("h").Address().String()
	if r := c.run("net-out", "h", `{"container_ip":"`+ip+`","netout_rule":`+b+`}`); r.code != 0 || r.stdout != "" || r.stderr != "" {
		t.Errorf("net-out: %+v", r)
	}
	want("net-out", a, b)
	d := strings.Replace(a, "80", "79", 1)
	if r := c.run("bulk-net-out", "h", `{"container_ip":"`+ip+`","netout_rules":[{"protocol":1,"networks":[{"start":"10.0.0.1","end":"10.0.0.2"}],"ports":[{"start":80,"end":81}]},`+d+`]}`); r.code != 0 || r.stdout != "" || r.stderr != "" {
		t.Errorf("bulk-net-out: %+v", r)
	}
	want("bulk-net-out", a, b, d)
	if r := c.run("bulk-net-out", "h", `{"container_ip":"`+ip+`","netout_rules":null}`); r.code != 0 {
		t.Errorf("bulk-net-out of nothing: %+v", r)
	}
	if asked.Load() != 2 {
		t.Errorf("the agent was told %d times", asked.Load())
	}
	for _, bad := range []string{`{"netout_rule":{"protocol":9,"networks":[{"start":"10.0.0.1","end":"10.0.0.2"}]}}`, `{"netout_rule":{"protocol":1,"networks":[{"start":"10.0.0.1","end":"10.0.0.2"}]}}`, `{}`} {
		if r := c.run("net-out", "h", bad); r.code != 1 || !strings.Contains(r.stderr, "netout rules: rule 1: ") {
			t.Errorf("net-out %s: %+v", bad, r)
		}
	}
	want("refused", a, b, d)
	c.down("h")

	c.up("none", `{}`, f)
	if got := c.record("none").NetOut; got != nil {
		t.Errorf("nobody gave rules, recorded are %s", got)
	}
	asked.Store(-1) // it answers that it cannot
	if r := c.run("net-out", "none", `{"netout_rule":`+a+`}`); r.code != 0 || !strings.Contains(r.stderr, "the rules are recorded, and count when vxlan-policy-agent comes to them: status 500: no") {
		t.Errorf("net-out without the agent: %+v", r)
	}
	if got := string(c.record("none").NetOut); got != "["+a+"]" {
		t.Errorf("recorded are %s", got)
	}
	c.down("none")
}

// agent stands where the policy agent listens, and counts what it is asked; -1 makes it refuse.
func (c *cell) agent() *atomic.Int64 {
	c.t.Helper()
	asked := new(atomic.Int64)
	var l net.Listener
	if err := c.ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		c.t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Load() < 0 {
			http.Error(w, "no", 500)
			return
		}
		asked.Add(1)
	})}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	c.t.Cleanup(func() { s.Close(); <-done })
	c.tool("nft", "add table inet silk-policy; add chain inet silk-policy forward { type filter hook forward priority 0; }; add chain inet silk-policy input { type filter hook input priority 0; }; add rule inet silk-policy forward accept; add rule inet silk-policy input accept")
	var list struct {
		CNIVersion string           `json:"cniVersion"`
		Name       string           `json:"name"`
		Plugins    []map[string]any `json:"plugins"`
	}
	b, err := os.ReadFile(c.path("cni/10-silk.conflist"))
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err == nil {
		list.Plugins[0]["policy_agent_force_poll_address"] = l.Addr().String()
		b, err = json.Marshal(list)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.write("cni/10-silk.conflist", string(b))
	return asked
}
