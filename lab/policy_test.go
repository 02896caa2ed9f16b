package lab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lab"
)

// policed builds a lab in which policy is required and waits until every host enforces it.
func policed(t *testing.T, o lab.Options) (*lab.Lab, lab.Status) {
	t.Helper()
	o.Policy = lab.PolicyRequired
	l := up(t, o)
	return l, whole(t, l)
}

// silkPolicy runs silk policy as the lab's admin and returns its output.
func silkPolicy(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	out, err := l.Output(t.Context(), "policy-server", append([]string{"silk", "policy"}, args...)...)
	if err != nil {
		t.Fatalf("silk policy %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// allow makes a policy and returns when every host has it in its kernel.
func allow(t *testing.T, l *lab.Lab, args ...string) {
	t.Helper()
	if out := silkPolicy(t, l, append([]string{"add", "--wait"}, args...)...); !strings.Contains(out, "in force on ") {
		t.Fatalf("silk policy add %q: %s", args, out)
	}
}

func forbid(t *testing.T, l *lab.Lab, args ...string) {
	t.Helper()
	silkPolicy(t, l, append([]string{"remove", "--wait"}, args...)...)
}

// pair is a source and a destination group.
type pair [2]string

// opens reports whether the paths of a status are those that pairs allow, and the rest are denied.
func opens(s lab.Status, pairs ...pair) bool {
	n := len(s.Containers)
	for _, p := range s.Paths {
		want := false
		for _, a := range pairs {
			want = want || s.Group(p.From) == a[0] && s.Group(p.To) == a[1]
		}
		if p.OK != want || p.Deny == want {
			return false
		}
	}
	return len(s.Paths) == n*(n-1)
}

// exactly waits until the paths are those that pairs allow.
func exactly(t *testing.T, l *lab.Lab, when string, pairs ...pair) lab.Status {
	t.Helper()
	return eventually(t, l, when, func(s lab.Status) bool { return opens(s, pairs...) })
}

func TestAPolicyOpensAndItsRemovalCuts(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	if !opens(s) {
		t.Fatalf("something is open without a policy\n%s", table(s))
	}
	allow(t, l, "web", "api")
	for _, to := range []string{"c2", "c4"} { // the first attempt after add --wait
		if err := connect(t, s, "c1", to, lab.HTTPPort); err != nil {
			t.Errorf("after add --wait: c1 to %s: %v", to, err)
		}
	}
	if s, err := l.Status(t.Context()); err != nil || !opens(s, pair{"web", "api"}) { // whole means that hosts reach each other, though no packet had to go before
		t.Errorf("the first look after add --wait: %v\n%s", err, table(s))
	}
	echoPort := strconv.Itoa(lab.EchoPort)
	allow(t, l, "web", "api", "--ports", echoPort)
	allow(t, l, "api", "web", "--ports", echoPort)
	near, far, other := dialEcho(t, s, "c1", "c2"), dialEcho(t, s, "c1", "c4"), dialEcho(t, s, "c4", "c1")
	for _, e := range []*echo{near, far, other} {
		e.check(t, "allowed")
	}
	forbid(t, l, "web", "api", "--ports", echoPort)
	near.mustEnd(t, "to a container of the same host, whose policy was removed")
	far.mustEnd(t, "to a container of another host, whose policy was removed")
	other.check(t, "between the same hosts, by a policy that stays")
	exactly(t, l, "the other policy stays", pair{"web", "api"})
	forbid(t, l, "web", "api")
	exactly(t, l, "all are removed")
}

// connect makes a connection from one container to a port of another one, once.
func connect(t *testing.T, s lab.Status, from, to string, port int) error {
	t.Helper()
	return nsOf(t, container(t, s, from).Responder.PID).Do(func() error {
		c, err := net.DialTimeout("tcp4", net.JoinHostPort(container(t, s, to).Address.String(), strconv.Itoa(port)), 5*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// mustEnd sends until the connection ends, which it must within a second.
func (e *echo) mustEnd(t *testing.T, what string) {
	t.Helper()
	e.c.SetDeadline(time.Now().Add(time.Second))
	for {
		if _, err := e.c.Write([]byte("still there?\n")); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		line, err := e.r.ReadString('\n')
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			if e.silent(t) {
				return
			}
			t.Fatalf("the connection %s: still there after a second", what)
		}
		_ = line
	}
}

// silent reports whether nothing comes back on the connection any more: it is refused where it cannot be reset.
func (e *echo) silent(t *testing.T) bool {
	t.Helper()
	e.c.SetDeadline(time.Now().Add(500 * time.Millisecond))
	e.c.Write([]byte("now?\n"))
	_, err := e.r.ReadString('\n')
	return err != nil
}

// answers waits until policy-server does.
func answers(t *testing.T, l *lab.Lab) {
	t.Helper()
	await(t, "policy-server answers", func() error {
		_, err := l.Output(t.Context(), "policy-server", "silk", "policy", "list")
		return err
	})
}

func TestPolicyHoldsWhileItsPartsAreAway(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	e := dialEcho(t, s, "c1", "c4")
	holds := func(when string) {
		t.Helper()
		e.check(t, when)
		exactly(t, l, when, pair{"web", "api"})
	}
	for _, away := range []struct{ program, role string }{
		{"vxlan-policy-agent", "host1/vxlan-policy-agent"}, {"vxlan-policy-agent", "host2/vxlan-policy-agent"}, {"policy-server", "policy-server"},
		{"silk-controller", "controller"}, {"silk-daemon", "host2/silk-daemon"},
	} {
		restore := hide(t, l, away.program)
		do(t, l.Kill(t.Context(), away.role))
		holds(away.role + " is away")
		restore()
		answers(t, l)
		eventually(t, l, away.role+" is back", func(s lab.Status) bool { return s.Whole() && program(t, s, away.role).PID != 0 })
		holds(away.role + " is back")
		allow(t, l, "api", "web") // a change takes effect again
		exactly(t, l, "a change after "+away.role+" is back", pair{"web", "api"}, pair{"api", "web"})
		forbid(t, l, "api", "web")
		holds("it is undone")
	}
}

func TestHostsRestartWithoutThePolicyServer(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	e := dialEcho(t, s, "c1", "c4")
	await(t, "both agents have saved what they need", func() error { // they write every 2 s at most
		for _, h := range []string{"host1", "host2"} {
			b, err := os.ReadFile(filepath.Join(l.Dir(), "nodes", h, "policy-state/policies.jsonl"))
			if err != nil || strings.Count(string(b), "\n") != 3 {
				return fmt.Errorf("%s has %v\n%s", h, err, b)
			}
		}
		return nil
	})
	restore := hide(t, l, "policy-server")
	do(t, l.Kill(t.Context(), "policy-server"))
	for _, h := range []string{"host1", "host2"} {
		do(t, l.Kill(t.Context(), h+"/vxlan-policy-agent"))
	}
	eventually(t, l, "agents are back", func(s lab.Status) bool {
		return s.Hosts[0].Enforcement == "degraded" && s.Hosts[1].Enforcement == "degraded"
	})
	e.check(t, "agents have restarted without the server")
	exactly(t, l, "agents have restarted without the server", pair{"web", "api"})
	do(t, l.Kill(t.Context(), "host2")) // and a whole host, after a power cut
	exactly(t, l, "a host has restarted without the server", pair{"web", "api"})
	_, err := l.AddTo(t.Context(), "new", "host2", "api") // of a group whose policies are known
	do(t, err)
	exactly(t, l, "a container came without the server", pair{"web", "api"})
	restore()
	answers(t, l)
	eventually(t, l, "the server is back", func(s lab.Status) bool { return s.Whole() })
	forbid(t, l, "web", "api")
	exactly(t, l, "a change takes effect", pair{})
}

// TestAnEmptyPolicyDatabaseCutsNothing: what a server says whose database was lost is a new epoch.
func TestAnEmptyPolicyDatabaseCutsNothing(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	e := dialEcho(t, s, "c1", "c4")
	restore := hide(t, l, "policy-server")
	do(t, l.Kill(t.Context(), "policy-server"))
	files, err := filepath.Glob(filepath.Join(l.Dir(), "nodes/control/policy-server.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no database: %v", err)
	}
	for _, f := range files {
		do(t, os.Remove(f))
	}
	restore()
	answers(t, l)
	eventually(t, l, "both agents hear of the empty database", func(s lab.Status) bool {
		for _, h := range s.Hosts {
			if !strings.Contains(h.Unenforced, "are kept though the last list does not have them") {
				return false
			}
		}
		return true
	})
	e.check(t, "the database is empty")
	exactly(t, l, "the database is empty", pair{"web", "api"})
	allow(t, l, "api", "web")
	exactly(t, l, "a change in the new database", pair{"web", "api"}, pair{"api", "web"})
	if out := silkPolicy(t, l, "list"); strings.Contains(out, "web     api") {
		t.Errorf("the database was not empty:\n%s", out)
	}
}

func TestForeignChangesAreRepaired(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	e := dialEcho(t, s, "c1", "c4")
	for _, attack := range []string{"nft flush ruleset", "nft delete table inet silk-policy", "nft flush table inet silk-policy"} {
		out, err := l.Output(t.Context(), "host2", "sh", "-c", attack)
		t.Logf("%s: %v %s", attack, err, out) // where the table has an owner, it fails
		begun := time.Now()
		s := exactly(t, l, "after "+attack, pair{"web", "api"})
		if took := time.Since(begun); took > 2*time.Second { // of which the look takes most
			t.Errorf("%s: repaired after %v, want a second", attack, took)
		}
		if !s.Path("c1", "c4").OK {
			t.Error(table(s))
		}
		e.check(t, "after "+attack)
	}
}

// TestAgentRestartsLetNothingThroughAndCutNothing: at any instant.
func TestAgentRestartsLetNothingThroughAndCutNothing(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.EchoPort))
	e := dialEcho(t, s, "c1", "c4")
	stop := intrude(t, s, "c2", "c4", "c3") // of the group api: nothing is allowed to it
	for i := range 10 {
		host := fmt.Sprintf("host%d", 1+i%2)
		old := program(t, s, host+"/vxlan-policy-agent").PID
		do(t, l.Kill(t.Context(), host+"/vxlan-policy-agent"))
		e.check(t, "while the agent restarts")
		s = eventually(t, l, "the agent is back", func(s lab.Status) bool {
			p := program(t, s, host+"/vxlan-policy-agent")
			return p.PID != 0 && p.PID != old && s.Whole()
		})
		e.check(t, "after the agent restarted")
	}
	if tries := stop(); tries < 100 {
		t.Errorf("only %d intrusions were tried", tries)
	}
}

// intrude tries again and again, until stop, to reach containers that one may not reach, and fails the test when that succeeds. Stop returns how
// often it was tried.
func intrude(t *testing.T, s lab.Status, from string, targets ...string) (stop func() int64) {
	t.Helper()
	ns := nsOf(t, container(t, s, from).Responder.PID)
	var pc net.PacketConn
	do(t, ns.Do(func() (err error) { pc, err = net.ListenPacket("udp4", ":0"); return err }))
	var addrs []netip.AddrPort
	for _, c := range targets {
		addrs = append(addrs, netip.AddrPortFrom(container(t, s, c).Address, lab.EchoPort))
	}
	return intrudeAt(t, pc, func() []netip.AddrPort { return addrs })
}

func intrudeAt(t *testing.T, pc net.PacketConn, targets func() []netip.AddrPort) (stop func() int64) {
	var tries atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	go func() { // what comes back was let through
		defer func() { done <- struct{}{} }()
		b := make([]byte, 100)
		for {
			n, who, err := pc.ReadFrom(b)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				t.Errorf("%v was reached, and answered %q", who, b[:n])
			}
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			for _, a := range targets() {
				pc.WriteTo([]byte("let me in"), net.UDPAddrFromAddrPort(a))
				tries.Add(1)
			}
			<-tick.C
		}
	}()
	stopped := false
	stop = func() int64 {
		if !stopped {
			stopped = true
			cancel()
			pc.Close()
			<-done
			<-done
		}
		return tries.Load()
	}
	t.Cleanup(func() { stop() })
	return stop
}

func TestASpoofedSourceIsRefused(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api", "--protocol", "udp", "--ports", "9999")
	heard := make(chan string, 100)
	var pc net.PacketConn
	do(t, nsOf(t, container(t, s, "c4").Responder.PID).Do(func() (err error) { pc, err = net.ListenPacket("udp4", ":9999"); return err }))
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 100)
		for {
			n, _, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			heard <- string(b[:n])
		}
	}()
	defer func() { pc.Close(); <-done }()
	victim := container(t, s, "c1").Address
	_, err := l.Output(t.Context(), "c2", "ip", "addr", "add", victim.String()+"/32", "dev", "eth0") // c2 is of api, c1 of web
	do(t, err)
	send := func(from string, source netip.Addr, text string) {
		t.Helper()
		do(t, nsOf(t, container(t, s, from).Responder.PID).Do(func() error {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: source.AsSlice()}, &net.UDPAddr{IP: container(t, s, "c4").Address.AsSlice(), Port: 9999})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(text))
			return err
		}))
	}
	// Two layers refuse it, and each does so alone: first the overlay's guard, then, once that is gone, the policy table.
	guard := func() int { return counted(t, l, "host1", "chain", "overlay-prerouting", "\tiifname \"s-*\" counter") }
	policies := func() int { return counted(t, l, "host1", "counter", "unknown-source", "packets") }
	before := guard()
	for range 20 {
		send("c2", victim, "spoofed")
	}
	await(t, "the guard counts what it refuses", func() error {
		if n := guard() - before; n < 20 {
			return fmt.Errorf("%d packets", n)
		}
		return nil
	})
	defer hide(t, l, "silk-daemon")()
	do(t, l.Kill(t.Context(), "host1/silk-daemon"))
	_, err = l.Output(t.Context(), "host1", "sh", "-c", `nft flush chain inet silk overlay-prerouting
		for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done`)
	do(t, err)
	before = policies()
	for range 20 {
		send("c2", victim, "spoofed")
	}
	await(t, "the policy table counts what it refuses", func() error {
		if n := policies() - before; n < 20 {
			return fmt.Errorf("%d packets", n)
		}
		return nil
	})
	await(t, "what c1 itself sends arrives", func() error {
		send("c1", victim, "true")
		select {
		case got := <-heard:
			if got != "true" {
				t.Errorf("%q arrived", got)
			}
			return nil
		case <-time.After(100 * time.Millisecond):
			return errors.New("nothing arrives")
		}
	})
}

