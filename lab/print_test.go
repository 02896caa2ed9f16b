package lab_test

import (
	"flag"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestStatusAsText(t *testing.T) {
	s := lab.Status{
		Name: "lab", Dir: "/run/silk-lab/lab", Overlay: lab.Overlay,
		Programs: []lab.Program{{Name: "supervisor", PID: 7}, {Name: "controller", Error: "start silk-controller: no such file or directory"}},
		Hosts: []lab.Host{
			{Name: "host1", Underlay: netip.MustParseAddr("10.0.0.11"), Lease: netip.MustParsePrefix("10.255.80.0/24"), MTU: 1450, State: lab.Ready},
			{Name: "host2", Underlay: netip.MustParseAddr("10.0.0.12"), State: lab.NoAnswer, Partitioned: true},
		},
		Containers: []lab.Container{
			{Name: "c1", Host: "host1", Address: netip.MustParseAddr("10.255.80.2")},
			{Name: "c2", Host: "host1", Address: netip.MustParseAddr("10.255.80.3")},
			{Name: "c3", Host: "host2", Error: "attach c3: its host takes no containers now: host has no lease"},
		},
		Paths: []lab.Path{{From: "c1", To: "c2", OK: true, Time: 240 * time.Microsecond}, {From: "c2", To: "c1", Error: "timeout"}},
	}
	var b strings.Builder
	if err := s.Write(&b); err != nil {
		t.Fatal(err)
	}
	testkit.Golden(t, "testdata/status.txt", b.String(), *update)
	if s.Whole() {
		t.Error("a lab with a failing path counts as whole")
	}
}

func TestNamesAsText(t *testing.T) {
	a, b := netip.MustParseAddr("10.255.80.2"), netip.MustParseAddr("10.255.80.3")
	s := lab.Status{
		Hosts:      []lab.Host{{Name: "host1", State: lab.Ready, Naming: "degraded", Unnamed: "nats is away", Proxying: lab.NoAnswer}, {Name: "host2", State: lab.Ready, Naming: lab.Ready, Proxying: lab.Ready}},
		Containers: []lab.Container{{Name: "c1", Group: "api"}, {Name: "c2", Group: "api"}, {Name: "web", Group: "web"}},
		Names:      []lab.Name{{Name: "c1.apps.internal", Addresses: []netip.Addr{a}}, {Name: "c2.apps.internal", Addresses: []netip.Addr{b}, Missing: []string{"host2"}}, {Name: "api.apps.internal", Addresses: []netip.Addr{a, b}}, {Name: "web.apps.internal", Addresses: []netip.Addr{a}, Missing: []string{"host1", "host2"}}},
	}
	var out strings.Builder
	if err := s.Write(&out); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"ready, names degraded: nats is away, TLS no answer\n", "api.apps.internal  10.255.80.2 10.255.80.3  on 2 hosts\n",
		"c2.apps.internal   10.255.80.3              not, or not all, on host2\n",
		"web.apps.internal  10.255.80.2              not, or not all, on host1, host2\n",
	} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("%q is not in\n%s", line, out.String())
		}
	}
	if strings.Contains(out.String(), "c1.apps.internal") {
		t.Errorf("a container's own name, known everywhere, is in\n%s", out.String())
	}
}

func TestWhole(t *testing.T) {
	whole := func() lab.Status {
		return lab.Status{
			Hosts:      []lab.Host{{Name: "h", Lease: netip.MustParsePrefix("10.255.1.0/24"), State: lab.Ready}},
			Containers: []lab.Container{{Name: "a", Host: "h", Address: netip.MustParseAddr("10.255.1.2"), Answers: true}, {Name: "b", Host: "h", Address: netip.MustParseAddr("10.255.1.3"), Answers: true}},
			Paths:      []lab.Path{{From: "a", To: "b", OK: true}, {From: "b", To: "a", OK: true}},
		}
	}
	if !whole().Whole() {
		t.Fatal("a whole lab does not count as one")
	}
	for what, damage := range map[string]func(*lab.Status){
		"no hosts":        func(s *lab.Status) { s.Hosts = nil },
		"no lease":        func(s *lab.Status) { s.Hosts[0].Lease = netip.Prefix{} },
		"degraded":        func(s *lab.Status) { s.Hosts[0].State = "degraded" },
		"not attached":    func(s *lab.Status) { s.Containers[1].Address = netip.Addr{} },
		"not answering":   func(s *lab.Status) { s.Containers[1].Answers = false },
		"a path missing":  func(s *lab.Status) { s.Paths = s.Paths[:1] },
		"a path failing":  func(s *lab.Status) { s.Paths[1].OK = false },
		"a host's error":  func(s *lab.Status) { s.Hosts[0].Error = "x" },
		"a name missing":  func(s *lab.Status) { s.Names = []lab.Name{{Name: "web.apps.internal", Missing: []string{"h"}}} },
		"no names":        func(s *lab.Status) { s.Hosts[0].Naming = lab.NoAnswer },
		"no TLS":          func(s *lab.Status) { s.Hosts[0].Proxying = "degraded" },
		"container error": func(s *lab.Status) { s.Containers[0].Error = "x" },
	} {
		s := whole()
		if damage(&s); s.Whole() {
			t.Errorf("%s: counts as whole", what)
		}
	}
}
