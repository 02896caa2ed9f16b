package policyagent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// flowLine is a line of the flow log.
type flowLine struct {
	Event, Verdict, Scope, Reason string
	Packet                        struct {
		Direction      string
		Allowed        bool
		Src            netip.Addr `json:"src_ip"`
		Dst            netip.Addr `json:"dst_ip"`
		SourcePort     uint16     `json:"src_port"`
		Port           uint16     `json:"dst_port"`
		Protocol, Mark string
		Type           int `json:"icmp_type"`
	}
	Source, Destination struct {
		Container string `json:"container_id"`
		Group     string
		HostIP    string `json:"host_ip"`
	}
	Duration       float64 `json:"duration_seconds"`
	Sent, Received flow.Traffic
	EndUnknown     bool `json:"end_unknown"`
}

// String is what tells lines of a test apart.
func (l flowLine) String() string {
	return fmt.Sprintf("%s %s %s %s->%s :%d %s", l.Event, l.Verdict, l.Packet.Protocol, l.Source.Group, l.Destination.Group, l.Packet.Port, l.Reason)
}

// logged is a world with a log of flows in a file.
type logged struct {
	*world
	*running
	path     string
	web, api *member
}

func newLogged(t *testing.T, change ...func(*Config)) *logged {
	t.Helper()
	_, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	l := &logged{world: newWorld(t), path: filepath.Join(t.TempDir(), "flows.log")}
	feed := l.policies()
	l.running = l.world.start(feed, append([]func(*Config){func(c *Config) {
		c.C2CLogging, c.DeniedLogs, c.UDPLogs = true, 1000, 1000
		c.FlowLog.File = l.path
	}}, change...)...)
	l.web, l.api = l.attach("web"), l.attach("api")
	l.allow(l.running, tcpPolicy("web", "api", 8080), policy.Policy{Source: "web", Destination: "api", Protocol: policy.UDP, Ports: policy.Ports{First: 9000, Last: 9010}})
	if l.cfg.C2CLogging {
		l.logs(true)
	}
	return l
}

// logs waits until the kernel logs, or does not any more.
func (l *logged) logs(on bool) {
	l.world.t.Helper()
	eventually(l.world.t, "the rules log as they should", flowPatience, func() bool { return hasText(l.table(), `log prefix "silk ok c2c "`) == on })
}

// flowPatience bounds the wait for what is logged, which no test measures.
const flowPatience = 20 * time.Second

// end makes the kernel forget all connections, once the log has heard of so many that began: an end that overtakes its beginning is lost but for some.
func (l *logged) end(open int) {
	l.world.t.Helper()
	l.waits(open)
	l.onHost("conntrack -F 2>&1")
}

// waits until the ends of so many connections are waited for.
func (l *logged) waits(open int) {
	l.world.t.Helper()
	n := 0
	eventually(l.world.t, fmt.Sprintf("%d ends are waited for", open), flowPatience, func() bool { _, n = l.flows.state(); return n == open })
}

// read returns what is in the file.
func (l *logged) read() (out []flowLine) {
	l.world.t.Helper()
	b, _ := os.ReadFile(l.path)
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		var x flowLine
		if err := json.Unmarshal([]byte(line), &x); err != nil {
			l.world.t.Fatalf("%v: %s", err, line)
		}
		out = append(out, x)
	}
	return out
}

// lines returns what is in the file once there are so many lines, and a while later, in which no more should have come.
func (l *logged) lines(want int) []flowLine {
	l.world.t.Helper()
	deadline := time.Now().Add(flowPatience)
	eventually(l.world.t, fmt.Sprintf("%d lines", want), flowPatience+time.Second, func() bool { return len(l.read()) >= want || time.Now().After(deadline) })
	reconcile.Sleep(l.world.t.Context(), time.Second)
	out := l.read()
	if len(out) != want {
		l.world.t.Fatalf("%d lines, want %d:\n%s", len(out), want, texts(out))
	}
	return out
}

func texts(lines []flowLine) string {
	var s []string
	for _, l := range lines {
		s = append(s, l.String())
	}
	slices.Sort(s)
	return strings.Join(s, "\n")
}

