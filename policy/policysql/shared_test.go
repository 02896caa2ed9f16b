package policysql_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/revision"
)

func create(t testing.TB, s *policysql.Store, ps ...policy.Policy) revision.Revision {
	t.Helper()
	r, err := s.CreateWithin(t.Context(), ps, 0)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	return r
}

func remove(t testing.TB, s *policysql.Store, ps ...policy.Policy) revision.Revision {
	t.Helper()
	r, err := s.Remove(t.Context(), ps)
	if err != nil {
		t.Fatalf("remove: %v", err)
	}
	return r
}

func rules(t testing.TB, s *policysql.Store) []policy.Rule {
	t.Helper()
	rs, err := s.Rules(t.Context(), policy.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func snapshot(t testing.TB, s *policysql.Store) *policysql.Snapshot {
	t.Helper()
	sn, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sn
}

func tags(t testing.TB, s *policysql.Store) map[identity.Group]identity.Tagged {
	t.Helper()
	list, err := s.Tags(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := map[identity.Group]identity.Tagged{}
	for _, g := range list {
		all[g.Group] = g
	}
	return all
}

// same fails unless two stores, or one and its memory from before, hold the same.
func same(t testing.TB, a, b []policy.Rule) {
	t.Helper()
	if !slices.Equal(a, b) {
		t.Errorf("%d rules differ from %d:\n%v\n%v", len(a), len(b), a[:min(5, len(a))], b[:min(5, len(b))])
	}
}

// TestManyStoresOnOneDatabase has the clients of three stores write at random. Nothing is lost or doubled, no tag is given twice, no quota passed, and the stores agree.
func TestManyStoresOnOneDatabase(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		stores := []*policysql.Store{open(t, cfg), open(t, cfg), open(t, cfg)}
		writeAtRandom(t, stores, 12, 15)
		third := open(t, cfg)
		for _, s := range stores {
			policytest.Eventually(t, "all stores agree", func() bool { return slices.Equal(rules(t, s), rules(t, third)) })
		}
	})
}

// writeAtRandom has clients create and remove policies of their own, each at any store, and all of them compete for a quota. In the end just what was
// created is there.
func writeAtRandom(t *testing.T, stores []*policysql.Store, clients, rounds int) {
	t.Helper()
	const quota = 10
	held := make([]map[policy.Policy]bool, clients)
	var mu sync.Mutex
	granted := 0
	var wg sync.WaitGroup
	for c := range clients {
		held[c] = map[policy.Policy]bool{}
		wg.Go(func() {
			for i := range rounds {
				s := stores[(c+i)%len(stores)]
				p := policytest.Of(t, fmt.Sprintf("own%d shared%d tcp %d", c, i%4, 1+i%3))
				var err error
				if held[c][p] {
					delete(held[c], p)
					err = s.Delete(t.Context(), []policy.Policy{p})
				} else {
					held[c][p] = true
					err = s.Create(t.Context(), []policy.Policy{p})
				}
				if err != nil {
					t.Errorf("client %d: %v", c, err)
				}
				p = policytest.Of(t, fmt.Sprintf("scarce d tcp %d", 1+c*rounds+i))
				_, err = s.CreateWithin(t.Context(), []policy.Policy{p}, quota)
				if err == nil {
					mu.Lock()
					granted++
					held[c][p] = true
					mu.Unlock()
				} else if !errors.Is(err, policysql.ErrQuota) {
					t.Errorf("client %d: %v", c, err)
				}
			}
		})
	}
	wg.Wait()
	if granted != quota {
		t.Errorf("%d policies of the scarce source were granted, want %d", granted, quota)
	}
	var want []policy.Policy
	for _, h := range held {
		for p := range h {
			want = append(want, p)
		}
	}
	slices.SortFunc(want, policy.Compare)
	for _, s := range stores {
		policytest.Eventually(t, "what was created is listed", func() bool {
			got, err := s.List(t.Context(), policy.Filter{})
			return err == nil && slices.Equal(got, want)
		})
		owner := map[identity.Tag]identity.Group{}
		for _, g := range tags(t, s) {
			if was, dup := owner[g.Tag]; dup {
				t.Errorf("tag %v is of %q and %q", g.Tag, was, g.Group)
			}
			owner[g.Tag] = g.Group
		}
	}
}

// TestOthersWritesAreSeenSoon has a change of one store wake a watcher of another.
func TestOthersWritesAreSeenSoon(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		one, other := open(t, config(db)), open(t, config(db))
		a := policy.Ask{Groups: []identity.Group{"web"}}
		u, err := other.Watch(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		var slowest time.Duration
		for i := range 5 {
			done := make(chan time.Duration, 1)
			start := time.Now()
			go func() {
				a.Since = u.Revision
				if u, err = other.Watch(t.Context(), a); err != nil || len(u.Set) != 1 {
					t.Errorf("watch: %+v, %v", u, err)
				}
				done <- time.Since(start)
			}()
			create(t, one, policytest.Of(t, fmt.Sprintf("web api tcp %d", 1+i)))
			slowest = max(slowest, <-done)
		}
		t.Logf("the slowest took %v", slowest)
		if slowest > 5*time.Second { // a quarter of a second where nobody else works
			t.Errorf("a change took %v from one store to the other", slowest)
		}
	})
}

