package endpoint_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"github.com/google/go-cmp/cmp"
)

func TestCollect(t *testing.T) {
	h := newHost(t)
	for _, id := range []string{"c1", "c2", "c3"} {
		h.must(h.attach(h.spec(id, netns.New(t))))
	}
	foreign := h.spec("c1", netns.New(t))
	foreign.Network = "other"
	h.must(h.attach(foreign))
	collect := func(valid ...endpoint.Key) (n int) {
		t.Helper()
		if err := h.ns.Do(func() (err error) {
			n, err = h.dir.Collect(context.Background(), "silk", valid, nil)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := collect(key("c1"), key("c2"), key("c3")); n != 0 {
		t.Errorf("removed %d valid ones", n)
	}
	eth1 := key("c1")
	eth1.Interface = "eth1"
	if n := collect(key("c2"), eth1); n != 2 {
		t.Errorf("removed %d, want c1 and c3", n)
	}
	h.spoil("garbage") // of the other network: the name comes first in the order
	if n := collect(); n != 1 {
		t.Errorf("removed %d with an empty list, want c2", n)
	}
	if f := h.files(); len(f) != 1 || !strings.HasPrefix(f[0], "other@") {
		t.Errorf("records %v, want the other network's", f)
	}
}

func TestRecordsOfAnEarlierBootAreVoid(t *testing.T) {
	h := newHost(t)
	h.must(h.attach(h.spec("c1", netns.New(t))))
	if err := os.WriteFile(filepath.Join(h.dir.Path(), ".boot"), []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, bad, err := h.dir.List(); len(r)+len(bad) != 0 || err != nil {
		t.Errorf("listed %v %v %v, want nothing", r, bad, err)
	}
	h.must(h.attach(h.spec("c2", netns.New(t))))
	if f := h.files(); len(f) != 1 || !strings.Contains(f[0], "@c2@") {
		t.Errorf("records %v, want c2's", f)
	}
}

func TestListReportsBadRecords(t *testing.T) {
	h := newHost(t)
	good := h.must(h.attach(h.spec("c2", netns.New(t))))
	h.must(h.attach(h.spec("c1", netns.New(t))))
	h.spoil("{}") // c1's comes first
	records, bad, err := h.dir.List()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]endpoint.Record{good}, records, comparable); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	if len(bad) != 1 || bad[0].Key != key("c1") || bad[0].Addresses[0].String() != "10.255.30.3" || bad[0].Err == nil {
		t.Errorf("bad %+v, want c1's", bad)
	}
	if _, err := h.dir.Lookup(key("none")); !errors.Is(err, fault.NotFound) {
		t.Errorf("lookup of none: %v, want not found", err)
	}
	empty, err := endpoint.Open(filepath.Join(t.TempDir(), "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(empty.Path()); err != nil {
		t.Fatal(err)
	}
	if r, bad, err := empty.List(); len(r)+len(bad) != 0 || err != nil {
		t.Errorf("a directory that is not there: %v %v %v", r, bad, err)
	}
}

func TestSpecIsJudged(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	for name, change := range map[string]func(*endpoint.Spec){
		"no network":       func(s *endpoint.Spec) { s.Network = "" },
		"network with @":   func(s *endpoint.Spec) { s.Network = "a@b" },
		"container with /": func(s *endpoint.Spec) { s.Container = "../x" },
		"interface with /": func(s *endpoint.Spec) { s.Interface = "a/b" },
		"long interface":   func(s *endpoint.Spec) { s.Interface = strings.Repeat("x", 16) },
		"long names":       func(s *endpoint.Spec) { s.Container = strings.Repeat("x", 250) },
		"MTU":              func(s *endpoint.Spec) { s.MTU = 67 },
		"IPv6 request":     func(s *endpoint.Spec) { s.Requested = netip.MustParseAddr("fd00::1") },
		"IPv6 subnet":      func(s *endpoint.Spec) { s.Subnet = netip.MustParsePrefix("fd00::/64") },
		"no subnet":        func(s *endpoint.Spec) { s.Subnet = netip.Prefix{} },
	} {
		s := h.spec("c1", c)
		change(&s)
		if _, err := h.attach(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	h.clean()
}

// TestConnectionsOfEarlierHolders: neither what was there before the first ADD nor what a container leaves meets the next
// holder of its address; a living container keeps its own.
func TestConnectionsOfEarlierHolders(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	h := newHost(t)
	run := func(args ...string) string {
		t.Helper()
		var out []byte
		if err := h.ns.Do(func() (err error) { out, err = exec.Command(tool, args...).CombinedOutput(); return err }); err != nil {
			t.Fatalf("conntrack %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	connect := func(from, to, port string) {
		t.Helper()
		run("-I", "-p", "udp", "-s", from, "-d", to, "-r", to, "-q", from, "--sport", port, "--dport", "53", "--reply-port-src", "53", "--reply-port-dst", port, "-t", "600")
	}
	want := func(when string, ports ...string) {
		t.Helper()
		got := run("-L")
		for _, p := range []string{"1001", "1002", "1003", "1004", "1005"} {
			if is := strings.Contains(got, "sport="+p); is != slices.Contains(ports, p) {
				t.Errorf("%s: connection %s is there: %v", when, p, is)
			}
		}
	}
	ip(t, h.ns, "link", "add", "s-010255030009", "type", "veth", "peer", "name", "x") // an earlier release's container
	connect("10.255.30.2", "192.0.2.1", "1001")
	connect("192.0.2.1", "10.255.30.200", "1002")
	connect("10.255.30.9", "192.0.2.1", "1003")
	connect("10.255.31.2", "192.0.2.1", "1004") // another subnet
	r := h.must(h.attach(h.spec("c1", netns.New(t))))
	want("after the first ADD", "1003", "1004")
	connect("192.0.2.1", r.Address().String(), "1005")
	h.must(h.attach(h.spec("c2", netns.New(t))))
	want("after the second ADD", "1003", "1004", "1005")
	if err := h.detach(r.Key, nil); err != nil {
		t.Fatal(err)
	}
	want("after the DEL", "1003", "1004")
}