// udp sends n datagrams to a port, each from another.
func (m *member) udp(to netip.Addr, port, n int) {
	m.w.t.Helper()
	if err := m.ns.Do(func() error {
		for range n {
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, uint16(port))))
			if err != nil {
				return err
			}
			c.Write([]byte("hello"))
			c.Close()
		}
		return nil
	}); err != nil {
		m.w.t.Fatal(err)
	}
}

// ping sends an echo request.
func (m *member) ping(to netip.Addr) {
	m.w.t.Helper()
	if err := m.ns.Do(func() error {
		c, err := net.Dial("ip4:icmp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte{8, 0, 0xf7, 0xf0, 0, 7, 0, 8})
		return err
	}); err != nil {
		m.w.t.Fatal(err)
	}
}

// TestFlowLog: each connection makes one line, which says who, whether and why, and what it has carried.
func TestFlowLog(t *testing.T) {
	l := newLogged(t)
	l.api.listen(8080)
	for range 3 {
		if !l.web.reaches(l.api, 8080) {
			t.Fatal("web does not reach api")
		}
	}
	for range 2 {
		if l.web.reaches(l.api, 8081) || l.api.reaches(l.web, 8080) {
			t.Fatal("what no policy allows is not refused")
		}
	}
	l.web.udp(l.api.address, 9003, 2)
	l.web.udp(l.api.address, 9011, 2)
	l.web.ping(l.api.address)
	l.web.udp(netip.MustParseAddr("169.254.0.1"), 53, 1)
	l.end(3 + 2)
	lines := l.lines(3 + 2 + 2 + 2 + 2 + 1 + 1)
	want := strings.Join([]string{
		"denied denied ICMP web->api :0 no policy web -> api icmp",
		"denied denied TCP api->web :8080 no policy api -> web tcp 8080",
		"denied denied TCP api->web :8080 no policy api -> web tcp 8080",
		"denied denied TCP web->api :8081 no policy web -> api tcp 8081",
		"denied denied TCP web->api :8081 no policy web -> api tcp 8081",
		"denied denied UDP web-> :53 no service of the host that containers may reach",
		"denied denied UDP web->api :9011 no policy web -> api udp 9011",
		"denied denied UDP web->api :9011 no policy web -> api udp 9011",
		"ended accepted TCP web->api :8080 policy web -> api tcp 8080",
		"ended accepted TCP web->api :8080 policy web -> api tcp 8080",
		"ended accepted TCP web->api :8080 policy web -> api tcp 8080",
		"ended accepted UDP web->api :9003 policy web -> api udp 9000-9010",
		"ended accepted UDP web->api :9003 policy web -> api udp 9000-9010",
	}, "\n")
	if got := texts(lines); got != want {
		t.Errorf("lines:\n%s\nwant:\n%s", got, want)
	}
	for _, x := range lines {
		if x.Source.Container != l.web.key.Container && x.Source.Container != l.api.key.Container || x.Source.HostIP != "10.0.0.1" || x.Packet.Src != l.web.address && x.Packet.Src != l.api.address {
			t.Errorf("source: %+v", x)
		}
		if x.Event == "ended" && (x.EndUnknown || x.Sent.Packets == 0 || x.Sent.Bytes == 0 || x.Duration > 5 || x.Packet.Mark != "0x1" && x.Packet.Mark != "0x2") {
			t.Errorf("end: %+v", x)
		}
		if x.Packet.Protocol == "TCP" && x.Event == "ended" && (x.Received.Packets == 0 || x.Sent.Bytes > 1000) {
			t.Errorf("end: %+v", x)
		}
	}
}

// TestFlowLogSwitch: the log is switched while connections stand, by the deployed switch, and they stay.
func TestFlowLogSwitch(t *testing.T) {
	l := newLogged(t, func(c *Config) { c.C2CLogging = false })
	l.api.listen(8080)
	c, err := l.web.dial(l.api, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	put := func(path, body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+l.cfg.debugAddress()+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		b.ReadFrom(resp.Body)
		return fmt.Sprint(resp.StatusCode, " ", strings.TrimSpace(b.String()))
	}
	for i := range 3 {
		if got := put("/iptables-c2c-logging", `{"enabled":true}`); got != `200 {"enabled":true}` {
			t.Fatal(got)
		}
		l.logs(true)
		if !echoes(c) {
			t.Fatal("the connection was cut when the log was switched on")
		}
		l.web.udp(l.api.address, 9011, 1)
		l.lines(i + 1)
		if got := put("/flow-log", `{"c2c":false}`); got != `200 {"c2c":false,"egress":false}` {
			t.Fatal(got)
		}
		l.logs(false)
		if !echoes(c) {
			t.Fatal("the connection was cut when the log was switched off")
		}
		l.web.udp(l.api.address, 9011, 1)
	}
	l.lines(3)
	for body, want := range map[string]string{`{`: "400", `{"c2x":true}`: "400", `{"c2c":1}`: "400"} {
		if got := put("/flow-log", body); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s", body, got)
		}
	}
}

// TestFlowLogLimits: who sends much that is refused makes few lines, of its own share; the rest is counted, and others' lines and traffic are as before.
func TestFlowLogLimits(t *testing.T) {
	l := newLogged(t, func(c *Config) { c.DeniedLogs, c.UDPLogs = 2, 3 })
	l.api.listen(8080)
	began := time.Now()
	for range 10 {
		l.web.udp(l.api.address, 9011, 100)
	}
	l.web.udp(l.api.address, 9001, 50)
	l.api.udp(l.web.address, 9011, 1) // another container's share
	if !l.web.reaches(l.api, 8080) {
		t.Fatal("web does not reach api beside the flood")
	}
	eventually(t, "the log has heard of what it is told", flowPatience, func() bool { _, open := l.flows.state(); return open >= 3+1 })
	took := int(time.Since(began).Seconds()) + 1
	l.onHost("conntrack -F 2>&1")
	eventually(t, "the lines of connections that ended", flowPatience, func() bool {
		b, _ := os.ReadFile(l.path)
		return bytes.Contains(b, []byte(`"dst_port":8080`)) && bytes.Contains(b, []byte("api -> web")) && bytes.Count(b, []byte(`udp 9000-9010`)) >= 3
	})
	b, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte(`no policy web -> api`)); n < 2 || n > 2+2*took {
		t.Errorf("%d lines about refusals in %d s at 2 a second", n, took)
	}
	if n := bytes.Count(b, []byte(`udp 9000-9010`)); n < 3 || n > 3+3*took {
		t.Errorf("%d lines about udp in %d s at 3 a second", n, took)
	}
	_, text := l.get(l.cfg.debugAddress(), "/metrics")
	var unlogged int
	for line := range strings.Lines(text) {
		fmt.Sscanf(line, "silk_policy_agent_flow_unlogged_packets_total %d", &unlogged)
	}
	if unlogged < 1000+50-2-3-5*took || unlogged > 1050 {
		t.Errorf("%d packets counted as not logged", unlogged)
	}
}