// TestWriteAtOnceAfterAnotherStore deletes at one store and creates at the other at once: what the other remembers must not make it take the creation for done.
func TestWriteAtOnceAfterAnotherStore(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		stores := []*policysql.Store{open(t, config(db)), open(t, config(db))}
		p := policytest.Of(t, "web api tcp 1")
		var last revision.Revision
		for i := range 20 {
			for j, write := range []func(testing.TB, *policysql.Store, ...policy.Policy) revision.Revision{create, remove} {
				r := write(t, stores[(i+j)%2], p)
				if r.Epoch != last.Epoch && i+j > 0 || r.Counter <= last.Counter {
					t.Fatalf("write %d, %d moved the revision from %v to %v: it did nothing", i, j, last, r)
				}
				last = r
			}
		}
	})
}

// TestGroupThatAnotherStoreHasJustTagged writes a policy of a group of which this store does not know yet that it has a tag, and another one than it would get here.
func TestGroupThatAnotherStoreHasJustTagged(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db)), connect(t, db)
		create(t, s, policytest.Of(t, "web api tcp 1"))
		for i := range 20 {
			at := int64(snapshot(t, s).Revision.Counter)
			name, tag := fmt.Sprintf("late%d", i), 1000+i
			_, err := raw.Atomic(t.Context(), []sqldb.Statement{
				{Text: "INSERT INTO silk_policy_groups (tag, name, former, kind, freed_at, assigned, changed) VALUES (?, ?, '', 'app', 0, ?, ?)", Args: []any{int64(tag), name, at + 1, at + 1}, Want: 1},
				{Text: "UPDATE silk_policy_revision SET counter = ?, stamp = stamp + 1000 WHERE counter = ?", Args: []any{at + 1, at}, Want: 1},
			})
			if err != nil {
				t.Fatal(err)
			}
			create(t, s, policytest.Of(t, fmt.Sprintf("%s new%d tcp 1", name, i)))
			for _, g := range tags(t, s) {
				if string(g.Group) == name && int(g.Tag) != tag {
					t.Errorf("%s has tag %v, want %v as the other store gave it", name, g.Tag, tag)
				}
			}
		}
	})
}

func TestNothingNewMovesNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s := open(t, config(db))
		p := policytest.Of(t, "web api tcp 1")
		at := create(t, s, p)
		stamp := snapshot(t, s).Stamp
		for name, f := range map[string]func() revision.Revision{
			"create again":   func() revision.Revision { return create(t, s, p, p) },
			"create nothing": func() revision.Revision { return create(t, s) },
			"remove another": func() revision.Revision { return remove(t, s, policytest.Of(t, "web api tcp 2")) },
			"remove unknown": func() revision.Revision { return remove(t, s, policytest.Of(t, "x y tcp 2")) },
			"remove nothing": func() revision.Revision { return remove(t, s) },
		} {
			if got := f(); got != at {
				t.Errorf("%s: revision %v, was %v", name, got, at)
			}
		}
		if sn := snapshot(t, s); sn.Revision != at || sn.Stamp != stamp {
			t.Errorf("at %v, stamp %d, want %v, %d", sn.Revision, sn.Stamp, at, stamp)
		}
		if r := remove(t, s, p); r.Epoch != at.Epoch || r.Counter != at.Counter+1 || snapshot(t, s).Stamp <= stamp {
			t.Errorf("a removal led from %v to %v, stamp %d to %d", at, r, stamp, snapshot(t, s).Stamp)
		}
	})
}

