package leasetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

// update returns the next change since a revision.
func update(t testing.TB, r lease.Registry, since lease.Revision) lease.Update {
	t.Helper()
	ctx := within(t, 15*time.Second)
	for {
		u, err := r.Watch(ctx, since)
		if err != nil {
			t.Fatalf("watch since %q: %v", since, err)
		}
		if u.Changes() {
			return u
		}
		if u.Revision != since {
			t.Fatalf("watch since %q: says that nothing changed, at %v", since, u.Revision)
		}
	}
}

// follow applies updates until what they add up to satisfies ok.
func follow(t testing.TB, r lease.Registry, since lease.Revision, held []lease.Lease, ok func([]lease.Lease) bool) (lease.Revision, []lease.Lease) {
	t.Helper()
	for !ok(held) {
		u := update(t, r, since)
		next, err := u.Apply(held)
		if err != nil {
			t.Fatalf("update from %q: %v", since, err)
		}
		since, held = u.Revision, next
	}
	return since, held
}

func testWatchFull(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	empty := update(t, r, lease.Revision{})
	if !empty.Full || empty.Count != 0 || len(empty.Set) != 0 || empty.Revision.IsZero() {
		t.Errorf("an empty registry begins with %+v, want a full update without leases", empty)
	}
	a := acquire(t, r, Host(1), lease.Block)
	_, held := follow(t, r, lease.Revision{}, nil, func(ls []lease.Lease) bool { return len(ls) == 1 })
	if !slices.Equal(held, []lease.Lease{a}) {
		t.Errorf("a full update holds %v, want %v", held, a)
	}
	for _, since := range []lease.Revision{{Epoch: "another", Counter: 1}, {Epoch: "another", Counter: 1 << 60}} {
		if u := update(t, r, since); !u.Full || u.Count != 1 {
			t.Errorf("watch since %v of another epoch: %+v, want everything", since, u)
		}
	}
}

func testWatchDelta(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	a := acquire(t, r, Host(1), lease.Block)
	since, held := follow(t, r, lease.Revision{}, nil, func(ls []lease.Lease) bool { return len(ls) == 1 })

	// Nothing changes: the watcher waits, or hears that nothing has.
	u, err := r.Watch(within(t, 300*time.Millisecond), since)
	if err == nil && (u.Changes() || u.Revision != since) {
		t.Errorf("watch without a change: %+v", u)
	}
	renew(t, r, a) // is no change either
	got := make(chan lease.Update, 1)
	go func() {
		defer close(got)
		if u, err := r.Watch(within(t, 15*time.Second), since); err == nil {
			got <- u
		}
	}()
	b := acquire(t, r, Host(2), lease.Single)
	u, ok := <-got
	if !ok || u.Full || !slices.Equal(u.Set, []lease.Lease{b}) || len(u.Gone) > 0 || u.Count != 2 {
		t.Fatalf("watch during an acquisition: %+v %v, want %v only", u, ok, b)
	}
	if held, err = u.Apply(held); err != nil {
		t.Fatal(err)
	}
	release(t, r, Host(1))
	_, held = follow(t, r, u.Revision, held, func(ls []lease.Lease) bool { return len(ls) == 1 })
	if !slices.Equal(held, []lease.Lease{b}) {
		t.Errorf("after a release the watcher has %v, want %v", held, b)
	}
	// Who slept through all of it gets there too.
	_, held = follow(t, r, since, []lease.Lease{a}, func(ls []lease.Lease) bool { return slices.Equal(ls, []lease.Lease{b}) })
	wantListed(t, r, held...)
}

func testWatchCancelled(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	u := update(t, r, lease.Revision{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := r.Watch(ctx, u.Revision)
		done <- err
	}()
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a cancelled watch returned an update")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a cancelled watch went on")
	}
	if _, err := r.Acquire(ctx, Host(1), lease.Block); err == nil {
		t.Error("acquire with a cancelled context succeeded")
	}
}

