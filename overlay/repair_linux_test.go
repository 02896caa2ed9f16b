package overlay_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/overlay"
)

// keep runs Set in a loop that Watch wakes, until the test ends. It returns how many passes there were.
func (h *host) keep(c overlay.Config) func() uint64 {
	h.t.Helper()
	loop := &reconcile.Loop{Name: "overlay", Log: slog.New(slog.DiscardHandler), Retry: 20 * time.Millisecond,
		Step: func(ctx context.Context) error { _, err := h.f.Set(ctx, c); return err }}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { loop.Run(ctx) })
	wg.Go(func() {
		if err := h.f.Watch(ctx, loop.Kick); err != nil {
			h.t.Errorf("watch: %v", err)
		}
	})
	h.t.Cleanup(func() { cancel(); wg.Wait() })
	return func() uint64 { return loop.Stats().Passes }
}

// sabotage lists what another actor may do to what is ours. Each is repaired within a second of its end.
var sabotage = []string{
	"ip link del silk-vtep",
	"ip link set silk-vtep down",
	"ip link set silk-vtep address 02:00:00:00:00:01",
	"ip link set silk-vtep mtu 1300",
	"ip link set silk-vtep txqueuelen 500",
	"ip link set eth0 mtu 9000",
	"ip link add br0 type bridge; ip link set silk-vtep master br0",
	"ip addr flush dev silk-vtep",
	"ip addr add 10.255.99.1/16 scope link dev silk-vtep",
	"ip addr add 10.255.99.1/24 dev silk-vtep",
	"sysctl -qw net.ipv6.conf.silk-vtep.disable_ipv6=0; ip link set silk-vtep down", // the kernel does not tell of the sysctl alone
	"ip addr add 10.255.30.7/16 scope link dev silk-vtep; ip addr del 10.255.30.0/16 dev silk-vtep || true",
	"ip addr del 10.255.30.0/16 dev silk-vtep; ip addr add 10.255.30.0/24 dev silk-vtep",
	"ip route flush dev silk-vtep",
	"ip route del 10.255.0.0/16 dev silk-vtep",
	"ip route del 10.255.2.0/24",
	"ip route replace 10.255.2.0/24 via 10.255.0.12 dev silk-vtep proto 83 metric 513",
	"ip route replace 10.255.2.0/24 dev lo metric 513",
	"ip route append 10.255.2.0/24 via 10.255.0.12 dev silk-vtep proto 83 metric 513",
	"ip route prepend 10.255.2.0/24 via 10.255.0.12 dev silk-vtep metric 513",
	"ip route add 10.255.2.0/24 via 10.255.2.0 dev silk-vtep proto 83",
	"ip route change 10.255.2.0/24 via 10.255.2.0 dev silk-vtep proto 83 src 10.255.30.0 metric 513 mtu 900",
	"ip route add 10.255.2.128/25 via 10.255.0.12 dev silk-vtep proto static",
	"ip neigh del 10.255.2.0 dev silk-vtep",
	"ip neigh flush dev silk-vtep nud permanent",
	"ip neigh replace 10.255.2.0 lladdr 02:00:00:00:00:02 dev silk-vtep nud permanent",
	"ip neigh replace 10.255.2.0 lladdr ee:ee:0a:ff:02:00 dev silk-vtep nud reachable",
	"ip neigh add 10.255.2.9 lladdr 02:00:00:00:00:02 dev silk-vtep nud permanent",
	"bridge fdb del ee:ee:0a:ff:02:00 dev silk-vtep dst 10.0.16.16",
	"bridge fdb replace ee:ee:0a:ff:02:00 dev silk-vtep dst 10.0.16.99 self permanent",
	"bridge fdb replace ee:ee:0a:ff:02:00 dev silk-vtep dst 10.0.16.16 port 9 self permanent",
	"bridge fdb replace ee:ee:0a:ff:02:00 dev silk-vtep dst 10.0.16.16 self dynamic",
	"bridge fdb append 00:00:00:00:00:00 dev silk-vtep dst 10.0.16.99 self permanent",
	"bridge fdb add 02:00:00:00:00:03 dev silk-vtep dst 10.0.16.99 self permanent",
	"bridge fdb flush dev silk-vtep",
	"ip link set silk-vtep type vxlan remote 10.0.16.99",
	"nft flush ruleset",
	"nft delete table inet silk",
	"nft flush table inet silk",
	"nft flush chain inet silk overlay-input",
	"nft delete chain inet silk overlay-output",
	"nft insert rule inet silk overlay-prerouting accept",
	"nft add rule inet silk overlay-input socket transparent 1 accept",
	"nft 'chain inet silk overlay-input { policy drop; }'",
	`nft 'delete element inet silk overlay-own { "s-010255030002" . 10.255.30.2 }'`,
	`nft 'add chain inet silk another; add rule inet silk another iifname . ip saddr @overlay-own accept; add element inet silk overlay-own { "s-010255030002" . 10.255.30.3 }; flush chain inet silk overlay-input'`,
	`nft 'add element inet silk overlay-own { "s-010255030002" . 10.255.30.3 }'`,
	`nft 'flush chain inet silk overlay-prerouting; delete set inet silk overlay-own'`,
	`nft 'flush chain inet silk overlay-prerouting; delete set inet silk overlay-own; add set inet silk overlay-own { type ifname . ipv4_addr; flags interval; }'`,
	`nft 'flush chain inet silk overlay-prerouting; delete set inet silk overlay-own; add map inet silk overlay-own { type ifname . ipv4_addr : verdict; elements = { "s-010255030002" . 10.255.30.3 : accept }; }'`,
	"nft 'add table inet silk { flags dormant; }'",
	"nft add element inet silk overlay-peers { 10.0.16.99 }",
	"nft delete element inet silk overlay-peers { 10.0.16.16 }",
	"nft flush set inet silk overlay-peers",
	"nft 'flush chain inet silk overlay-input; delete set inet silk overlay-peers; add map inet silk overlay-peers { type ipv4_addr : mark; }'",
	"nft 'flush chain inet silk overlay-input; delete set inet silk overlay-peers; add set inet silk overlay-peers { type ipv4_addr; size 1; }'",
}

