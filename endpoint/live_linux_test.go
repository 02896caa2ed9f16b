package endpoint_test

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestPortsOfALiveEndpoint: port maps come and go one by one, and no two endpoints get the same.
func TestPortsOfALiveEndpoint(t *testing.T) {
	h := newHost(t)
	a, b := netns.New(t), netns.New(t)
	h.must(h.attach(h.spec("a", a)))
	h.must(h.attach(h.spec("b", b)))
	tcp := func(port uint16) endpoint.PortMap {
		return endpoint.PortMap{HostPort: port, ContainerPort: 80, Protocol: "tcp"}
	}
	add := func(container string, maps ...endpoint.PortMap) (r endpoint.Record, err error) {
		err = h.ns.Do(func() error {
			r, err = h.dir.AddPorts(t.Context(), key(container), maps)
			return err
		})
		return r, err
	}
	if r, err := add("a", tcp(8080), tcp(8081)); err != nil || !slices.Equal(r.PortMaps, []endpoint.PortMap{tcp(8080), tcp(8081)}) {
		t.Fatal(r, err)
	}
	if r, err := add("a", tcp(8081), tcp(8082)); err != nil || len(r.PortMaps) != 3 {
		t.Fatal(r, err)
	}
	for _, bad := range []struct {
		container string
		m         endpoint.PortMap
		want      error
	}{
		{"b", tcp(8082), fault.Conflict},
		{"b", endpoint.PortMap{HostIP: netip.MustParseAddr("10.0.0.1"), HostPort: 8082, ContainerPort: 1, Protocol: "tcp"}, fault.Conflict},
		{"a", endpoint.PortMap{HostPort: 8082, ContainerPort: 81, Protocol: "tcp"}, fault.Invalid},
		{"a", endpoint.PortMap{HostPort: 0, ContainerPort: 81, Protocol: "tcp"}, fault.Invalid},
		{"a", endpoint.PortMap{HostPort: 1, ContainerPort: 81, Protocol: "icmp"}, fault.Invalid},
		{"c", tcp(1), fault.NotFound},
	} {
		if _, err := add(bad.container, bad.m); !errors.Is(err, bad.want) {
			t.Errorf("%s %+v: %v, want %v", bad.container, bad.m, err, bad.want)
		}
	}
	for container, ns := range map[string]*kernel.NS{"a": a, "b": b} {
		if diffs := h.check(key(container), ns); len(diffs) > 0 {
			t.Errorf("%s: %v", container, diffs)
		}
	}
	var wg sync.WaitGroup // of many that want the same port one gets it
	got := make([]error, 8)
	for i := range got {
		wg.Go(func() { _, got[i] = add([]string{"a", "b"}[i%2], tcp(9000)) })
	}
	wg.Wait()
	won := slices.Index(got, nil)
	for i, err := range got {
		if won < 0 || (err == nil) != (i%2 == won%2) {
			t.Errorf("the same port: %v", got)
			break
		}
	}
	remove := func(maps ...endpoint.PortMap) {
		t.Helper()
		if err := h.ns.Do(func() error { return h.dir.RemovePorts(t.Context(), key("a"), maps) }); err != nil {
			t.Error(err)
		}
	}
	remove(tcp(8081), tcp(1))
	if diffs := h.check(key("a"), a); len(diffs) > 0 {
		t.Errorf("without one of its ports: %v", diffs)
	}
	if _, err := add("b", tcp(8081)); err != nil {
		t.Errorf("a port that was given back: %v", err)
	}
	if err := errors.Join(h.detach(key("a"), a), h.detach(key("b"), b)); err != nil {
		t.Fatal(err)
	}
	remove(tcp(8080))
	h.clean()
}