// testManyWatchers lets 50 watchers follow 40 changes.
func testManyWatchers(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/16", 24))
	var want []lease.Lease
	for i := range 20 {
		want = append(want, acquire(t, r, Host(i), lease.Block))
	}
	done := make(chan error, 50)
	for range cap(done) {
		go func() {
			done <- watchUntil(within(t, 30*time.Second), r, func(ls []lease.Lease) bool { return len(ls) == 21 })
		}()
	}
	for i := range 20 {
		release(t, r, Host(i))
		want[i] = acquire(t, r, Host(100+i), lease.Block)
	}
	want = append(want, acquire(t, r, Host(200), lease.Single))
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	wantListed(t, r, want...)
}

// watchUntil follows a registry from the beginning and checks every state that it is told of.
func watchUntil(ctx context.Context, r lease.Registry, ok func([]lease.Lease) bool) error {
	var since lease.Revision
	var held []lease.Lease
	for {
		u, err := r.Watch(ctx, since)
		if err != nil {
			return fmt.Errorf("watch since %q with %d leases: %w", since, len(held), err)
		}
		if !u.Changes() {
			continue
		}
		if u.Revision.Epoch == since.Epoch && u.Revision.Counter <= since.Counter {
			return fmt.Errorf("watch since %v: went back to %v", since, u.Revision)
		}
		if held, err = u.Apply(held); err != nil {
			return err
		}
		since = u.Revision
		hosts := map[netip.Addr]bool{}
		for i, l := range held {
			if hosts[l.Underlay] || i > 0 && held[i-1].Subnet.Overlaps(l.Subnet) {
				return fmt.Errorf("at %v: %v beside another lease of its host or subnet: %v", since, l, held)
			}
			hosts[l.Underlay] = true
		}
		if ok(held) {
			return nil
		}
	}
}

// testRandomCalls has hosts call at random and compares what each was told with what is listed.
func testRandomCalls(t *testing.T, open Open) {
	r := open(t, Pool(t, "10.255.0.0/24", 28)) // 15 blocks, 15 addresses
	const hosts, rounds = 24, 60
	held := make([]lease.Lease, hosts)
	watcher := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		watcher <- watchUntil(ctx, r, func(ls []lease.Lease) bool {
			return len(ls) == 1 && ls[0].Underlay == Host(999)
		})
	}()
	var wg sync.WaitGroup
	for h := range hosts {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(h)))
			for range rounds {
				if err := randomCall(t.Context(), rnd, r, Host(h), &held[h]); err != nil {
					t.Errorf("host %v: %v", Host(h), err)
					return
				}
			}
		})
	}
	wg.Wait()
	want := slices.DeleteFunc(slices.Clone(held), func(l lease.Lease) bool { return l == lease.Lease{} })
	lease.Sort(want)
	if diff := cmp.Diff(want, listed(t, r), equateIP, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("what hosts hold and what is listed differ (-hosts +list):\n%s", diff)
	}
	for h := range hosts {
		release(t, r, Host(h))
	}
	acquire(t, r, Host(999), lease.Block)
	select {
	case err := <-watcher:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Error("the watcher never saw the last state")
	}
}

func randomCall(ctx context.Context, rnd *rand.Rand, r lease.Registry, host netip.Addr, held *lease.Lease) error {
	has := *held != lease.Lease{}
	switch rnd.IntN(5) {
	case 0:
		*held = lease.Lease{}
		return r.Release(ctx, host)
	case 1:
		if has {
			return r.Renew(ctx, *held)
		}
		return nil
	case 2: // what another may hold
		want := Of(host, fmt.Sprintf("10.255.0.%d/28", 16*(1+rnd.IntN(15))))
		err := r.Renew(ctx, want)
		switch {
		case err == nil && has && *held != want:
			return fmt.Errorf("renewed %v while it held %v", want, *held)
		case err == nil:
			*held = want
		case !errors.Is(err, fault.Conflict):
			return err
		}
		return nil
	}
	l, err := r.Acquire(ctx, host, lease.Kind(rnd.IntN(2)))
	if err != nil && !has && (errors.Is(err, fault.Exhausted) || errors.Is(err, fault.Conflict)) {
		return nil
	}
	if err != nil || has && l != *held {
		return fmt.Errorf("acquired %v, %w while it held %v", l, err, *held)
	}
	*held = l
	return nil
}
