package policysql

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// follower has the rules of a set of groups, as updates have told it.
type follower struct {
	groups []identity.Group
	since  revision.Revision
	rules  []policy.Rule
}

// ask takes an update over, if there is any.
func (w *follower) ask(t *testing.T, f *feed, last bool) {
	t.Helper()
	s := f.join(w.groups)
	defer f.part(s)
	u, _, ok := f.watch(s, w.since, last)
	if !ok {
		return
	}
	rules, err := u.Apply(w.rules)
	if err != nil {
		t.Fatalf("groups %v, since %v: %v", w.groups, w.since, err)
	}
	var want []policy.Rule
	for r := range f.view().rows.all() {
		if slices.Contains(w.groups, r.source.Group) || slices.Contains(w.groups, r.destination.Group) {
			want = append(want, r.rule())
		}
	}
	if !slices.Equal(rules, want) || u.Revision != f.view().head {
		t.Fatalf("groups %v at %v have %v, want %v at %v", w.groups, u.Revision, rules, want, f.view().head)
	}
	w.since, w.rules = u.Revision, rules
}

// TestFeedAgreesWithTheView changes policies at random, reloads from time to time, and has followers ask now and then: each update adds up to what there is.
func TestFeedAgreesWithTheView(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 9))
	f := newFeed()
	p := newPool(50, 0)
	v := empty()
	f.reset(v, nil, 1, time.Now())
	var followers []*follower
	var joined []*set // kept, as those of hosts are
	for i := range 40 {
		w := &follower{}
		for g := range 9 {
			if rnd.IntN(3) == 0 {
				w.groups = append(w.groups, identity.Group(fmt.Sprintf("g%d", g)))
			}
		}
		followers = append(followers, w)
		if i%2 == 0 {
			joined = append(joined, f.join(w.groups))
		}
	}
	var log []entry
	epoch := "e"
	for round := range 3000 {
		q := request{op: []operation{create, remove}[rnd.IntN(2)]}
		for range 1 + rnd.IntN(3) {
			q.policies = append(q.policies, pol(fmt.Sprintf("g%d", rnd.IntN(9)), fmt.Sprintf("g%d", rnd.IntN(9)), 1+rnd.IntN(2)))
		}
		next, c, _ := settle(t, v, p, int64(round+1), q)
		next.head.Epoch = epoch
		var entries []entry
		for _, r := range c.remove {
			entries = append(entries, entry{counter: next.head.Counter, row: r, gone: true})
		}
		for _, r := range c.add {
			entries = append(entries, entry{counter: next.head.Counter, row: r})
		}
		log = append(log, entries...)
		v = next
		f.apply(v, entries, 0, time.Now())
		switch rnd.IntN(60) {
		case 0: // another store's changes made it forget where it was
			floor := f.floor
			if n := rnd.IntN(len(log)); rnd.IntN(2) == 0 {
				floor = max(floor, log[n].counter)
			}
			f.reset(v, slices.Clone(log), floor, time.Now())
		case 1:
			epoch += "e"
			next := *v
			v = &next
			v.head = revision.Revision{Epoch: epoch, Counter: v.head.Counter + 1}
			f.reset(v, nil, v.head.Counter, time.Now())
			log = nil
		case 2:
			f.mu.Lock()
			f.trim(min(v.head.Counter, f.floor+uint64(rnd.IntN(50))))
			f.mu.Unlock()
		}
		if rnd.IntN(3) == 0 {
			f.wake()
		}
		for range 5 {
			followers[rnd.IntN(len(followers))].ask(t, f, rnd.IntN(4) == 0)
		}
	}
	f.wake()
	for _, w := range followers {
		w.ask(t, f, true)
		w.ask(t, f, false)
		if all, _ := v.touching(w.groups); len(w.rules) != len(all) {
			t.Errorf("groups %v have %d rules in the end, want %d", w.groups, len(w.rules), len(all))
		}
	}
	for _, s := range joined {
		if count, sum := seal(v, s.names()); count != s.count || sum != s.sum {
			t.Errorf("a set has %d rules, %v, want %d, %v", s.count, s.sum, count, sum)
		}
		f.part(s)
	}
	if len(f.sets) != 0 || len(f.topics) != 0 {
		t.Errorf("%d sets and %d topics are left", len(f.sets), len(f.topics))
	}
}

