package cni_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

func (h *host) record(c container) endpoint.Record {
	h.t.Helper()
	d, err := endpoint.Open(filepath.Join(h.dir, "endpoints"))
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := d.Lookup(endpoint.Key{Network: "silk", Container: c.id, Interface: "eth0"})
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

func TestEgressRulesAreRecorded(t *testing.T) {
	h := newHost(t)
	for id, rules := range map[string]string{"none": `null`, "empty": `[]`, "one": `[{"protocol":1,"networks":[{"start":"10.0.0.1","end":"10.0.0.9"}],"ports":[{"start":80,"end":80}]}]`} {
		c := h.container(id)
		h.add(c, "runtimeConfig", json.RawMessage(`{"netOutRules":`+rules+`}`))
		want := rules
		if rules == "null" {
			want = ""
		}
		if got := h.record(c).NetOut; string(got) != want || (got == nil) != (want == "") {
			t.Errorf("rules %s are recorded as %q", rules, got)
		}
		h.del(c, "runtimeConfig", json.RawMessage(`{"netOutRules":7}`)) // what undoes does not judge
	}
}

// underlay joins the host with a machine outside, 10.0.16.15 and 10.0.16.16, and returns that one.
func (h *host) underlay() *kernel.NS {
	h.t.Helper()
	peer := netns.New(h.t)
	h.sh(h.ns, fmt.Sprintf("sysctl -qw net.ipv6.conf.default.disable_ipv6=1; ip link add under type veth peer name under netns /proc/%d/fd/%d; ip addr add 10.0.16.15/24 dev under; ip link set under up", os.Getpid(), peer.FD()))
	h.sh(peer, "ip link set lo up; ip addr add 10.0.16.16/24 dev under; ip link set under up")
	return peer
}

func (h *host) sh(ns *kernel.NS, script string) string {
	h.t.Helper()
	return netns.Shell(h.t, ns, script)
}

// serve answers connections to a TCP port of a namespace with the address that they come from.
func serve(t testing.TB, ns *kernel.NS, port int) {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprint(":", port)); return err }); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// ask connects from a namespace and returns what the other end says, or the error.
func ask(ns *kernel.NS, to string) (said string) {
	ns.Do(func() error {
		c, err := net.DialTimeout("tcp4", to, 20*time.Second)
		if err != nil {
			said = err.Error()
			return nil
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		b, err := io.ReadAll(c)
		if said = string(b); err != nil {
			said = err.Error()
		}
		return nil
	})
	return said
}

// mappings returns a runtimeConfig with port mappings, in JSON.
func mappings(text string) json.RawMessage {
	return json.RawMessage(`{"portMappings":[` + text + `]}`)
}

// TestPortMappingsCarryTraffic: in every spelling, from everywhere, and everybody is seen as who he is.
func TestPortMappingsCarryTraffic(t *testing.T) {
	h := newHost(t)
	outside := h.underlay()
	first, c, other := h.container("first"), h.container("c1"), h.container("c2")
	h.add(first, "runtimeConfig", mappings(`{"hostPort":1,"containerPort":1}`)) // what is made once is there from here on
	h.del(first)
	before := h.dump()
	config := mappings(`{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"host_port":8081,"container_port":80},{"HostPort":8082,"ContainerPort":80,"Protocol":"TCP","HostIP":"0.0.0.0"},` +
		`{"hostPort":8083,"containerPort":80,"hostIP":"10.0.16.15"},{"hostPort":8084,"containerPort":80,"hostIP":"127.0.0.1"}`)
	h.add(c, "runtimeConfig", config)
	h.add(other)
	serve(t, c.ns, 80)
	address, neighbour := h.record(c).Address().String(), h.record(other).Address().String()
	for _, x := range []struct {
		who      string
		from     *kernel.NS
		to, want string
	}{
		{"the underlay", outside, "10.0.16.15:8080", "10.0.16.16"}, {"the underlay", outside, "10.0.16.15:8081", "10.0.16.16"},
		{"the underlay", outside, "10.0.16.15:8082", "10.0.16.16"}, {"the underlay", outside, "10.0.16.15:8083", "10.0.16.16"},
		{"the underlay", outside, "10.0.16.15:8084", "connection refused"},
		{"the host", h.ns, "10.0.16.15:8080", "10.0.16.15"}, {"the host", h.ns, "10.0.16.15:8083", "10.0.16.15"},
		{"the loopback", h.ns, "127.0.0.1:8080", "169.254.0.1"}, {"the loopback", h.ns, "127.0.0.1:8084", "169.254.0.1"}, {"the loopback", h.ns, "127.1.2.3:8080", "169.254.0.1"},
		{"the loopback", h.ns, "127.0.0.1:8083", "connection refused"},
		{"a neighbour", other.ns, "10.0.16.15:8080", neighbour}, {"a neighbour, by the gateway", other.ns, "169.254.0.1:8080", neighbour},
		{"itself", c.ns, "10.0.16.15:8080", "169.254.0.1"}, {"itself, by the gateway", c.ns, "169.254.0.1:8081", "169.254.0.1"},
		{"a neighbour, directly", other.ns, address + ":80", neighbour},
	} {
		if got := ask(x.from, x.to); !strings.HasSuffix(got, x.want) {
			t.Errorf("%s at %s is seen as %q, want %q", x.who, x.to, got, x.want)
		}
	}
	if a := h.run("CHECK", h.config("runtimeConfig", config), c.env()); a.code != 0 {
		t.Errorf("CHECK: %s", a.stdout)
	}
	h.sh(h.ns, "nft delete element inet silk nat-ports '{ tcp . 8080 }'; sysctl -qw net.ipv4.conf."+h.record(c).Device+".route_localnet=0")
	if _, text := h.run("CHECK", h.config("runtimeConfig", config), c.env()).failure(t); !strings.Contains(text, "port map is missing: expected tcp *:8080 to "+address+":80") || !strings.Contains(text, "route_localnet is 0") {
		t.Errorf("CHECK says %s", text)
	}
	if a := h.run("ADD", h.config("runtimeConfig", config), c.env()); a.code != 0 {
		t.Errorf("ADD of what is damaged: %s", a.stdout)
	}
	if got := ask(h.ns, "127.0.0.1:8080"); got != "169.254.0.1" {
		t.Errorf("after the ADD: %s", got)
	}
	h.del(c)
	h.del(other)
	if got := ask(outside, "10.0.16.15:8080"); !strings.HasSuffix(got, "connection refused") {
		t.Errorf("after the DEL: %s", got)
	}
	h.sh(h.ns, "conntrack -F 2>/dev/null; ip neigh flush dev under")
	if after := h.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestAStreamFindsItsNewContainer: packets of UDP that never pause reach a container that came after the first of them, and the one after that.
func TestAStreamFindsItsNewContainer(t *testing.T) {
	h := newHost(t)
	outside := h.underlay()
	config := mappings(`{"hostPort":5300,"containerPort":53,"protocol":"udp"}`)
	first := h.container("first")
	h.add(first) // from here on the host tracks connections
	h.del(first)
	var stream net.Conn
	if err := outside.Do(func() (err error) { stream, err = net.Dial("udp4", "10.0.16.15:5300"); return err }); err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	stream.Write([]byte("early")) // to nobody
	testkit.Within(t, 20*time.Second, func() string {
		if h.sh(h.ns, "conntrack -L -p udp --dport 5300 2>/dev/null") == "" {
			return "the early packet is not tracked"
		}
		return ""
	})
	for _, id := range []string{"c1", "c2"} {
		c := h.container(id)
		h.add(c, "runtimeConfig", config)
		var in net.PacketConn
		if err := c.ns.Do(func() (err error) { in, err = net.ListenPacket("udp4", ":53"); return err }); err != nil {
			t.Fatal(err)
		}
		got := make(chan string, 1)
		go func() {
			b := make([]byte, 16)
			in.SetReadDeadline(time.Now().Add(30 * time.Second))
			n, from, err := in.ReadFrom(b)
			got <- fmt.Sprintf("%s %v %v", b[:n], from, err)
		}()
		tick := time.NewTicker(20 * time.Millisecond)
		said := ""
		for said == "" {
			select {
			case said = <-got:
			case <-tick.C:
				stream.Write([]byte(id))
			}
		}
		tick.Stop()
		if want := id + " " + stream.LocalAddr().String() + " <nil>"; said != want {
			t.Errorf("%s got %q, want %q", id, said, want)
		}
		in.Close()
		h.del(c)
	}
}

// TestOneContainerGetsAPort: of many that want the same, whether by one address of the host or by all.
func TestOneContainerGetsAPort(t *testing.T) {
	h := newHost(t)
	first := h.container("first")
	h.add(first, "runtimeConfig", mappings(`{"hostPort":1,"containerPort":1}`))
	h.del(first)
	before := h.dump()
	const n = 24
	type outcome struct {
		c container
		answer
	}
	outcomes := make(chan outcome, n)
	for i := range n {
		c := h.container(fmt.Sprint("c", i))
		at := []string{"", `,"hostIP":"10.0.16.15"`}[i%2]
		config := h.config("runtimeConfig", mappings(fmt.Sprintf(`{"hostPort":%d,"containerPort":80},{"hostPort":8080,"containerPort":80%s}`, 9000+i, at)))
		cmd, out := h.process("ADD", config, c.env())
		go func() {
			o := outcome{c: c}
			if cmd.Wait() != nil {
				o.code = 1
			}
			o.stdout = out.String()
			outcomes <- o
		}()
	}
	var got, refused []outcome
	for range n {
		if o := <-outcomes; o.code == 0 {
			got = append(got, o)
		} else {
			refused = append(refused, o)
		}
	}
	if len(got) != 1 {
		t.Fatalf("%d containers got the port, want 1", len(got))
	}
	for _, o := range refused {
		if !strings.Contains(o.stdout, "is taken by "+got[0].c.id+"/eth0 on silk") {
			t.Errorf("%s was told %s", o.c.id, o.stdout)
		}
	}
	h.del(got[0].c)
	h.add(refused[0].c, "runtimeConfig", mappings(`{"hostPort":8080,"containerPort":80}`))
	h.del(refused[0].c)
	if after := h.dump(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// blast sends a megabyte of UDP at once and returns how many bytes of it arrive and how long the sending took.
func blast(t *testing.T, from, to *kernel.NS, at string) (arrived int, took time.Duration) {
	t.Helper()
	var in net.PacketConn
	if err := to.Do(func() (err error) { in, err = net.ListenPacket("udp4", at); return err }); err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	raw, err := in.(*net.UDPConn).SyscallConn()
	if err == nil { // whatever others may have on this machine
		err = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20) })
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := from.Do(func() error {
		c, err := net.Dial("udp4", at)
		if err != nil {
			return err
		}
		defer c.Close()
		begun := time.Now()
		defer func() { took = time.Since(begun) }()
		for range 1000 {
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	for {
		in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, _, err := in.ReadFrom(b)
		if err != nil {
			return arrived, took
		}
		arrived += n
	}
}

// passes sends a megabyte from one namespace to another and says what is wrong with what arrives: a bucket of 20 kB that drains at 1 MB/s and holds back
// 25 ms lets through 65 kB and what the time of the sending brings; without one nearly all arrives. On a busy machine the sending may take so long that
// nothing can be told, and a queue that is no bucket's may overflow: then it is repeated.
func passes(t *testing.T, from, to *kernel.NS, at string, limited bool) (wrong string) {
	t.Helper()
	for range 20 {
		got, took := blast(t, from, to, at)
		most := 100_000 + int(1_100_000*took.Seconds())
		switch wrong = fmt.Sprintf("%d bytes arrived, sent in %v", got, took); {
		case limited && (got < 15_000 || got > most):
			return wrong
		case limited && most < 600_000, !limited && got > 900_000:
			return ""
		}
	}
	return wrong
}

// TestLimitsHold: of a megabyte sent at once a bucket of 20 kB that drains at 1 MB/s lets through little, in the direction that it is in.
func TestLimitsHold(t *testing.T) {
	h := newHost(t)
	outside := h.underlay()
	h.sh(outside, "ip route add default via 10.0.16.15")
	for id, x := range map[string]struct {
		more    []any
		in, out bool // limited
	}{
		"free":    {nil, false, false},
		"ingress": {[]any{"runtimeConfig", json.RawMessage(`{"bandwidth":{"ingressRate":8000000,"ingressBurst":160000}}`)}, true, false},
		"egress":  {[]any{"runtimeConfig", json.RawMessage(`{"bandwidth":{"egressRate":8000000,"egressBurst":160000}}`)}, false, true},
		"both":    {[]any{"rate", 7813, "burst", 157}, true, true},
	} {
		c := h.container(id)
		h.add(c, x.more...)
		if a := h.run("CHECK", h.config(x.more...), c.env()); a.code != 0 {
			t.Errorf("%s: CHECK: %s", id, a.stdout)
		}
		if wrong := passes(t, outside, c.ns, h.record(c).Address().String()+":7", x.in); wrong != "" {
			t.Errorf("%s: to the container: %s", id, wrong)
		}
		if wrong := passes(t, c.ns, outside, "10.0.16.16:7", x.out); wrong != "" {
			t.Errorf("%s: from the container: %s", id, wrong)
		}
		if x.more != nil {
			text := h.sh(h.ns, "tc qdisc show")
			if n := strings.Count(text, "qdisc tbf 1:"); n != map[string]int{"ingress": 1, "egress": 1, "both": 2}[id] || !strings.Contains(text, "rate 8") {
				t.Errorf("%s: %s", id, text)
			}
		}
		h.sabotage(c, id, x.more)
		h.del(c)
		if links := h.sh(h.ns, "ip link"); strings.Contains(links, "i-0") || strings.Contains(links, "s-0") {
			t.Errorf("%s: left:\n%s", id, links)
		}
	}
}

// sabotage takes a limit away and lets CHECK name it and ADD put it back.
func (h *host) sabotage(c container, id string, more []any) {
	h.t.Helper()
	device := h.record(c).Device
	way := strings.Replace(device, "s-", "i-", 1)
	for _, x := range []struct{ ids, script, says string }{
		{"ingress both", "tc qdisc del dev " + device + " root", "ingress limit of " + device + " is missing"},
		{"egress both", "tc qdisc del dev " + way + " root", "egress limit of " + device + " is missing"},
		{"egress both", "tc filter del dev " + device + " ingress", "way of " + device + " through its limit is missing"},
		{"egress both", "ip link del " + way, "egress limit of " + device + " is missing"},
	} {
		if !strings.Contains(x.ids, id) {
			continue
		}
		h.sh(h.ns, x.script)
		if _, text := h.run("CHECK", h.config(more...), c.env()).failure(h.t); !strings.Contains(text, x.says) {
			h.t.Errorf("%s: after %q CHECK says %s", id, x.script, text)
		}
		h.add(c, more...)
		if a := h.run("CHECK", h.config(more...), c.env()); a.code != 0 {
			h.t.Errorf("%s: after %q and ADD: CHECK: %s", id, x.script, a.stdout)
		}
	}
}

// TestOrphansAreCollected: GC removes a limit whose record was lost.
func TestOrphansAreCollected(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	h.add(c, edge...)
	r := h.record(c)
	if err := os.RemoveAll(filepath.Join(h.dir, "endpoints")); err != nil {
		t.Fatal(err)
	}
	h.sh(c.ns, "ip link del eth0")
	h.sh(h.ns, "ip link add i-other type ifb")
	if a := h.run("GC", h.config("cni.dev/valid-attachments", []any{}), nil); a.code != 0 {
		t.Fatal(a.stdout)
	}
	links := h.sh(h.ns, "ip link")
	if strings.Contains(links, strings.Replace(r.Device, "s-", "i-", 1)) || !strings.Contains(links, "i-other") {
		t.Errorf("after the GC:\n%s", links)
	}
}

// firewalld is what firewalld 2.x makes of a zone that lets forwarded traffic pass only by its own word or a translation, in short.
const firewalld = `table inet firewalld {
	chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; tcp dport 2222 redirect to :22; }
	chain nat_OUTPUT { type nat hook output priority -90; policy accept; }
	chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; oifname "under" masquerade; }
	chain filter_INPUT { type filter hook input priority filter + 10; policy accept; ct state { established, related } accept; ct status dnat accept; iifname "lo" accept; ct state invalid drop; reject with icmpx admin-prohibited; }
	chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept; ct state { established, related } accept; ct status dnat accept; iifname "lo" accept; ct state invalid drop; reject with icmpx admin-prohibited; }
	chain filter_OUTPUT { type filter hook output priority filter + 10; policy accept; ct state { established, related } accept; oifname "lo" accept; }
}`

// TestPortMappingsBesideFirewalld: neither takes the other's away, also when firewalld is reloaded.
func TestPortMappingsBesideFirewalld(t *testing.T) {
	h := newHost(t)
	outside := h.underlay()
	reload := func() {
		h.sh(h.ns, "nft -f - <<'E'\ntable inet firewalld\ndelete table inet firewalld\n"+firewalld+"\nE")
	}
	reload()
	theirs := h.sh(h.ns, "nft list table inet firewalld")
	c := h.container("c1")
	h.add(c, "runtimeConfig", mappings(`{"hostPort":8080,"containerPort":80}`))
	serve(t, c.ns, 80)
	for range 2 {
		for _, x := range []struct {
			from     *kernel.NS
			to, want string
		}{{outside, "10.0.16.15:8080", "10.0.16.16"}, {h.ns, "10.0.16.15:8080", "10.0.16.15"}, {h.ns, "127.0.0.1:8080", "169.254.0.1"}, {c.ns, "10.0.16.15:8080", "169.254.0.1"}} {
			if got := ask(x.from, x.to); got != x.want {
				t.Errorf("%s is seen as %q, want %q", x.to, got, x.want)
			}
		}
		reload()
	}
	if a := h.run("CHECK", h.config(), c.env()); a.code != 0 {
		t.Errorf("CHECK: %s", a.stdout)
	}
	h.del(c)
	if got := h.sh(h.ns, "nft list table inet firewalld"); got != theirs {
		t.Errorf("firewalld's table was\n%s\nand is\n%s", theirs, got)
	}
}
