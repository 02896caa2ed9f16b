// Package leasetest holds what every lease.Registry must do, as tests to run against one: a database store, or the client of a
// controller with a store behind it.
//
// Use: leasetest.Run(t, func(t testing.TB, pool lease.Pool) leasetest.Subject {...}).
package leasetest

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
)

// What the registry under test must be configured with.
const (
	Expiration = 1000 * time.Second
	Staleness  = 400 * time.Second // so that renewals are written when the last is 10 s old
)

// Subject is a registry under test.
type Subject struct {
	lease.Registry

	// Age makes the lease of a host look as if it had been renewed that many seconds earlier than it was.
	Age func(t testing.TB, host netip.Addr, seconds int)
}

// Open returns a new and empty registry over a pool, which ends with the test.
type Open func(t testing.TB, pool lease.Pool) Subject

// Run tests the registries that open returns.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, open Open)
	}{
		{"AcquireKeepsWhatTheHostHas", testAcquire},
		{"AcquireServesManyAtOnce", testConcurrentAcquire},
		{"AcquirePrefersNeverUsed", testNeverUsedFirst},
		{"AcquireReclaimsOldestExpiredLast", testReclaim},
		{"AcquireKeepsExpiredLeaseOfItsHost", testAcquireRefreshes},
		{"ExpiredLeaseIsNotListed", testExpiry},
		{"RenewalIsWritten", testRenewalCounts},
		{"RenewRefusesWhatIsLost", testRenewConflicts},
		{"RenewRecreatesUnknownLease", testRenewRecreates},
		{"RenewRefusesWhatCouldNotBeGiven", testRenewInvalid},
		{"ReleaseOfNothingIsNoError", testRelease},
		{"WatchBeginsWithEverything", testWatchFull},
		{"WatchWaitsForChange", testWatchDelta},
		{"WatchEndsWithContext", testWatchCancelled},
		{"WatchersSeeTheSame", testManyWatchers},
		{"RandomCallsKeepSubnetsApart", testRandomCalls},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open) })
	}
}

