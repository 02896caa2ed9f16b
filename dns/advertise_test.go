package dns_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// host is a host's namespace with a directory of endpoints.
type host struct {
	t   testing.TB
	ns  *kernel.NS
	dir *endpoint.Dir
}

func newHost(t testing.TB) host {
	t.Helper()
	d, err := endpoint.Open(filepath.Join(t.TempDir(), "endpoints"))
	if err != nil {
		t.Fatal(err)
	}
	h := host{t, netns.New(t), d}
	h.run("ip link set lo up")
	return h
}

// run runs a command line on the host and returns what it prints.
func (h host) run(line string) string {
	h.t.Helper()
	return netns.Shell(h.t, h.ns, line)
}

func key(container string) endpoint.Key {
	return endpoint.Key{Network: "silk", Container: container, Interface: "eth0"}
}

// attach makes a container that wants to be called by names. It returns its namespace, which lives as long as that is open.
func (h host) attach(container string, want endpoint.Advertisement) (endpoint.Record, *kernel.NS) {
	h.t.Helper()
	ns := netns.New(h.t)
	var r endpoint.Record
	if err := h.ns.Do(func() (err error) {
		s := endpoint.Spec{Key: key(container), Path: "/run/netns/" + container, Namespace: ns, Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Group: "app-" + container}
		r, err = h.dir.Attach(context.Background(), s, nil)
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	h.rename(r, &want)
	return r, ns
}

// rename lets a container want other names.
func (h host) rename(r endpoint.Record, want *endpoint.Advertisement) {
	h.t.Helper()
	files, err := filepath.Glob(filepath.Join(h.dir.Path(), "*"+r.Container+"*"))
	if err != nil || len(files) != 1 {
		h.t.Fatalf("records of %s: %v, %v", r.Container, files, err)
	}
	r.Advertise = want
	b, err := json.Marshal(r)
	if err != nil {
		h.t.Fatal(err)
	}
	temp := filepath.Join(h.dir.Path(), ".tmp-test")
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(temp, files[0]); err != nil {
		h.t.Fatal(err)
	}
}

func (h host) detach(container string, ns *kernel.NS) {
	h.t.Helper()
	if err := h.ns.Do(func() error { return h.dir.Detach(context.Background(), key(container), ns, nil) }); err != nil {
		h.t.Fatal(err)
	}
}

// launch runs the program on the host.
func (h host) launch(cfg object) *process {
	h.t.Helper()
	return launchWith(h.t, cfg, h.ns.Do, binary, "-config")
}

// names waits until a name has an answer on the host.
func (h host) names(p *process, within time.Duration, name, want string) {
	h.t.Helper()
	testkit.Within(h.t, within, func() string {
		var got string
		err := h.ns.Do(func() (err error) {
			got, err = ask(h.t.Context(), p.DNS[0], name)
			return err
		})
		if err != nil || got != want {
			return fmt.Sprintf("%s has answer %q, %v, want %q", name, got, err, want)
		}
		return ""
	})
}

func TestASingleHostNeedsNoNATS(t *testing.T) {
	h := newHost(t)
	one := 1
	a, ans := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal", "*.wild.apps.internal"}, Port: 8080, Index: &one})
	cfg := settings(t, object{"endpoint_dir": h.dir.Path(), "listen_dns": []string{"127.0.0.1:5300"}})
	p := h.launch(cfg)
	address := a.Address().String()
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+address) // from the first question on
	h.names(p, soon, "1.api.apps.internal", "NOERROR "+address)
	h.names(p, soon, "x.wild.apps.internal", "NOERROR "+address)
	h.names(p, soon, "2.api.apps.internal", "NXDOMAIN")
	b, bns := h.attach("two", endpoint.Advertisement{Names: []string{"api.apps.internal"}})
	both := []string{address, b.Address().String()}
	slices.Sort(both)
	h.names(p, soon, "api.apps.internal", "NOERROR "+strings.Join(both, " "))
	h.rename(b, &endpoint.Advertisement{Names: []string{"web.apps.internal", "not a name"}})
	h.names(p, soon, "web.apps.internal", "NOERROR "+b.Address().String())
	h.names(p, soon, "api.apps.internal", "NOERROR "+address)
	h.detach("one", ans)
	h.names(p, soon, "api.apps.internal", "NXDOMAIN")
	began := time.Now()
	bns.Close() // the container dies; nobody says so, its record stays
	h.names(p, soon, "web.apps.internal", "NXDOMAIN")
	t.Logf("a dead container was called by its name for %v", time.Since(began))
	p.Kill()
}

// TestNamesStayWhileARecordCannotBeRead: who cannot read what a container wants may not say that it wants nothing. The container is what counts.
func TestNamesStayWhileARecordCannotBeRead(t *testing.T) {
	h := newHost(t)
	a, ns := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal"}})
	b, bns := h.attach("two", endpoint.Advertisement{Names: []string{"web.apps.internal"}})
	cfg := settings(t, object{"endpoint_dir": h.dir.Path(), "listen_dns": []string{"127.0.0.1:5300"}})
	p := h.launch(cfg)
	files, err := filepath.Glob(filepath.Join(h.dir.Path(), "*one*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.rename(b, &endpoint.Advertisement{Names: []string{"new.apps.internal"}})
	h.names(p, soon, "new.apps.internal", "NOERROR "+b.Address().String()) // it has looked since
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+a.Address().String())
	p.Kill()
	p = h.launch(cfg) // the next process knows no more
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+a.Address().String())
	bns.Close()
	h.names(p, soon, "new.apps.internal", "NXDOMAIN")
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+a.Address().String())
	ns.Close() // the container goes, and so do its names
	h.names(p, soon, "api.apps.internal", "NXDOMAIN")
	p.Kill()
}