// TestPortsOfALiveEndpointCutNothing: what is connected already stays known to the kernel, which translates it, when a port is added, or is added again.
func TestPortsOfALiveEndpointCutNothing(t *testing.T) {
	_, err := exec.LookPath("conntrack")
	testkit.Require(t, "tools", err)
	h, ns := newHost(t), netns.New(t)
	r := h.must(h.attach(h.spec("a", ns)))
	maps := []endpoint.PortMap{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}, {HostPort: 8081, ContainerPort: 80, Protocol: "udp"}}
	var conn net.Conn
	for _, list := range [][]endpoint.PortMap{maps[:1], maps, maps} {
		if err := h.ns.Do(func() error { _, err := h.dir.AddPorts(t.Context(), key("a"), list); return err }); err != nil {
			t.Fatal(err)
		}
		if conn == nil { // the first port map makes the kernel track connections
			var l net.Listener
			if err := h.ns.Do(func() (err error) { l, err = net.Listen("tcp4", endpoint.Gateway.String()+":0"); return err }); err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := ns.Do(func() (err error) { conn, err = net.Dial("tcp4", l.Addr().String()); return err }); err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		if text := h.sh("conntrack -L -p tcp -s " + r.Address().String() + " 2>/dev/null"); !strings.Contains(text, "ESTABLISHED") {
			t.Errorf("with ports %v the container's connection is forgotten: %q", list, text)
		}
	}
	if err := h.detach(key("a"), ns); err != nil {
		t.Fatal(err)
	}
	h.clean()
}

// TestChangesWaitForTheirOwnEndpointOnly: while somebody works on an endpoint, whoever wants to change that one keeps nobody from attaching another.
func TestChangesWaitForTheirOwnEndpointOnly(t *testing.T) {
	h := newHost(t)
	a, b := netns.New(t), netns.New(t)
	working, end, done := make(chan struct{}), make(chan struct{}), make(chan error, 2)
	finish := sync.OnceFunc(func() { close(end) })
	late := time.AfterFunc(30*time.Second, func() { t.Error("another endpoint has to wait as well"); finish() })
	defer late.Stop()
	go func() {
		done <- h.ns.Do(func() error {
			_, err := h.dir.Attach(t.Context(), h.spec("a", a), func(endpoint.Record) error { close(working); <-end; return nil })
			return err
		})
	}()
	<-working
	changing := make(chan struct{})
	go func() {
		done <- h.ns.Do(func() error {
			close(changing)
			_, err := h.dir.AddPorts(t.Context(), key("a"), []endpoint.PortMap{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}})
			return err
		})
	}()
	<-changing
	for range 20 { // the change gets to its wait somewhere among these
		h.must(h.attach(h.spec("b", b)))
		if err := h.detach(key("b"), b); err != nil {
			t.Fatal(err)
		}
	}
	finish()
	if err := errors.Join(<-done, <-done); err != nil {
		t.Fatal(err)
	}
	if r, err := h.dir.Lookup(key("a")); err != nil || len(r.PortMaps) != 1 {
		t.Errorf("%v, %v", r.PortMaps, err)
	}
	if err := h.detach(key("a"), a); err != nil {
		t.Fatal(err)
	}
	h.clean()
}

// TestNetOutOfALiveEndpoint: rules are appended, each once, and a list that nobody gave becomes one.
func TestNetOutOfALiveEndpoint(t *testing.T) {
	h := newHost(t)
	ns := netns.New(t)
	first := h.must(h.attach(h.spec("a", ns)))
	rule := func(s string) json.RawMessage { return json.RawMessage(`{"protocol":` + s + `}`) }
	add := func(want string, rules ...json.RawMessage) {
		t.Helper()
		r, err := h.dir.AddNetOut(t.Context(), key("a"), rules)
		if err != nil || string(r.NetOut) != want {
			t.Errorf("recorded %s, %v, want %s", r.NetOut, err, want)
		}
		if r, err := h.dir.Lookup(key("a")); err != nil || string(r.NetOut) != want {
			t.Errorf("on disk %s, %v, want %s", r.NetOut, err, want)
		}
	}
	if first.NetOut != nil {
		t.Errorf("it began with %s", first.NetOut)
	}
	add(`[]`)
	add(`[{"protocol":1}]`, json.RawMessage(`{ "protocol" : 1 }`))
	add(`[{"protocol":1},{"protocol":2}]`, rule("2"), rule("1"), rule("2"))
	many := make([]json.RawMessage, 10_001)
	for i := range many {
		many[i] = rule(strconv.Itoa(i))
	}
	if _, err := h.dir.AddNetOut(t.Context(), key("a"), many); !errors.Is(err, fault.Invalid) {
		t.Errorf("too many: %v", err)
	}
	add(`[{"protocol":1},{"protocol":2}]`)
	if _, err := h.dir.AddNetOut(t.Context(), key("b"), nil); !errors.Is(err, fault.NotFound) {
		t.Errorf("of nobody: %v", err)
	}
	if err := h.detach(key("a"), ns); err != nil {
		t.Fatal(err)
	}
	h.clean()
}