// Pool returns a pool for tests.
func Pool(t testing.TB, network string, bits int) lease.Pool {
	t.Helper()
	p, err := lease.NewPool(netip.MustParsePrefix(network), bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Host returns the underlay address of host n, 0 <= n < 65536.
func Host(n int) netip.Addr { return netip.AddrFrom4([4]byte{172, 16, byte(n >> 8), byte(n)}) }

// Of returns the lease of a host to a subnet.
func Of(host netip.Addr, subnet string) lease.Lease {
	p := netip.MustParsePrefix(subnet)
	return lease.Lease{Underlay: host, Subnet: p, MAC: lease.MACOf(p)}
}

// Eventually waits for something that must become true within 15 s.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	testkit.Until(t, 15*time.Second, what, ok)
}

// equateIP lets go-cmp compare what is comparable.
var equateIP = cmpopts.EquateComparable(lease.Lease{}, netip.Addr{}, netip.Prefix{})

func acquire(t testing.TB, r lease.Registry, host netip.Addr, k lease.Kind) lease.Lease {
	t.Helper()
	l, err := r.Acquire(t.Context(), host, k)
	if err != nil {
		t.Fatalf("acquire %v for %v: %v", k, host, err)
	}
	return l
}

func renew(t testing.TB, r lease.Registry, l lease.Lease) {
	t.Helper()
	if err := r.Renew(t.Context(), l); err != nil {
		t.Fatalf("renew %v: %v", l, err)
	}
}

func release(t testing.TB, r lease.Registry, host netip.Addr) {
	t.Helper()
	if err := r.Release(t.Context(), host); err != nil {
		t.Fatalf("release %v: %v", host, err)
	}
}

func listed(t testing.TB, r lease.Registry) []lease.Lease {
	t.Helper()
	ls, err := r.Leases(t.Context())
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	ls = slices.Clone(ls)
	lease.Sort(ls)
	return ls
}

func wantListed(t testing.TB, r lease.Registry, want ...lease.Lease) {
	t.Helper()
	want = slices.Clone(want)
	lease.Sort(want)
	if diff := cmp.Diff(want, listed(t, r), equateIP, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("leases differ (-want +got):\n%s", diff)
	}
}

func wantExhausted(t testing.TB, r lease.Registry, host netip.Addr, k lease.Kind) {
	t.Helper()
	l, err := r.Acquire(t.Context(), host, k)
	if kind := fault.Of(err); kind != fault.Exhausted && kind != fault.Conflict { // the two are one over HTTP
		t.Errorf("acquire %v for %v = %v, %v, want an Exhausted fault", k, host, l, err)
	} else if !strings.Contains(err.Error(), "no lease available") {
		t.Errorf("acquire %v for %v: %v, want the text %q in it", k, host, err, "no lease available")
	}
}

func wantConflict(t testing.TB, r lease.Registry, l lease.Lease) error {
	t.Helper()
	err := r.Renew(t.Context(), l)
	if !errors.Is(err, fault.Conflict) {
		t.Errorf("renew %v: %v, want a Conflict fault", l, err)
	}
	return err
}

func testAcquire(t *testing.T, open Open) {
	pool := Pool(t, "10.255.0.0/16", 24)
	r := open(t, pool)
	block, single := acquire(t, r, Host(1), lease.Block), acquire(t, r, Host(2), lease.Single)
	for _, c := range []struct {
		l    lease.Lease
		host int
		kind lease.Kind
	}{{block, 1, lease.Block}, {single, 2, lease.Single}} {
		kind, _, member := pool.Index(c.l.Subnet)
		if !member || kind != c.kind || c.l.Underlay != Host(c.host) || c.l.MAC != lease.MACOf(c.l.Subnet) {
			t.Errorf("host %v got %v, want a %v of the pool with its MAC", Host(c.host), c.l, c.kind)
		}
	}
	for _, k := range []lease.Kind{lease.Block, lease.Single} {
		if again := acquire(t, r, Host(1), k); again != block {
			t.Errorf("acquiring a %v again gave %v, want %v", k, again, block)
		}
	}
	wantListed(t, r, block, single)
	if l, err := r.Acquire(t.Context(), netip.MustParseAddr("fd00::1"), lease.Block); err == nil {
		t.Errorf("a host with an IPv6 address got %v", l)
	}
}

// testConcurrentAcquire has 64 hosts ask at a time until both pools are used up.
func testConcurrentAcquire(t *testing.T, open Open) {
	pool := Pool(t, "10.255.0.0/16", 24)
	r := open(t, pool)
	const each = 255
	got := make([]lease.Lease, 2*each)
	errs := make([]error, 2*each)
	next := make(chan int)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := range next {
				got[i], errs[i] = r.Acquire(t.Context(), Host(i), lease.Kind(i%2))
			}
		})
	}
	for i := range got {
		next <- i
	}
	close(next)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	seen := map[netip.Prefix]lease.Lease{}
	for i, l := range got {
		if other, dup := seen[l.Subnet]; dup || l.Underlay != Host(i) || l.Kind() != lease.Kind(i%2) {
			t.Errorf("host %v got %v; it was given as %v before", Host(i), l, other)
		}
		seen[l.Subnet] = l
	}
	wantListed(t, r, got...)
	wantExhausted(t, r, Host(9999), lease.Block)
	wantExhausted(t, r, Host(9999), lease.Single)
	release(t, r, Host(6))
	if l := acquire(t, r, Host(9999), lease.Block); l.Subnet != got[6].Subnet {
		t.Errorf("the only free subnet is %v, got %v", got[6].Subnet, l)
	}
}

func testNeverUsedFirst(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/27", 30)) // 7 blocks
	first := acquire(t, r, Host(1), lease.Block)
	release(t, r, Host(1))
	for i := range 6 {
		if l := acquire(t, r, Host(2+i), lease.Block); l.Subnet == first.Subnet {
			t.Fatalf("host %v got %v, which was released a moment ago, while others were free", Host(2+i), l.Subnet)
		}
	}
	if l := acquire(t, r, Host(8), lease.Block); l.Subnet != first.Subnet {
		t.Errorf("host %v got %v, want %v, the only free one", Host(8), l.Subnet, first.Subnet)
	}
	wantExhausted(t, r, Host(9), lease.Block)
}

func testReclaim(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/28", 30)) // 3 blocks
	a, b := acquire(t, r, Host(1), lease.Block), acquire(t, r, Host(2), lease.Block)
	r.Age(t, Host(1), 2000)
	r.Age(t, Host(2), 3000)
	c := acquire(t, r, Host(3), lease.Block)
	if c.Subnet == a.Subnet || c.Subnet == b.Subnet {
		t.Fatalf("an expired lease was given away while a subnet was free: %v", c)
	}
	if l := acquire(t, r, Host(4), lease.Block); l.Subnet != b.Subnet {
		t.Errorf("host %v got %v, want %v, which expired first", Host(4), l.Subnet, b.Subnet)
	}
	wantConflict(t, r, b)
	release(t, r, Host(2)) // has nothing any more
	if l := acquire(t, r, Host(5), lease.Block); l.Subnet != a.Subnet {
		t.Errorf("host %v got %v, want %v, which expired next", Host(5), l.Subnet, a.Subnet)
	}
	wantExhausted(t, r, Host(6), lease.Block)
	if ls := listed(t, r); len(ls) != 3 {
		t.Errorf("%d leases are listed, want 3: %v", len(ls), ls)
	}
	if l := acquire(t, r, Host(6), lease.Single); l.Kind() != lease.Single {
		t.Errorf("got %v, want a single address", l)
	}
}