// TestStampOnlyGrows writes through two stores, and sets the stored stamp to what a clock that was ahead has left.
func TestStampOnlyGrows(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		stores := []*policysql.Store{open(t, config(db)), open(t, config(db))}
		raw := connect(t, db)
		first := snapshot(t, stores[0]).Stamp
		if now := time.Now().UnixNano(); first < now-int64(time.Hour) || first > now+int64(time.Hour) {
			t.Errorf("the stamp begins at %d, want about %d", first, now)
		}
		exec(t, raw, "UPDATE silk_policy_revision SET stamp = stamp + 3600000000000, counter = counter + 1")
		last := first + int64(time.Hour) - 1
		for i := range 10 {
			s := stores[i%2]
			create(t, s, policytest.Of(t, fmt.Sprintf("web api tcp %d", 1+i)))
			stamp, err := s.Stamp(t.Context())
			if err != nil || stamp <= last || stamp%1000 != 0 {
				t.Errorf("write %d: the stamp is %d, %v, was %d", i, stamp, err, last)
			}
			last = stamp
		}
	})
}

// TestRestartForgetsNothing opens a store after another: policies, tags, quarantine, revision, and changes for those who watched the first.
func TestRestartForgetsNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, stop := start(t, config(db))
		router, err := s.Tag(t.Context(), identity.IngressRouter, identity.Router)
		if err != nil {
			t.Fatal(err)
		}
		create(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "b c udp 1-9"), policytest.Of(t, "x y tcp 1"))
		freed := tags(t, s)["x"]
		ask := policy.Ask{Groups: []identity.Group{"b", "c"}}
		u, err := s.Watch(t.Context(), ask)
		if err != nil {
			t.Fatal(err)
		}
		held, err := u.Apply(nil)
		if err != nil {
			t.Fatal(err)
		}
		remove(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "x y tcp 1"))
		create(t, s, policytest.Of(t, "c c tcp 1"), policytest.Of(t, "a c tcp 1"))
		before, had, stamp := rules(t, s), tags(t, s), snapshot(t, s).Stamp
		stop()
		s = open(t, config(db))
		same(t, rules(t, s), before)
		if sn := snapshot(t, s); sn.Stamp != stamp || sn.Revision.Epoch != u.Revision.Epoch {
			t.Errorf("at %v, stamp %d, was at %v, %d", sn.Revision, sn.Stamp, u.Revision, stamp)
		}
		if got := tags(t, s); len(got) != len(had) || got[identity.IngressRouter].Tag != router {
			t.Errorf("tags are %v, were %v", got, had)
		}
		ask.Since = u.Revision
		if u, err = s.Watch(t.Context(), ask); err != nil || u.Full {
			t.Fatalf("watch since before the restart: %+v, %v, want what changed", u, err)
		}
		if held, err = u.Apply(held); err != nil || len(held) != 3 {
			t.Errorf("the watcher has %v, %v", held, err)
		}
		create(t, s, policytest.Of(t, "n m tcp 1"))
		if got := tags(t, s); got["n"].Tag == freed.Tag || got["m"].Tag == freed.Tag {
			t.Errorf("%v and %v: tag %v was free for too short a time", got["n"], got["m"], freed.Tag)
		}
	})
}

// TestAServerTellsOfWhatItNeverSaw has a policy come and go between two looks of a server at the database. A watcher that has it from another server must be
// told by this one that it is gone, also when its groups are gone with it or its tags are others' by now.
func TestAServerTellsOfWhatItNeverSaw(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		quick := config(db)
		quick.Quarantine = time.Microsecond
		s := open(t, quick)
		create(t, s, policytest.Of(t, "a x tcp 1"), policytest.Of(t, "b x tcp 1"))
		for _, c := range []struct{ name, goes, comes string }{
			{"its groups stay", "a b tcp 2", "b a udp 1"},
			{"its groups go", "c d tcp 2", "b a udp 2"},
			{"its tags are others' by now", "e f tcp 2", "g h udp 3"},
		} {
			ask := policy.Ask{Groups: []identity.Group{"a", "b", "c", "d", "e", "f"}}
			var before policy.Update                                // what s tells while the policy is there
			other, stop := start(t, quick, func(*policysql.Store) { // it has looked, and does again when it runs
				create(t, s, policytest.Of(t, c.goes))
				before = watch(t, s, ask)
				remove(t, s, policytest.Of(t, c.goes))
				create(t, s, policytest.Of(t, c.comes))
			})
			policytest.Eventually(t, "the other server follows", func() bool { return snapshot(t, other).Revision == snapshot(t, s).Revision })
			want := watch(t, s, ask).Set
			ask.Since = before.Revision
			got, err := watch(t, other, ask).Apply(before.Set)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s: told so that %v are held (%v), want %v", c.name, got, err, want)
			}
			stop()
		}
	})
}

// watch asks, and waits a second at most.
func watch(t testing.TB, s *policysql.Store, ask policy.Ask) policy.Update {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	u, err := s.Watch(ctx, ask)
	if err != nil {
		t.Fatalf("watch: %v", err)
	}
	return u
}