// counted returns how many packets the line with a text of an nft object on a host has counted.
func counted(t *testing.T, l *lab.Lab, host, object, name, line string) int {
	t.Helper()
	table := map[string]string{"chain": "silk", "counter": "silk-policy"}[object]
	out, err := l.Output(t.Context(), host, "nft", "list", object, "inet", table, name)
	do(t, err)
	for s := range strings.Lines(string(out)) {
		if _, rest, ok := strings.Cut(s, "packets "); ok && strings.Contains(s, line) {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			do(t, err)
			return n
		}
	}
	t.Fatalf("no line with %q in\n%s", line, out)
	return 0
}

// TestAnAgentOfTheDeployedKindIsServed: it polls the internal API as such agents do.
func TestAnAgentOfTheDeployedKindIsServed(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2, Containers: 1})
	allow(t, l, "web", "api")
	certs := service.Certificates{CA: filepath.Join(l.Dir(), "pki/ca.crt"), Cert: filepath.Join(l.Dir(), "pki/host1.crt"), Key: filepath.Join(l.Dir(), "pki/host1.key")}
	tc, err := certs.Client()
	do(t, err)
	ns := nsOf(t, program(t, s, "host1/vxlan-policy-agent").PID)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: tc, DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = ns.Do(func() (err error) { c, err = new(net.Dialer).DialContext(ctx, network, addr); return err })
		return c, err
	}}}
	get := func(path string) string {
		t.Helper()
		resp, err := client.Get("https://10.0.0.10:4003/networking/v1/internal/" + path)
		do(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		do(t, err)
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %d %s", path, resp.StatusCode, b)
		}
		return strings.TrimSpace(string(b))
	}
	before, err := strconv.ParseInt(get("policies_last_updated"), 10, 64)
	do(t, err)
	const want = `{"total_policies":1,"policies":[{"source":{"id":"web","tag":"0001"},"destination":{"id":"api","tag":"0002","protocol":"tcp","ports":{"start":8080,"end":8080}}}]`
	if got := get("policies?id=api,nobody"); !strings.HasPrefix(got, want) {
		t.Errorf("it is told %s\nwant %s", got, want)
	}
	out, err := l.Output(t.Context(), "policy-server", "silk", "policy", "add", "--wait", "--timeout", "2s", "api", "web")
	var exit *lab.ExitError
	if !errors.As(err, &exit) || exit.Code != 2 || !strings.Contains(string(out), "agents of an earlier kind poll this server") {
		t.Errorf("a change while such an agent polls: %v %s\nwant status 2, since it cannot say what it has", err, out)
	}
	if after, err := strconv.ParseInt(get("policies_last_updated"), 10, 64); err != nil || after <= before {
		t.Errorf("stamp %d after a change, %d before: %v", after, before, err)
	}
}

