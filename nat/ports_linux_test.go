package nat_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/nat"
	"github.com/google/go-cmp/cmp"
)

func portMap(protocol uint8, host string, to string) nat.PortMap {
	m := nat.PortMap{Protocol: protocol, To: netip.MustParseAddrPort(to)}
	if addr, ok := strings.CutPrefix(host, ":"); ok {
		host = "0.0.0.0:" + addr
		m.Host = netip.AddrPortFrom(netip.Addr{}, netip.MustParseAddrPort(host).Port())
	} else {
		m.Host = netip.MustParseAddrPort(host)
	}
	return m
}

func nobody(netip.Addr) (bool, error)  { return false, nil }
func anybody(netip.Addr) (bool, error) { return true, nil }

func mapPorts(t testing.TB, ns *kernel.NS, live func(netip.Addr) (bool, error), maps ...nat.PortMap) error {
	t.Helper()
	return ns.Do(func() error { return nat.MapPorts(context.Background(), maps, live) })
}

func unmapPorts(t testing.TB, ns *kernel.NS, maps ...nat.PortMap) {
	t.Helper()
	if err := ns.Do(func() error {
		wait, err := nat.UnmapPorts(context.Background(), maps)
		wait()
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// missing returns what is missing of the maps, and "frame" if more is.
func missing(t testing.TB, ns *kernel.NS, maps ...nat.PortMap) []string {
	t.Helper()
	var out []string
	if err := ns.Do(func() error {
		list, whole, err := nat.MissingPorts(maps)
		for _, m := range list {
			out = append(out, m.String())
		}
		if !whole {
			out = append(out, "frame")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPortMapListing holds what the nft of Debian 12 makes of the chains and maps.
func TestPortMapListing(t *testing.T) {
	ns := netns.New(t)
	set(t, ns, config(prefixes("10.255.30.0/24"), nil))
	maps := []nat.PortMap{
		portMap(nat.TCP, ":8080", "10.255.30.2:80"), portMap(nat.UDP, "10.0.16.15:53", "10.255.30.2:5353"),
	}
	if err := mapPorts(t, ns, nobody, maps...); err != nil {
		t.Fatal(err)
	}
	if m := missing(t, ns, maps...); m != nil {
		t.Errorf("missing: %v", m)
	}
	text := nft(t, ns, "list", "table", "inet", nat.Table)
	testkit.Listing(t, "testdata/ports.nft", text, *update)
	before := nft(t, ns, "list", "ruleset")
	if err := mapPorts(t, ns, nobody, maps...); err != nil {
		t.Fatal(err)
	}
	set(t, ns, config(prefixes("10.255.30.0/24"), nil)) // looks after other things
	if diff := cmp.Diff(before, nft(t, ns, "list", "ruleset")); diff != "" {
		t.Errorf("mapped once more (-before +after):\n%s", diff)
	}
	unmapPorts(t, ns, maps...)
	unmapPorts(t, ns, maps...)
	if text := nft(t, ns, "list", "ruleset"); strings.Contains(text, "elements = { tcp") || strings.Contains(text, "10.0.16.15") || strings.Contains(text, "10.255.30.2") {
		t.Errorf("left:\n%s", text)
	}
	if err := nat.Remove(context.Background(), ns); err != nil {
		t.Fatal(err)
	}
	if text := nft(t, ns, "list", "ruleset"); text != "" {
		t.Errorf("left:\n%s", text)
	}
}

func TestAPortBelongsToOne(t *testing.T) {
	ns := netns.New(t)
	first, second := portMap(nat.TCP, ":8080", "10.255.30.2:80"), portMap(nat.TCP, ":8080", "10.255.30.3:80")
	other := portMap(nat.TCP, ":8081", "10.255.30.3:80")
	if err := mapPorts(t, ns, anybody, first); err != nil {
		t.Fatal(err)
	}
	if err := mapPorts(t, ns, anybody, other, second); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "leads to 10.255.30.2") {
		t.Errorf("taken port: %v", err)
	}
	if m := missing(t, ns, first, other); len(m) != 1 {
		t.Errorf("missing %v, want the one that came with the refused", m)
	}
	unmapPorts(t, ns, second) // leads elsewhere
	if m := missing(t, ns, first); m != nil {
		t.Errorf("missing: %v", m)
	}
	if err := mapPorts(t, ns, nobody, second, other); err != nil {
		t.Errorf("port of nobody: %v", err)
	}
	if m := missing(t, ns, second, other); m != nil {
		t.Errorf("missing: %v", m)
	}
}

// TestPortMapsAreRepaired damages the table in every way and lets MapPorts and SetPorts mend it.
func TestPortMapsAreRepaired(t *testing.T) {
	ns := netns.New(t)
	maps := []nat.PortMap{portMap(nat.TCP, ":8080", "10.255.30.2:80"), portMap(nat.UDP, "10.0.16.15:53", "10.255.30.2:5353")}
	set(t, ns, config(prefixes("10.255.30.0/24"), nil))
	if err := mapPorts(t, ns, nobody, maps...); err != nil {
		t.Fatal(err)
	}
	want := nft(t, ns, "list", "ruleset")
	for _, damage := range []string{
		"flush ruleset", "delete element inet silk nat-ports { tcp . 8080 }", "flush set inet silk nat-self", "flush chain inet silk nat-output",
		"add rule inet silk nat-prerouting accept", "flush chain inet silk nat-ports|add rule inet silk nat-ports accept|add rule inet silk nat-ports accept",
		"flush chain inet silk nat-hairpin|delete chain inet silk nat-hairpin|add chain inet silk nat-hairpin { type nat hook postrouting priority 7; }",
		"add element inet silk nat-ports { udp . 7 : 10.255.30.9 . 7 }",
		"flush chain inet silk nat-hairpin|delete set inet silk nat-self|add set inet silk nat-self { type inet_service; }",
		"flush chain inet silk nat-loopback",
	} {
		for line := range strings.SplitSeq(damage, "|") {
			nft(t, ns, strings.Fields(line)...)
		}
		changed := -1
		if err := ns.Do(func() (err error) {
			changed, err = nat.SetPorts(context.Background(), func([]nat.PortMap, bool) ([]nat.PortMap, func(), error) { return maps, func() {}, nil })
			return err
		}); err != nil || changed == 0 {
			t.Errorf("after %q: changed %d, %v", damage, changed, err)
		}
		set(t, ns, config(prefixes("10.255.30.0/24"), nil))
		if diff := cmp.Diff(sortTable(want), sortTable(nft(t, ns, "list", "ruleset"))); diff != "" {
			t.Errorf("after %q (-want +got):\n%s", damage, diff)
		}
	}
}

// sortTable puts the objects of a listing in order: those made again are listed last.
func sortTable(text string) string {
	parts := strings.Split(strings.ReplaceAll(text, "\n\n", "\n"), "\n\t}\n")
	for i := range parts {
		parts[i] = strings.TrimPrefix(parts[i], "table inet silk {\n")
	}
	return strings.Join(slices.Sorted(slices.Values(parts)), "\n")
}

var errTaken = errors.New("taken")

func port(n int) string { return strconv.Itoa(n) }

func TestParallelMaps(t *testing.T) {
	ns := netns.New(t)
	const n = 64
	errs := make(chan error, 2*n)
	for i := range n {
		to := netip.AddrFrom4([4]byte{10, 255, 30, byte(i + 2)}).String()
		own, shared := portMap(nat.TCP, ":"+port(1000+i), to+":80"), portMap(nat.TCP, ":999", to+":80")
		go func() { errs <- mapPorts(t, ns, anybody, own) }()
		go func() {
			err := mapPorts(t, ns, anybody, shared)
			if errors.Is(err, fault.Conflict) {
				err = errTaken
			}
			errs <- err
		}()
	}
	taken := 0
	for range 2 * n {
		switch err := <-errs; {
		case errors.Is(err, errTaken):
			taken++
		case err != nil:
			t.Error(err)
		}
	}
	if taken != n-1 {
		t.Errorf("%d of %d were refused the port that all want, want all but one", taken, n)
	}
	if got := strings.Count(nft(t, ns, "list", "map", "inet", "silk", "nat-ports"), " : "); got != n+2 { // one in the declaration
		t.Errorf("%d maps, want %d", got-1, n+1)
	}
}