func TestSabotageIsRepairedWithinASecond(t *testing.T) {
	for _, script := range sabotage {
		t.Run(strings.ReplaceAll(script, "/", "_"), func(t *testing.T) {
			t.Parallel()
			h := newHost(t, "10.0.16.15")
			h.keep(example())
			whole := func() string { return h.toDo(example()) }
			testkit.Within(t, 10*time.Second, whole)
			h.sh(script)
			testkit.Within(t, patience, whole)
		})
	}
}

// TestSetRepairsInOnePass does the same without a loop: one Set must be enough.
func TestSetRepairsInOnePass(t *testing.T) {
	for _, script := range sabotage {
		t.Run(strings.ReplaceAll(script, "/", "_"), func(t *testing.T) {
			t.Parallel()
			h := newHost(t, "10.0.16.15")
			h.set(example())
			h.sh(script)
			if p := h.plan(example()); len(p) == 0 {
				t.Fatal("Set does not see that anything is wrong")
			}
			h.set(example())
			h.holds(example())
		})
	}
}

// TestCatchAllElementIsRepaired needs an nft that can make one; the kernel has it since 5.13.
func TestCatchAllElementIsRepaired(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	if out, err := h.try("nft 'add element inet silk overlay-peers { * }'"); err != nil {
		t.Skipf("this nft makes no such element: %s", out)
	}
	h.set(example())
	h.holds(example())
}

func TestWatchSleepsWhenNothingConcernsIt(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	passes := h.keep(example())
	n, since := passes(), time.Now()
	testkit.Within(t, 10*time.Second, func() string { // Watch calls once more 0.2 s after what it heard last
		if m := passes(); m != n {
			n, since = m, time.Now()
		}
		if n < 2 || time.Since(since) < time.Second {
			return fmt.Sprintf("%d passes, the last only just", n)
		}
		return ""
	})
	before := passes()
	// A container comes; another asks for addresses that nobody has; the policy agent writes its own table.
	h.sh(`ip link add s-010255030002 type veth peer name c0; ip addr add 169.254.0.1 peer 10.255.30.2/32 dev s-010255030002; ip link set s-010255030002 up
		ip neigh add 10.255.30.2 lladdr ee:ee:0a:ff:1e:02 dev s-010255030002 nud permanent
		nft add table inet silk-policy; nft add chain inet silk-policy x; nft add chain inet silk nat-out; nft add set inet silk nat-x '{ type ipv4_addr; }'`)
	for i := range 5 {
		h.send(":0", fmt.Sprintf("10.255.77.%d:9", i+1), []byte("x"))
	}
	testkit.Within(t, 20*time.Second, func() string { // the kernel has given up looking for their neighbours, and said so
		if n := strings.Count(h.sh("ip neigh show dev silk-vtep"), "FAILED"); n < 5 {
			return fmt.Sprintf("%d neighbours were looked for", n)
		}
		return ""
	})
	if after := passes(); after != before {
		t.Errorf("%d passes for changes that do not concern the overlay", after-before)
	}
}

// TestWatchWakesWhenTheUnderlayAppears starts on a host that has no address yet, as at boot.
func TestWatchWakesWhenTheUnderlayAppears(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.sh("ip addr flush dev eth0")
	if _, err := h.f.Set(context.Background(), example()); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("set without an underlay address: %v, want an Unavailable fault", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	listening, woken, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	calls := 0
	var mu sync.Mutex
	go func() {
		done <- h.f.Watch(ctx, func() {
			mu.Lock()
			defer mu.Unlock()
			switch calls++; calls {
			case 1:
				close(listening)
			case 2:
				close(woken)
			}
		})
	}()
	<-listening
	h.sh("ip addr add 10.0.16.15/24 dev eth0")
	select {
	case <-woken:
	case <-time.After(5 * time.Second):
		t.Error("watch slept when the underlay address appeared")
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("watch: %v", err)
	}
	h.set(example())
	h.holds(example())
}

func TestWatchEndsWithItsContext(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	heard := make(chan struct{}, 1)
	go func() { done <- h.f.Watch(ctx, func() { heard <- struct{}{} }) }()
	<-heard
	cancel()
	if err := <-done; err != nil {
		t.Errorf("watch: %v", err)
	}
}

func TestLowerDeviceMayGoAndComeBack(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.keep(example())
	whole := func() string { return h.toDo(example()) }
	testkit.Within(t, 5*time.Second, whole)
	h.sh("ip addr flush dev eth0; ip route add 10.0.16.0/24 dev eth0 || true")
	h.sh("ip link add br0 type bridge; ip link set eth0 master br0; ip addr add 10.0.16.15/24 dev br0; ip link set br0 up") // as bonding or bridging does
	testkit.Within(t, patience, whole)
	h.sh("ip link del eth0; ip link del br0; ip link add eth0 type veth peer name wire; ip addr add 10.0.16.15/24 dev eth0; ip link set eth0 up; ip link set wire up")
	testkit.Within(t, patience, whole)
}

// patience bounds the wait for what takes a second at most on a machine that has time: the tests share two processors with others, and the
// benchmarks measure it. It is far less than the next look that needs no event.
const patience = 20 * time.Second