// TestEveryAddressMayBeBelieved: address_ranges of 0.0.0.0/0 is how to say so. That does not make the server the authority for all addresses.
func TestEveryAddressMayBeBelieved(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	p := launch(t, settings(t, natsAt(n), object{"address_ranges": []string{"0.0.0.0/0", "::/0"}}))
	e := emit(t, n)
	p.counts(t, "silk_dns_nats_connected", "1")
	e.register(t, "192.0.2.7", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 192.0.2.7")
	p.answers(t, soon, "7.2.0.192.in-addr.arpa", "REFUSED")
	p.End(t)
}

// said collects what is said on NATS of names.
func said(t testing.TB, e emitter) (registers, unregisters *nats.Subscription) {
	t.Helper()
	r, err := e.SubscribeSync("service-discovery.register")
	if err != nil {
		t.Fatal(err)
	}
	u, err := e.SubscribeSync("service-discovery.unregister")
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Flush(); err != nil {
		t.Fatal(err)
	}
	return r, u
}

// next returns the next message, with how long it took.
func next(t testing.TB, s *nats.Subscription, within time.Duration) (string, time.Duration) {
	t.Helper()
	began := time.Now()
	m, err := s.NextMsg(within)
	if err != nil {
		t.Fatalf("%s: %v", s.Subject, err)
	}
	return string(m.Data), time.Since(began)
}

// TestAdvertiseOverNATS: what a deployed listener and another silk-dns hear of a host's containers. The host reaches NATS by a veth pair.
func TestAdvertiseOverNATS(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	e := emit(t, n)
	registers, unregisters := said(t, e)
	h := newHost(t)
	one := 1
	a, ans := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal"}, Port: 8080, Index: &one})
	p := h.launch(settings(t, object{
		"endpoint_dir": h.dir.Path(), "listen_dns": []string{"127.0.0.1:5300"}, "advertise_interval_seconds": 2, "availability_zone": "z9",
		"nats": object{"hosts": []object{{"hostname": "127.0.0.1", "port": 4222}}},
	}))
	relay(t, h, 4222, n)
	other := launch(t, settings(t, natsAt(n)))
	got, _ := next(t, registers, soon)
	want := fmt.Sprintf(`{"host":"%v","uris":["api.apps.internal","1.api.apps.internal"],"app":"app-one","private_instance_id":"one","private_instance_index":"1","port":8080,`+
		`"availability_zone":"z9","tags":{"component":"silk-dns"}`, a.Address())
	if !strings.HasPrefix(got, want+`,"endpoint_updated_at_ns":1`) {
		t.Errorf("first said %s, want %s and the time", got, want)
	}
	got, took := next(t, registers, soon)
	if got != want+"}" || took > 10*time.Second {
		t.Errorf("said again after %v: %s", took, got)
	}
	other.answers(t, soon, "1.api.apps.internal", "NOERROR "+a.Address().String())
	h.names(p, soon, "api.apps.internal", "NOERROR "+a.Address().String())

	// Nobody else takes a name away, or says when it is stale.
	e.say(t, "unregister", payload(a.Address().String(), "api.apps.internal", 1))
	other.answers(t, soon, "api.apps.internal", "NXDOMAIN")
	h.names(p, soon, "api.apps.internal", "NOERROR "+a.Address().String())
	if got, _ := next(t, unregisters, soon); !strings.Contains(got, "7a7a") {
		t.Errorf("heard %s, want what this test said", got)
	}
	other.answers(t, soon, "api.apps.internal", "NOERROR "+a.Address().String()) // within an interval

	// A container that goes while nobody looks is taken back by the next process.
	b, bns := h.attach("two", endpoint.Advertisement{Names: []string{"web.apps.internal"}})
	other.answers(t, soon, "web.apps.internal", "NOERROR "+b.Address().String())
	h.names(p, soon, "web.apps.internal", "NOERROR "+b.Address().String())
	file := p.Cmd.Args[len(p.Cmd.Args)-1]
	p.Kill()
	h.detach("two", bns)
	b2, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var cfg object
	if err := json.Unmarshal(b2, &cfg); err != nil {
		t.Fatal(err)
	}
	p = h.launch(cfg)
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+a.Address().String())
	h.names(p, soon, "web.apps.internal", "NXDOMAIN")
	other.answers(t, soon, "web.apps.internal", "NXDOMAIN")
	p.End(t) // which takes nothing back
	h.launch(cfg)
	h.detach("one", ans)
	began := time.Now()
	other.answers(t, soon, "api.apps.internal", "NXDOMAIN")
	t.Logf("others knew after %v that a container had gone; untold it would have been minutes", time.Since(began))
	for farewell := fmt.Sprintf(`{"host":"%v","uris":["`, a.Address()); ; {
		if got, _ := next(t, unregisters, soon); strings.HasPrefix(got, farewell) && strings.Contains(got, `"api.apps.internal"`) {
			return
		}
	}
}