// TestAContainerThatStartsWithoutTheAgentIsClosed until the agent is back.
func TestAContainerThatStartsWithoutTheAgentIsClosed(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2, Containers: 1}) // c1 of web, c2 of api
	allow(t, l, "web", "api")
	restore := hide(t, l, "vxlan-policy-agent")
	do(t, l.Kill(t.Context(), "host2/vxlan-policy-agent"))
	ctx, cancel := shortly(t)
	defer cancel()
	if _, err := l.AddTo(ctx, "late", "host2", "api"); err == nil { // it waits until its host reaches it
		t.Error("a container without rules was reached")
	}
	eventually(t, l, "it is attached, and closed", func(s lab.Status) bool {
		for _, c := range s.Containers {
			if c.Name == "late" && c.Address.IsValid() {
				return !s.Path("c1", "late").OK && !s.Path("late", "c1").OK && s.Path("c1", "c2").OK
			}
		}
		return false
	})
	restore()
	eventually(t, l, "the agent is back", func(s lab.Status) bool {
		return s.Path("c1", "late").OK && s.Path("late", "c1").Deny && s.Path("c1", "c2").OK
	})
	if err := connect(t, s, "c2", "c1", lab.HTTPPort); err == nil {
		t.Error("something else is open as well")
	}
}
