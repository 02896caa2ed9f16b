package overlay_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
	"golang.org/x/sys/unix"
)

// states returns configurations that differ in every way a host's may.
func states(r *rand.Rand) []overlay.Config {
	var out []overlay.Config
	for i := range 24 {
		c := example()
		c.Peers = nil
		for s := range 40 {
			if r.IntN(2) == 0 {
				// Hosts move: the subnet is the same, the underlay address not always.
				c.Peers = append(c.Peers, newLease(fmt.Sprintf("10.255.%d.0/24", 40+s), fmt.Sprintf("10.0.16.%d", 40+s+r.IntN(3))))
			}
		}
		if r.IntN(3) == 0 {
			c.Peers = append(c.Peers, newLease("10.255.0.12/32", "10.0.16.20"), newLease("10.254.0.0/24", "10.0.16.21"), newLease("10.255.40.0/22", "10.0.16.22"))
		}
		lease.Sort(c.Peers)
		switch i % 12 {
		case 1:
			c.VNI = 7
		case 2:
			c.Port = 4790
		case 3:
			c.Lower = "wire"
		case 4:
			c.Fenced = true
		case 5:
			c.Local = newLease("10.255.31.0/24", "10.0.16.15")
		case 6:
			c.Local = newLease("10.255.0.9/32", "10.0.16.15")
		case 7:
			c.Network = netip.MustParsePrefix("10.254.0.0/15")
		}
		out = append(out, c)
	}
	return out
}

// foreign is what others have on the host: it must survive everything.
const foreign = `ip route add 192.168.99.0/24 dev eth0 proto static; ip route add 10.255.200.0/24 dev wire proto static
	ip neigh add 10.0.16.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent; bridge fdb add 02:00:00:00:00:99 dev eth0 self permanent
	ip link add other type vxlan id 99 dev eth0 local 10.0.16.15 dstport 4999 nolearning gbp; ip link set other up
	bridge fdb add 02:00:00:00:00:98 dev other dst 10.0.16.98 self permanent
	nft add table inet silk; nft add chain inet silk nat-out '{ type nat hook postrouting priority 100; }'; nft add rule inet silk nat-out masquerade
	nft add set inet silk nat-x '{ type ipv4_addr; elements = { 192.0.2.1 }; }'; nft add table inet other; nft add chain inet other c`

const showForeign = `ip -d link show eth0; ip -d link show other | grep -v "link/ether"; ip route show table main | grep -v silk-vtep; ip neigh show dev eth0 nud permanent
	bridge fdb show dev eth0; bridge fdb show dev other; nft list chain inet silk nat-out; nft list set inet silk nat-x; nft list table inet other`

// TestRandomWalk jumps between states at random. After each jump the kernel holds what was asked for and a second Set does
// nothing. Between jumps, half of the time, a saboteur takes away or changes something: it comes back, and what is
// foreign survives.
func TestRandomWalk(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.sh(foreign)
	before := h.sh(showForeign)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	all := states(r)
	steps := 120
	if testing.Short() {
		steps = 20
	}
	for step := range steps {
		c := all[r.IntN(len(all))]
		switch r.IntN(4) {
		case 0:
			// Anything may fail, because the state it is made for may not be.
			h.try(strings.ReplaceAll(sabotageOfOurs[r.IntN(len(sabotageOfOurs))], ";", "\n"))
		case 1:
			h.f.Forget()
		}
		h.set(c)
		h.holds(c)
		if rep := h.set(c); rep.Changed != 0 || rep.Observed != rep.Desired {
			t.Fatalf("step %d: a second set did %+v", step, rep)
		}
		if after := h.sh(showForeign); after != before {
			t.Fatalf("step %d: what others made changed:\n%s\nwas\n%s", step, after, before)
		}
	}
}

