package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"github.com/google/go-cmp/cmp"
)

func TestBaseOf(t *testing.T) {
	overlay := netip.MustParsePrefix("10.255.0.0/16")
	for _, c := range []struct{ name, mac, addrs, want string }{
		{"as it should be", "ee:ee:0a:ff:1e:00", "10.255.30.0/16", "10.255.30.0"},
		{"no address", "ee:ee:0a:ff:1e:00", "", "10.255.30.0"},
		{"a stranger's address beside it", "ee:ee:0a:ff:1e:00", "10.255.9.0/16 192.0.2.1/24 10.255.30.0/16", "10.255.30.0"},
		{"only a stranger's address", "ee:ee:0a:ff:1e:00", "192.0.2.1/24", "10.255.30.0"},
		{"MAC changed by a stranger", "02:00:00:00:00:01", "10.255.30.0/16 192.0.2.1/24", "10.255.30.0"},
		{"old network, other prefix length", "ee:ee:0a:fe:03:00", "10.254.3.0/15", "10.254.3.0"},
		{"nothing tells", "02:00:00:00:00:01", "192.0.2.1/24", ""},
		{"two could be", "02:00:00:00:00:01", "10.255.30.0/16 10.255.31.0/16", ""},
		{"no MAC", "", "fe80::1/64", ""},
	} {
		var mac net.HardwareAddr
		if c.mac != "" {
			mac, _ = net.ParseMAC(c.mac)
		}
		var addrs []netip.Prefix
		for _, a := range strings.Fields(c.addrs) {
			addrs = append(addrs, netip.MustParsePrefix(a))
		}
		want := netip.Addr{}
		if c.want != "" {
			want = netip.MustParseAddr(c.want)
		}
		if got := baseOf(mac, addrs, overlay); got != want {
			t.Errorf("%s: %v, want %v", c.name, got, want)
		}
	}
}

func FuzzContainerAddress(f *testing.F) {
	for _, s := range []string{"s-010255030002", "s-256000000000", "s-01025503000", "s-+10255030002", "c-010255030002", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if a, ok := containerAddress(s); ok {
			b := a.As4()
			want := "s-"
			for _, o := range b {
				want += string([]byte{'0' + o/100, '0' + o/10%10, '0' + o%10})
			}
			if s != want {
				t.Errorf("%q was read as %v, whose device is %s", s, a, want)
			}
		}
	})
}

func FuzzParseResolvers(f *testing.F) {
	f.Add("# x\nnameserver 10.0.0.2\nnameserver fe80::1%eth0\n nameserver\t::ffff:10.0.0.3 # y\nsearch nameserver\nnameserver x\n")
	f.Add(strings.Repeat("a", 70000))
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseResolvers(strings.NewReader(s))
		for _, a := range got {
			if err == nil && (!a.IsValid() || a.Is4In6() || a.Zone() != "") {
				t.Errorf("%q gave %v", s, a)
			}
		}
	})
}

func TestParseResolvers(t *testing.T) {
	got, err := parseResolvers(strings.NewReader("# nameserver 1.1.1.1\nnameserver 10.0.0.2\noptions ndots:5\nnameserver ::ffff:10.0.0.3\n"))
	if diff := cmp.Diff([]string{"10.0.0.2", "10.0.0.3"}, []string{got[0].String(), got[1].String()}); diff != "" || err != nil || len(got) != 2 {
		t.Errorf("(-want +got):\n%s%v", diff, err)
	}
	if got, err := resolvers("/no/such/file"); got != nil || err != nil {
		t.Errorf("no file: %v, %v", got, err)
	}
}

func TestConntrackMax(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct{ addresses, memory, want uint64 }{
		{256, 24 * gib, 1048576},              // a /24
		{256, 1 * gib, 262144},                // little memory: the kernel's usual size
		{4096, 24 * gib, 24 * gib / 16 / 384}, // a /20: bounded by memory
		{1, 24 * gib, 262144},                 // a single address
	} {
		if got := conntrackMax(c.addresses, c.memory); got != c.want {
			t.Errorf("conntrackMax(%d, %d) = %d, want %d", c.addresses, c.memory, got, c.want)
		}
	}
	if n, err := parseMemory("MemFree: 1 kB\nMemTotal:       24689012 kB\n"); n != 24689012<<10 || err != nil {
		t.Errorf("parseMemory = %d, %v", n, err)
	}
	if _, err := parseMemory("x"); err == nil {
		t.Error("no MemTotal was read")
	}
}

func TestStoreAddresses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store.json")
	read := func() ([]netip.Addr, error) { return storeAddresses(t.Context(), path) }
	if got, err := read(); got != nil || err != nil {
		t.Errorf("no file: %v, %v", got, err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("reading made the file")
	}
	for text, want := range map[string]string{
		"":     "",
		"{}\n": "",
		`{"b":{"handle":"b","ip":"10.255.30.3","metadata":null},"a":{"handle":"a","ip":"10.255.30.2","metadata":{"x":1}}}` + "\n": "10.255.30.2 10.255.30.3",
	} {
		os.WriteFile(path, []byte(text), 0o600)
		got, err := read()
		var texts []string
		for _, a := range got {
			texts = append(texts, a.String())
		}
		if strings.Join(texts, " ") != want || err != nil {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"{", "[]", `{"a":{"ip":"x"}}`} {
		os.WriteFile(path, []byte(text), 0o600)
		if got, err := read(); err == nil {
			t.Errorf("%q gave %v", text, got)
		}
	}
}

// TestLockedStoreCostsNothingThatStays reads again and again while a stuck writer holds the lock.
func TestLockedStoreCostsNothingThatStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.json")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := kernel.Flock(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	read := func() {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := storeAddresses(ctx, path); !errors.Is(err, fault.Unavailable) {
			t.Fatalf("a locked store was read: %v", err)
		}
	}
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds) + runtime.NumGoroutine()
	}
	read()
	before := count()
	for range 20 {
		read()
	}
	if after := count(); after > before+5 {
		t.Errorf("%d descriptors and goroutines, %d before", after, before)
	}
	f.Close()
	if _, err := storeAddresses(t.Context(), path); err != nil {
		t.Errorf("after the writer: %v", err)
	}
}