func testAcquireRefreshes(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/29", 30)) // 1 block
	a := acquire(t, r, Host(1), lease.Block)
	r.Age(t, Host(1), 2000)
	if again := acquire(t, r, Host(1), lease.Block); again != a {
		t.Fatalf("acquiring again gave %v, want %v", again, a)
	}
	wantExhausted(t, r, Host(2), lease.Block) // it does not look expired any more
	wantListed(t, r, a)
}

func testExpiry(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a, b := acquire(t, r, Host(1), lease.Block), acquire(t, r, Host(2), lease.Block)
	before, _ := follow(t, r, lease.Revision{}, nil, func(ls []lease.Lease) bool { return len(ls) == 2 })
	r.Age(t, Host(1), 1000)
	Eventually(t, "the expired lease is not listed", func() bool { return len(listed(t, r)) == 1 })
	wantListed(t, r, b)
	u := update(t, r, before)
	if !slices.Equal(u.Gone, []netip.Prefix{a.Subnet}) || len(u.Set) > 0 || u.Full {
		t.Errorf("update after an expiry is %+v, want %v gone", u, a.Subnet)
	}
	renew(t, r, a)
	wantListed(t, r, a, b)
}

func testRenewalCounts(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a, b := acquire(t, r, Host(1), lease.Block), acquire(t, r, Host(2), lease.Block)
	r.Age(t, Host(1), 600)
	r.Age(t, Host(2), 600)
	renew(t, r, a)
	r.Age(t, Host(1), 600)
	r.Age(t, Host(2), 600)
	Eventually(t, "only the lease that was not renewed has expired", func() bool { return slices.Equal(listed(t, r), []lease.Lease{a}) })
	renew(t, r, b)
	wantListed(t, r, a, b)
}

func testRenewConflicts(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a, b := acquire(t, r, Host(1), lease.Block), acquire(t, r, Host(2), lease.Single)
	free := "10.255.77.0/24"
	if a.Subnet.String() == free {
		free = "10.255.78.0/24"
	}
	other := Of(Host(1), free)
	if err := wantConflict(t, r, other); err != nil && !strings.HasSuffix(err.Error(), "lease mismatch") {
		t.Errorf("renewing %v: %v, want a text that ends in %q", other, err, "lease mismatch")
	}
	wrongMAC := a
	wrongMAC.MAC[5]++
	wantConflict(t, r, wrongMAC)
	stolen := a
	stolen.Underlay = Host(3)
	wantConflict(t, r, stolen)
	stolen = b
	stolen.Underlay = Host(3)
	wantConflict(t, r, stolen)
	wantListed(t, r, a, b)
	renew(t, r, a)
}

func testRenewRecreates(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a, b := Of(Host(1), "10.255.30.0/24"), Of(Host(2), "10.255.0.255/32")
	renew(t, r, a)
	renew(t, r, b)
	wantListed(t, r, a, b)
	release(t, r, Host(1))
	renew(t, r, a) // what was released a moment ago is free as well
	wantListed(t, r, a, b)
	if l := acquire(t, r, Host(1), lease.Block); l != a {
		t.Errorf("acquire gave %v, want %v, which the host has", l, a)
	}
}

func testRenewInvalid(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a := acquire(t, r, Host(1), lease.Block)
	for name, l := range map[string]lease.Lease{
		"outside the network":       Of(Host(2), "10.254.1.0/24"),
		"first block":               Of(Host(2), "10.255.0.0/24"),
		"part of a lease":           Of(Host(2), a.Subnet.Addr().String()+"/25"),
		"more than a block":         Of(Host(2), "10.255.0.0/17"),
		"address of another block":  Of(Host(2), "10.255.200.1/32"),
		"hardware address of other": {Underlay: Host(2), Subnet: netip.MustParsePrefix("10.255.200.0/24"), MAC: lease.MAC{0xee, 0xee, 10, 255, 201, 0}},
		"nothing":                   {Underlay: Host(2)},
		"no host":                   {Subnet: netip.MustParsePrefix("10.255.200.0/24"), MAC: lease.MAC{0xee, 0xee, 10, 255, 200, 0}},
	} {
		if err := r.Renew(t.Context(), l); !errors.Is(err, fault.Conflict) && !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: renew %v: %v, want a Conflict or Invalid fault", name, l, err)
		}
	}
	wantListed(t, r, a)
}

func testRelease(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	release(t, r, Host(1))
	acquire(t, r, Host(1), lease.Block)
	b := acquire(t, r, Host(2), lease.Single)
	release(t, r, Host(1))
	release(t, r, Host(1))
	wantListed(t, r, b)
	release(t, r, Host(2))
	wantListed(t, r)
}

// within returns a context that ends after d or with the test.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