// sabotageOfOurs is the sabotage that spares what the walk checks to survive.
var sabotageOfOurs = slices.DeleteFunc(slices.Clone(sabotage), func(s string) bool {
	return strings.Contains(s, "eth0") || strings.Contains(s, "table") || strings.Contains(s, "ruleset") || strings.Contains(s, "br0") ||
		strings.Contains(s, "dev lo") // a route of others, should the one that it replaces not be there
})

// TestMain runs a Set in a process of its own when the environment says so, for TestKilledSetIsRepaired.
func TestMain(m *testing.M) {
	if os.Getenv("OVERLAY_TEST_SET") == "" {
		os.Exit(m.Run())
	}
	f, err := overlay.Open(nil)
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	for {
		f.Forget()
		for _, c := range []overlay.Config{large(3000), large(2000)} {
			c.Peers = c.Peers[len(c.Peers)/2:]
			if _, err := f.Set(context.Background(), c); err != nil {
				panic(err)
			}
		}
		if err := f.Remove(context.Background(), "silk-vtep"); err != nil {
			panic(err)
		}
	}
}

// TestKilledSetIsRepaired kills a process that sets, changes and removes an overlay at random instants.
func TestKilledSetIsRepaired(t *testing.T) {
	h := newHost(t, "192.168.16.15")
	want := large(2500)
	rounds := 100
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		var child *exec.Cmd
		err := h.ns.Do(func() (err error) { // a child is born in the namespace of the thread that makes it
			child = exec.Command("/proc/self/exe")
			child.Env = append(os.Environ(), "OVERLAY_TEST_SET=1")
			child.Stderr = os.Stderr
			out, err := child.StdoutPipe()
			if err != nil {
				return err
			}
			if err := child.Start(); err != nil {
				return err
			}
			_, err = out.Read(make([]byte, 1))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(rand.N(150 * time.Millisecond)) // the instant is the test's input
		child.Process.Kill()
		if err := child.Wait(); child.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the child ended by itself: %v", err)
		}
		h.set(want)
		h.holds(want)
		h.f.Forget()
		if r := h.set(want); r.Changed != 0 {
			t.Fatalf("a second set did %+v", r)
		}
	}
}

// TestChurnElsewhereNeverMisleads changes what is foreign all the time, so that dumps are interrupted. A Set then
// succeeds or says that it could not look; it never takes part of a list for the list.
func TestChurnElsewhereNeverMisleads(t *testing.T) {
	h := newHost(t, "192.168.16.15")
	c := large(3000)
	h.set(c)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	churn := func(script string) {
		wg.Go(func() {
			for ctx.Err() == nil {
				h.try(script)
			}
		})
	}
	churn("ip link add t0 type veth peer name t1; ip addr add 192.0.2.1/24 dev t0; ip link set t0 up; ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:01 dev t0; ip link del t0")
	nf, err := kernel.DialNetfilter(h.ns)
	if err != nil {
		t.Fatal(err)
	}
	defer nf.Close()
	wg.Go(func() { // as fast as the kernel can, so that lists longer than one message are interrupted
		for msg := uint16(unix.NFT_MSG_NEWTABLE); ctx.Err() == nil; msg = unix.NFT_MSG_NEWTABLE + unix.NFT_MSG_DELTABLE - msg {
			var b kernel.Batch
			b.Add(kernel.NFTables(msg), 0, kernel.NFGen(unix.NFPROTO_INET))
			b.String(unix.NFTA_TABLE_NAME, "silk-policy")
			nf.Transact(&b, 0)
		}
	})
	interrupted := 0
	for range 60 {
		h.f.Forget()
		r, err := h.f.Set(ctx, c)
		switch {
		case errors.Is(err, kernel.ErrDumpInterrupted):
			interrupted++
		case err != nil:
			t.Errorf("set: %v", err)
		case r.Changed != 0 || !r.Full:
			t.Errorf("nothing of ours changed and yet: %+v", r)
		}
	}
	cancel()
	wg.Wait()
	t.Logf("%d of 60 sets could not look", interrupted)
	h.holds(c)
}