// TestLogIsBounded makes more changes than are remembered: who comes from before them gets everything.
func TestLogIsBounded(t *testing.T) {
	f := newFeed()
	v := empty()
	f.reset(v, nil, 1, time.Now())
	a, b := newGroup(identity.Tagged{Group: "a", Tag: 1, Kind: identity.App}), newGroup(identity.Tagged{Group: "b", Tag: 2, Kind: identity.App})
	early := &follower{groups: []identity.Group{"a"}}
	early.ask(t, f, false)
	since := early.since
	for i := range 3 * maxLog {
		r := newRow(a, b, policy.Ports{First: 1, Last: uint16(1 + i/2%60000)}, policy.TCP)
		c, gone := change{add: []row{r}, tagged: []*group{a, b}}, i%2 == 1
		if gone {
			c = change{remove: []row{r}}
		}
		v = v.with(c, revision.Revision{Epoch: "e", Counter: v.head.Counter + 1}, 0)
		f.apply(v, []entry{{counter: v.head.Counter, row: r, gone: gone}}, 0, time.Now())
	}
	if n := len(f.log); n < maxLog || n > 2*maxLog || len(f.recent) != 2 {
		t.Errorf("%d changes and %d groups are remembered", n, len(f.recent))
	}
	f.wake()
	s := f.join(early.groups)
	defer f.part(s)
	if u, _, ok := f.watch(s, since, false); !ok || !u.Full {
		t.Errorf("from long ago: %+v, %v, want everything", u, ok)
	}
	since.Counter = f.floor
	if u, _, ok := f.watch(s, since, false); !ok || !u.Full { // is shorter
		t.Errorf("from the floor: %d and %d changes, full %v", len(u.Set), len(u.Gone), u.Full)
	}
	since.Counter = v.head.Counter - 2
	if u, _, ok := f.watch(s, since, false); !ok || u.Full || len(u.Set)+len(u.Gone) != 1 {
		t.Errorf("from two changes ago: %+v, %v", u, ok)
	}
	since.Counter = v.head.Counter + 5
	if u, wake, ok := f.watch(s, since, false); ok || wake == nil {
		t.Errorf("from the future: %+v, want a wait", u)
	}
	if u, _, ok := f.watch(s, since, true); !ok || !u.Full {
		t.Errorf("from the future at the end of the wait: %+v, want everything", u)
	}
}

// TestOnlyTouchedSetsWake has changes wake those whose groups they touch, and nobody else.
func TestOnlyTouchedSetsWake(t *testing.T) {
	f := newFeed()
	v := empty()
	f.reset(v, nil, 1, time.Now())
	f.wake()
	sets := map[string]*set{}
	wakes := map[string]<-chan struct{}{}
	for _, g := range []string{"a", "b", "c"} {
		sets[g] = f.join([]identity.Group{identity.Group(g)})
		_, wakes[g], _ = f.watch(sets[g], v.head, false)
	}
	v, c, _ := settle(t, v, newPool(9, 0), 1, request{op: create, policies: []policy.Policy{pol("a", "b", 1), pol("x", "y", 1)}})
	entries := []entry{{counter: v.head.Counter, row: c.add[0]}, {counter: v.head.Counter, row: c.add[1]}}
	f.apply(v, entries, 0, time.Now())
	for g, wake := range wakes {
		select {
		case <-wake:
			t.Errorf("%s woke before it was shown anything", g)
		default:
		}
	}
	f.wake()
	for g, want := range map[string]bool{"a": true, "b": true, "c": false} {
		select {
		case <-wakes[g]:
			if !want {
				t.Errorf("%s woke", g)
			}
		default:
			if want {
				t.Errorf("%s slept on", g)
			}
		}
	}
}
