package leasesql

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/lease"
)

// TestFeedAddsUp has watchers fall behind and catch up at random, over a log that is compacted again and again.
func TestFeedAddsUp(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	f := newFeed()
	f.reset(lease.Revision{Epoch: "e", Counter: 1}, nil, 1, time.Now())
	active := map[netip.Prefix]lease.Lease{}
	type watcher struct {
		since lease.Revision
		held  []lease.Lease
	}
	watchers := make([]watcher, 20)
	deltas, longest := 0, 0
	for c := uint64(2); c < 3000; c++ {
		var changes []lease.Entry
		for range 1 + rnd.IntN(4) {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(rnd.IntN(100)), 0}), 24)
			e := lease.Entry{Lease: lease.Lease{Underlay: netip.AddrFrom4([4]byte{1, 1, byte(rnd.IntN(9)), byte(rnd.IntN(250))}), Subnet: p, MAC: lease.MACOf(p)}, Changed: c, State: lease.State(rnd.IntN(3))}
			if slices.ContainsFunc(changes, func(x lease.Entry) bool { return x.Subnet == p }) {
				continue
			}
			if delete(active, p); e.State == lease.Active {
				active[p] = e.Lease
			}
			changes = append(changes, e)
		}
		f.apply(lease.Revision{Epoch: "e", Counter: c}, changes, time.Now())
		longest = max(longest, len(f.log))
		if rnd.IntN(3) > 0 {
			continue // watchers do not see every revision
		}
		f.show()
		var want []lease.Lease
		for _, l := range active {
			want = append(want, l)
		}
		lease.Sort(want)
		if got := f.snapshot(); !slices.Equal(got.Leases, want) || got.Revision.Counter != c {
			t.Fatalf("at %d the list is %v, want %v", c, got.Leases, want)
		}
		for i := range watchers {
			w := &watchers[i]
			if rnd.IntN(1+4*i) > 0 {
				continue
			}
			u, _, ok := f.watch(w.since)
			if !ok {
				t.Fatalf("at %d there is nothing for who has %v", c, w.since)
			}
			if !u.Full {
				deltas++
			}
			held, err := u.Apply(w.held)
			if err != nil || !slices.Equal(held, want) {
				t.Fatalf("at %d: from %v: %v", c, w.since, err)
			}
			w.since, w.held = u.Revision, held
		}
	}
	if deltas < 1000 || longest > 4*(100+1024) {
		t.Errorf("%d deltas, and the log grew to %d changes", deltas, longest)
	}
}

// BenchmarkFeed measures a new list of 10,000 leases after a change, and the update that watchers get.
func BenchmarkFeed(b *testing.B) {
	f := newFeed()
	var entries []lease.Entry
	for i := range 10000 {
		p := netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
		entries = append(entries, lease.Entry{Lease: lease.Lease{Underlay: p.Addr(), Subnet: p, MAC: lease.MACOf(p)}, Changed: 1})
	}
	f.reset(lease.Revision{Epoch: "e", Counter: 1}, entries, 1, time.Now())
	for c := uint64(2); b.Loop(); c++ {
		e := entries[c%10000]
		e.State, e.Changed = lease.State(c/10000%2), c
		f.apply(lease.Revision{Epoch: "e", Counter: c}, []lease.Entry{e}, time.Now())
		f.show()
		if _, _, ok := f.watch(lease.Revision{Epoch: "e", Counter: c - 1}); !ok {
			b.Fatal("no update")
		}
	}
}

// TestAskingFromEveryRevisionFillsNoMemory is what a hostile host could do.
func TestAskingFromEveryRevisionFillsNoMemory(t *testing.T) {
	f := newFeed()
	f.reset(lease.Revision{Epoch: "e", Counter: 1}, nil, 1, time.Now())
	for c := uint64(2); c < 3000; c++ {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(c % 100), 0}), 24)
		f.apply(lease.Revision{Epoch: "e", Counter: c}, []lease.Entry{{Lease: lease.Lease{Underlay: p.Addr(), Subnet: p}, Changed: c}}, time.Now())
	}
	f.show()
	for c := uint64(1); c < 2999; c++ {
		if _, _, ok := f.watch(lease.Revision{Epoch: "e", Counter: c}); !ok {
			t.Fatalf("there is nothing for who has %d", c)
		}
	}
	if len(f.memo) > 100 {
		t.Errorf("%d updates are remembered", len(f.memo))
	}
}

// TestFeedWithoutWatchers makes no list that nobody reads, forgets what was replaced all the same, and has the newest for the first one that comes.
func TestFeedWithoutWatchers(t *testing.T) {
	f := newFeed()
	f.reset(lease.Revision{Epoch: "e", Counter: 1}, nil, 1, time.Now())
	first := f.current()
	apply := func(c uint64) {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(c % 7), 0}), 24)
		l := lease.Lease{Underlay: netip.AddrFrom4([4]byte{1, 1, 1, byte(c%7 + 1)}), Subnet: p, MAC: lease.MACOf(p)}
		f.apply(lease.Revision{Epoch: "e", Counter: c}, []lease.Entry{{Lease: l, Changed: c}}, time.Now())
		f.show()
	}
	for c := uint64(2); c < 500; c++ {
		apply(c)
	}
	if f.current() != first {
		t.Error("a list was made that nobody watches")
	}
	for c := uint64(500); c < 5000; c++ {
		apply(c)
		if len(f.log) > 2000 {
			t.Fatalf("at %d the log has %d changes", c, len(f.log))
		}
	}
	if u, _, ok := f.watch(lease.Revision{Epoch: "e", Counter: 1}); !ok || u.Revision.Counter != 4999 || len(u.Set) != 7 {
		t.Errorf("the first watcher gets %v, %v", u, ok)
	}
	apply(5000)
	if _, wake, ok := f.watch(lease.Revision{Epoch: "e", Counter: 5000}); ok {
		t.Error("a second update for the first watcher")
	} else {
		f.show() // without news: the watcher waits on
		apply(5001)
		select {
		case <-wake:
		default:
			t.Error("a watcher that waits is not woken")
		}
	}
}
