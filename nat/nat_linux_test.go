package nat_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/nat"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func config(local, no []netip.Prefix) nat.Config {
	return nat.Config{Local: local, NoMasquerade: no, VTEP: "silk-vtep"}
}

func set(t testing.TB, ns *kernel.NS, c nat.Config) {
	t.Helper()
	if err := nat.Set(context.Background(), ns, c); err != nil {
		t.Fatal(err)
	}
}

func explain(t testing.TB, ns *kernel.NS, c nat.Config) []string {
	t.Helper()
	texts, err := nat.Explain(context.Background(), ns, c)
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// nft runs nft(8) in ns.
func nft(t testing.TB, ns *kernel.NS, args ...string) string {
	t.Helper()
	tool, err := exec.LookPath("nft")
	testkit.Require(t, "nft", err)
	var out []byte
	if err := ns.Do(func() (err error) { out, err = exec.Command(tool, args...).CombinedOutput(); return err }); err != nil {
		t.Fatalf("nft %v: %v: %s", args, err, out)
	}
	return string(out)
}

// TestListing holds what the nft of Debian 12 makes of our rule.
func TestListing(t *testing.T) {
	ns := netns.New(t)
	set(t, ns, config(prefixes("10.255.30.0/24"), prefixes("10.255.0.0/16", "192.168.7.0/24")))
	testkit.Listing(t, "testdata/listing.nft", nft(t, ns, "list", "table", "inet", nat.Table), *update)
}

// states are configurations to jump between.
func states() []nat.Config {
	return []nat.Config{
		config(nil, nil),
		config(prefixes("10.255.30.0/24"), nil),
		config(prefixes("10.255.30.0/24"), prefixes("10.255.0.0/16")),
		config(prefixes("10.255.30.0/24", "10.254.7.0/24"), prefixes("10.255.0.0/16", "10.254.0.0/16")),
		config(prefixes("10.255.30.0/24", "10.255.31.0/24", "10.255.30.128/25"), prefixes("10.0.0.0/8", "10.255.0.0/16")),
		config(prefixes("10.255.0.12/32"), prefixes("0.0.0.0/0")),
		config(prefixes("0.0.0.0/1", "128.0.0.0/1"), prefixes("255.255.255.255/32", "0.0.0.0/32")),
		{Local: prefixes("10.255.30.7/24"), NoMasquerade: prefixes("10.255.0.0/16"), VTEP: "other-vtep"},
	}
}

// TestRandomWalk jumps between configurations, and in between a saboteur damages what is ours and adds what is not.
func TestRandomWalk(t *testing.T) {
	ns := netns.New(t)
	nft(t, ns, "add table inet silk; add set inet silk overlay-peers { type ipv4_addr; }; add chain inet silk overlay-input { type filter hook input priority 0; }; add table ip other")
	sabotage := []string{
		"delete table inet silk; add table inet silk; add set inet silk overlay-peers { type ipv4_addr; }; add chain inet silk overlay-input { type filter hook input priority 0; }",
		"flush chain inet silk nat-postrouting",
		"insert rule inet silk nat-postrouting accept",
		"add rule inet silk nat-postrouting ip saddr 10.0.0.1 masquerade",
		"flush set inet silk nat-local",
		"add element inet silk nat-local { 192.0.2.0/24 }",
		"add element inet silk nat-no-masquerade { 192.0.2.7 }",
		"flush chain inet silk nat-postrouting; delete set inet silk nat-local",
		"flush chain inet silk nat-postrouting; delete set inet silk nat-local; add set inet silk nat-local { type ipv4_addr; timeout 1h; }",
		"flush chain inet silk nat-postrouting; delete set inet silk nat-local; add set inet silk nat-local { type inet_service; }",
		"flush chain inet silk nat-postrouting; delete chain inet silk nat-postrouting; add chain inet silk nat-postrouting { type filter hook forward priority 0; }; add rule inet silk nat-postrouting drop",
		"flush chain inet silk nat-postrouting; delete chain inet silk nat-postrouting; add chain inet silk nat-postrouting",
		"flush chain inet silk nat-postrouting; delete chain inet silk nat-postrouting; add chain inet silk nat-postrouting { type nat hook postrouting priority 101; }",
		"flush chain inet silk nat-postrouting; add rule inet silk nat-postrouting ip saddr @nat-local ip daddr != @nat-local ip daddr != @nat-local oifname != \"silk-vtep\" masquerade",
		"flush chain inet silk nat-postrouting; add rule inet silk nat-postrouting ip saddr @nat-local ip daddr != @nat-local ip daddr != @nat-no-masquerade oifname \"silk-vtep\" masquerade",
		"flush chain inet silk nat-postrouting; add rule inet silk nat-postrouting ip saddr @nat-local ip daddr != @nat-local ip daddr != @nat-no-masquerade oifname != \"silk-vtep\" masquerade random",
	}
	all := states()
	set(t, ns, all[0])
	for i := range 120 {
		if i%2 == 1 {
			// Some cannot be done in some states: adding what is there.
			ns.Do(func() error { return exec.Command("nft", sabotage[rand.IntN(len(sabotage))]).Run() })
		}
		c := all[rand.IntN(len(all))]
		set(t, ns, c)
		if left := explain(t, ns, c); len(left) > 0 {
			t.Fatalf("after Set(%+v) there is still to do: %q", c, left)
		}
		listing := nft(t, ns, "list ruleset")
		for _, foreign := range []string{"set overlay-peers", "chain overlay-input", "table ip other"} {
			if !strings.Contains(listing, foreign) {
				t.Fatalf("%s is gone:\n%s", foreign, listing)
			}
		}
	}
	remove(t, ns)
	remove(t, ns)
	listing := nft(t, ns, "list ruleset")
	if strings.Contains(listing, "nat-") || !strings.Contains(listing, "overlay-peers") {
		t.Errorf("after Remove:\n%s", listing)
	}
}

func remove(t testing.TB, ns *kernel.NS) {
	t.Helper()
	if err := nat.Remove(context.Background(), ns); err != nil {
		t.Fatal(err)
	}
}

func TestRemoveTakesAnEmptyTable(t *testing.T) {
	ns := netns.New(t)
	remove(t, ns)
	set(t, ns, states()[3])
	remove(t, ns)
	if got := nft(t, ns, "list ruleset"); got != "" {
		t.Errorf("left:\n%s", got)
	}
}

// TestChangesAreSmall: what agrees is not sent again.
func TestChangesAreSmall(t *testing.T) {
	ns := netns.New(t)
	set(t, ns, states()[1])
	got := explain(t, ns, states()[2])
	want := []string{"add element inet silk nat-no-masquerade { 10.255.0.0-10.255.255.255 }"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestEnsureAdds(t *testing.T) {
	ns := netns.New(t)
	for _, is := range []bool{false, true} {
		if got, err := nat.Installed(ns); err != nil || got != is {
			t.Errorf("installed %v %v, want %v", got, err, is)
		}
		if got, err := nat.Present(ns); err != nil || got != is {
			t.Errorf("present %v %v, want %v", got, err, is)
		}
		for _, local := range []string{"10.255.30.0/24", "10.254.7.0/24", "10.255.30.0/24"} {
			if err := nat.Ensure(context.Background(), ns, config(prefixes(local), prefixes("10.0.0.0/8"))); err != nil {
				t.Fatal(err)
			}
		}
		if left := explain(t, ns, config(prefixes("10.255.30.0/24", "10.254.7.0/24"), prefixes("10.0.0.0/8"))); len(left) > 0 {
			t.Errorf("%q", left)
		}
	}
	nft(t, ns, "flush chain inet silk nat-postrouting; add rule inet silk nat-postrouting accept")
	if got, err := nat.Installed(ns); err != nil || got {
		t.Errorf("with another rule installed is %v %v", got, err)
	}
	for _, change := range []string{
		"flush chain inet silk nat-postrouting",
		"add rule inet silk nat-postrouting accept; add rule inet silk nat-postrouting accept",
		"delete chain inet silk nat-postrouting; add chain inet silk nat-postrouting { type nat hook prerouting priority 100; }; add rule inet silk nat-postrouting accept",
		"delete table inet silk",
	} {
		nft(t, ns, change)
		if got, err := nat.Present(ns); err != nil || got {
			t.Errorf("after %q present is %v %v", change, got, err)
		}
	}
}

func TestManySetAtOnce(t *testing.T) {
	ns := netns.New(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			c := config(prefixes(fmt.Sprintf("10.255.%d.0/24", i)), nil)
			if err := nat.Ensure(context.Background(), ns, c); err != nil && !errors.Is(err, fault.Unavailable) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := strings.Count(nft(t, ns, "list table inet silk"), "masquerade\n"); n != 1 {
		t.Errorf("%d rules, want 1", n)
	}
}

// TestWatch: whoever changes what is ours is heard, and nobody else.
func TestWatch(t *testing.T) {
	ns := netns.New(t)
	set(t, ns, config(prefixes("10.255.30.0/24"), nil))
	ctx, cancel := context.WithCancel(context.Background())
	heard, done := make(chan struct{}, 100), make(chan error, 1)
	go func() { done <- nat.Watch(ctx, ns, func() { heard <- struct{}{} }) }()
	wait := func(what string) {
		t.Helper()
		select {
		case <-heard:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s was not heard", what)
		}
	}
	wait("the beginning")
	for _, command := range []string{
		"flush chain inet silk nat-postrouting", "delete chain inet silk nat-postrouting",
		"flush set inet silk nat-local", "delete set inet silk nat-local", "delete table inet silk",
	} {
		nft(t, ns, command)
		wait(command)
	}
	nft(t, ns, "add table inet silk; add chain inet silk foreign; add rule inet silk foreign accept")
	wait("the table")
	nft(t, ns, "add table ip silk; add chain ip silk nat-postrouting; add rule inet silk foreign drop; add set inet silk other { type ipv4_addr; }")
	set(t, ns, config(prefixes("10.255.30.0/24"), nil))
	wait("Set")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(heard); n > 0 {
		t.Errorf("woken %d times by what is not ours", n)
	}
}

func TestConfigIsJudged(t *testing.T) {
	ns := netns.New(t)
	for _, c := range []nat.Config{
		{}, {VTEP: "name-of-sixteen-"}, {VTEP: "a*"}, {VTEP: "a\x00b"},
		config(prefixes("fd00::/64"), nil), config(nil, []netip.Prefix{{}}),
	} {
		if err := nat.Set(context.Background(), ns, c); !errors.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v, want invalid", c, err)
		}
	}
}

// TestTraffic sends packets from a container to a neighbour of the host, and looks at where they seem to come from.
func TestTraffic(t *testing.T) {
	host, c, outside := netns.New(t), netns.New(t), netns.New(t)
	ip := func(ns *kernel.NS, args string) {
		t.Helper()
		if err := ns.Do(func() error {
			out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("ip %s: %w: %s", args, err, out)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	join := func(a, b *kernel.NS, name, addrA, addrB string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "netns")
		if err := b.Bind(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { kernel.UnbindNS(path) })
		ip(a, "link add "+name+" type veth peer name eth0 netns "+path)
		ip(a, "addr add "+addrA+" dev "+name)
		ip(b, "addr add "+addrB+" dev eth0")
		ip(a, "link set "+name+" up")
		ip(b, "link set eth0 up")
	}
	join(host, c, "c0", "10.255.30.1/24", "10.255.30.2/24")
	join(host, outside, "out0", "192.0.2.1/24", "192.0.2.9/24")
	ip(c, "route add default via 10.255.30.1")
	ip(outside, "route add 10.255.30.0/24 via 192.0.2.1")
	ip(outside, "addr add 10.254.0.9/32 dev eth0")
	ip(host, "route add 10.254.0.9/32 dev out0")
	if err := host.Do(func() error { return kernel.SetSysctl("net/ipv4/ip_forward", "1") }); err != nil {
		t.Fatal(err)
	}
	seen := func(to string) string {
		t.Helper()
		var l net.Listener
		if err := outside.Do(func() (err error) { l, err = net.Listen("tcp4", to+":0"); return err }); err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		from := make(chan string, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				from <- err.Error()
				return
			}
			defer conn.Close()
			from <- conn.RemoteAddr().(*net.TCPAddr).IP.String()
		}()
		if err := c.Do(func() error {
			conn, err := net.DialTimeout("tcp4", l.Addr().String(), 5*time.Second)
			if err == nil {
				conn.Close()
			}
			return err
		}); err != nil {
			return err.Error()
		}
		return <-from
	}
	for _, tt := range []struct {
		name, to string
		c        nat.Config
		want     string
	}{
		{"leaves the overlay", "192.0.2.9", config(prefixes("10.255.30.0/24"), prefixes("10.254.0.0/16")), "192.0.2.1"},
		{"no_masquerade", "10.254.0.9", config(prefixes("10.255.30.0/24"), prefixes("10.254.0.0/16")), "10.255.30.2"},
		{"by the VTEP", "192.0.2.9", nat.Config{Local: prefixes("10.255.30.0/24"), VTEP: "out0"}, "10.255.30.2"},
		{"another's subnet", "192.0.2.9", config(prefixes("10.255.31.0/24"), nil), "10.255.30.2"},
		{"within the subnet", "192.0.2.9", config(prefixes("10.255.30.0/24", "192.0.2.0/24"), nil), "10.255.30.2"},
	} {
		set(t, host, tt.c)
		if got := seen(tt.to); got != tt.want {
			t.Errorf("%s: source %s, want %s", tt.name, got, tt.want)
		}
	}
}