// TestFlowLogNeedsNobody: with the agent gone, and its rules still logging, packets pass; the next agent goes on, with the ends of what began before too.
func TestFlowLogNeedsNobody(t *testing.T) {
	l := newLogged(t)
	l.api.listen(8080)
	c, err := l.web.dial(l.api, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l.stop()
	if !hasText(l.table(), "log prefix") || !echoes(c) || !l.web.reaches(l.api, 8080) {
		t.Error("without the agent connections fail")
	}
	feed := l.store
	l.running = l.world.start(feed, func(c *Config) { c.C2CLogging, c.DeniedLogs, c.UDPLogs, c.FlowLog.File = true, 1000, 1000, l.path })
	eventually(t, "the log hears", flowPatience, func() bool { l.flows.mu.Lock(); defer l.flows.mu.Unlock(); return l.flows.hearing })
	if status, text := l.force("/force-policy-poll-cycle"); status != http.StatusOK { // a pass that knows of it
		t.Fatal(status, text)
	}
	l.logs(true)
	next, err := l.web.dial(l.api, 8080)
	if err != nil {
		t.Fatalf("with the next agent connections fail: %v", err)
	}
	defer next.Close()
	l.end(1) // what began before is not among those that the next agent waits for
	// What began while nobody listened may have an end to hear of or not: that is up to the kernel.
	port := func(c net.Conn) uint16 { return c.LocalAddr().(*net.TCPAddr).AddrPort().Port() }
	eventually(t, "the ends of the connections that began while an agent was there", flowPatience, func() bool {
		told := map[uint16]int{}
		for _, x := range l.read() {
			if got := x.String(); got != "ended accepted TCP web->api :8080 policy web -> api tcp 8080" {
				t.Fatal(got)
			}
			told[x.Packet.SourcePort]++
		}
		return told[port(c)] == 1 && told[port(next)] == 1
	})
}

// TestFlowLogWithoutPolicies: where everything is allowed each connection makes a line too, also of icmp.
func TestFlowLogWithoutPolicies(t *testing.T) {
	l := newLogged(t, func(c *Config) { c.Open = true })
	l.api.listen(8085)
	if !l.web.reaches(l.api, 8085) {
		t.Fatal("web does not reach api")
	}
	l.web.ping(l.api.address)
	l.end(2)
	lines := l.lines(2)
	const why = "disable_container_network_policy: everything between containers is allowed"
	if got, want := texts(lines), "ended accepted ICMP web->api :0 "+why+"\nended accepted TCP web->api :8085 "+why; got != want {
		t.Errorf("lines:\n%s\nwant:\n%s", got, want)
	}
	for _, x := range lines {
		if x.Sent.Packets == 0 || x.Received.Packets == 0 || x.Packet.Protocol == "ICMP" && x.Packet.Type != 8 {
			t.Errorf("%+v", x)
		}
	}
}

// TestFlowLogGivesUpWhatTheKernelForgot: a connection whose end was missed has a line that says so, and others are waited for.
func TestFlowLogGivesUpWhatTheKernelForgot(t *testing.T) {
	l := newLogged(t)
	l.api.listen(8080)
	c, err := l.web.dial(l.api, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l.waits(1)
	l.flows.mu.Lock()
	l.flows.join.Packet(flow.Logged{Time: wall().Add(-time.Minute), Verdict: flow.Accepted, Scope: flow.C2C, Mark: 1, Packet: flow.Packet{
		Protocol: 6, Source: netip.AddrPortFrom(l.web.address, 1), Destination: netip.AddrPortFrom(l.api.address, 8080)}}, l.flows.emit)
	l.flows.mu.Unlock()
	for range 3 {
		if err := l.flows.retain(); err != nil {
			t.Fatal(err)
		}
	}
	if lines := l.lines(1); !lines[0].EndUnknown || lines[0].Packet.SourcePort != 1 {
		t.Errorf("%+v", lines[0])
	}
	l.end(1)
	if lines := l.lines(2); lines[1].EndUnknown || lines[1].Packet.Port != 8080 {
		t.Errorf("%+v", lines[1])
	}
}

// TestFlowSysctls: what the log changes in the kernel is in the record that silk-teardown restores.
func TestFlowSysctls(t *testing.T) {
	keys := []string{"net/netfilter/nf_conntrack_acct", "net/netfilter/nf_conntrack_timestamp"}
	values := func(w *world) map[string]string {
		out := map[string]string{}
		if err := w.ns.Do(func() error {
			for _, k := range keys {
				v, err := kernel.Sysctl(k)
				if err != nil {
					return err
				}
				out[k] = v
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	w := newWorld(t)
	before := values(w)
	l := newLogged(t, func(c *Config) {})
	if got := values(l.world); got[keys[0]] != "1" || got[keys[1]] != "1" {
		t.Errorf("while the log is on: %v", got)
	}
	l.stop()
	if err := l.ns.Do(func() error { return l.dir.Sysctls().Restore() }); err != nil {
		t.Fatal(err)
	}
	if got := values(l.world); !maps.Equal(got, before) {
		t.Errorf("restored: %v, before %v", got, before)
	}
}