func FuzzParseStore(f *testing.F) {
	f.Add([]byte(`{"a":{"handle":"a","ip":"10.255.30.2","metadata":null}}`))
	f.Add([]byte(`{"a":null}`))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseStore(b)
		if err == nil && (!slices.IsSortedFunc(got, netip.Addr.Compare) || slices.ContainsFunc(got, func(a netip.Addr) bool { return !a.IsValid() })) {
			t.Errorf("%q gave %v", b, got)
		}
	})
}

func TestStateSurvives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state")
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Lease(); got != (Saved{}) || err != nil {
		t.Errorf("nothing saved: %v, %v", got, err)
	}
	want := Saved{Lease: mine("10.255.0.12/32"), Confirmed: noon, Lost: true}
	p := lease.NewPeers(time.Second)
	p.List([]lease.Lease{mine("10.255.30.0/24")}, true, noon)
	if err := s.SetLease(want); err != nil {
		t.Fatal(err)
	}
	if err := s.SetPeers(p.State()); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, durable.Temp+"1"), []byte("half"), 0o600)
	if s, err = OpenState(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Lease(); got != want || err != nil {
		t.Errorf("read %+v, %v, want %+v", got, err, want)
	}
	if got, err := s.Peers(); len(got.Leases) != 1 || err != nil {
		t.Errorf("read %+v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("%v is left", left)
	}
	for _, text := range []string{"", "{", `{"underlay_ip":"10.0.0.1","overlay_subnet":"10.255.30.1/24"}`, `{"underlay_ip":"::1","overlay_subnet":"10.255.30.0/24"}`, "null", "[]"} {
		os.WriteFile(filepath.Join(dir, leaseFile), []byte(text), 0o600)
		if got, err := s.Lease(); err == nil || got != (Saved{}) {
			t.Errorf("%q: %v, %v, want an error and nothing", text, got, err)
		}
	}
	if err := s.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the directory is left")
	}
}

func FuzzStateLease(f *testing.F) {
	f.Add([]byte(`{"underlay_ip":"10.0.0.1","overlay_subnet":"10.255.30.0/24","confirmed":"2026-05-01T12:00:00Z","lost":true}`))
	f.Add([]byte(`{"underlay_ip":"10.0.0.1"}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		os.WriteFile(filepath.Join(dir, leaseFile), b, 0o600)
		if got, err := (State{dir: dir}).Lease(); err == nil && got.Lease.Validate() != nil {
			t.Errorf("%q gave %v", b, got)
		}
	})
}

// TestInitialNamespaceUnderTheUnit: process 1 may do more than a daemon with its unit's capabilities, or with fewer, so that only one that may trace it sees its
// namespace.
func TestInitialNamespaceUnderTheUnit(t *testing.T) {
	const key = "SILK_TEST_INITIAL_NAMESPACE"
	if want, ok := os.LookupEnv(key); ok {
		if got := initialNamespace(); fmt.Sprint(got) != want {
			t.Errorf("initialNamespace() = %v, want %s", got, want)
		}
		return
	}
	outside := fmt.Sprintf("/proc/%d/ns/net", os.Getppid()) // where these tests were started: usually the machine's own
	mode, err := exec.Command("nsenter", "--net="+outside, "stat", "-c", "%A", "/proc/sys/net/netfilter/nf_conntrack_max").Output()
	if err != nil {
		testkit.Require(t, "conntrack", fmt.Errorf("not run by root, or without connection tracking: %w", err))
	}
	want := fmt.Sprint(strings.Contains(string(mode), "w"))
	b, err := os.ReadFile("../packaging/systemd/silk-daemon.service")
	if err != nil {
		t.Fatal(err)
	}
	_, caps, _ := strings.Cut(string(b), "\nCapabilityBoundingSet=")
	caps, _, _ = strings.Cut(caps, "\n")
	unit := "-all,+" + strings.ReplaceAll(strings.ToLower(strings.ReplaceAll(caps, "CAP_", "")), " ", ",+")
	for _, c := range []struct{ where, bound, want string }{
		{outside, unit, want},
		{outside, unit + ",-sys_ptrace", want},
		{"/proc/self/ns/net", unit, "false"},
		{"/proc/self/ns/net", unit + ",-sys_ptrace", "false"},
	} {
		cmd := exec.Command("nsenter", "--net="+c.where, "--", "setpriv", "--bounding-set="+c.bound, os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), key+"="+c.want)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("in %s with %s: %v\n%s", c.where, c.bound, err, out)
		}
	}
}