// TestHostsAnswerAStart: a silk-dns that starts has the others say what they know, within an interval and not all at once.
func TestHostsAnswerAStart(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	e := emit(t, n)
	h := newHost(t)
	const containers = 12
	for i := range containers {
		h.attach(fmt.Sprint("c", i), endpoint.Advertisement{Names: []string{fmt.Sprintf("a%d.apps.internal", i)}})
	}
	p := h.launch(settings(t, object{
		"endpoint_dir": h.dir.Path(), "listen_dns": []string{"127.0.0.1:5300"}, "advertise_interval_seconds": 120,
		"nats": object{"hosts": []object{{"hostname": "127.0.0.1", "port": 4222}}},
	}))
	registers, _ := said(t, e)
	relay(t, h, 4222, n)
	for range containers {
		next(t, registers, soon) // of the connection, within a second
	}
	p.Kill()
	h.launch(settings(t, object{
		"endpoint_dir": h.dir.Path(), "listen_dns": []string{"127.0.0.1:5300"}, "advertise_interval_seconds": 4,
		"nats": object{"hosts": []object{{"hostname": "127.0.0.1", "port": 4222}}},
	}))
	for range containers {
		next(t, registers, soon)
	}
	e.say(t, "start", []byte(`{"id":"x","host":"1.2.3.4","minimumRegisterIntervalInSeconds":60,"pruneThresholdInSeconds":120}`))
	heard := map[string]bool{}
	began := time.Now()
	for len(heard) < containers {
		got, _ := next(t, registers, soon)
		heard[got] = true
	}
	if d := time.Since(began); d > soon || d < 100*time.Millisecond {
		t.Errorf("all were said within %v of a start, want within 4 s and not at once", d)
	}
}
