package policytest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// Subject is a feed under test, and the book that it tells of.
type Subject struct {
	policy.Feed
	policy.Book
}

// Open returns a new feed of a new and empty book, which ends with the test. Their store gives tags up to maxTag, and freed ones not again during the test.
type Open func(t testing.TB, maxTag identity.Tag) Subject

// RunFeed tests the feeds that open returns.
func RunFeed(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, open Open)
	}{
		{"WatchBeginsWithEverythingThatTouches", testFull},
		{"WatchBringsChanges", testDelta},
		{"WatchSleepsThroughOthersChanges", testUntouched},
		{"WatchFromAnotherEpochBringsEverything", testEpoch},
		{"WatchEndsWithContext", testWatchCancelled},
		{"WatchersFollow", testWatchers},
		{"TagsAreOnePerGroup", testTags},
		{"FreedTagsRest", testTagsRest},
		{"TagsOfInternalClientsStay", testTag},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open) })
	}
}

// agent follows the rules of its groups as a host does.
type agent struct {
	feed  policy.Feed
	ask   policy.Ask
	rules []policy.Rule
}

func newAgent(f policy.Feed, host string, groups ...identity.Group) *agent {
	groups = slices.Clone(groups)
	slices.Sort(groups)
	return &agent{feed: f, ask: policy.Ask{Host: host, Groups: groups}}
}

// next takes the next update with changes over.
func (a *agent) next(ctx context.Context) (policy.Update, error) {
	for {
		u, err := a.feed.Watch(ctx, a.ask)
		if err != nil {
			return u, fmt.Errorf("watch since %q: %w", a.ask.Since, err)
		}
		if u.Revision.Epoch == a.ask.Since.Epoch && u.Revision.Counter < a.ask.Since.Counter {
			return u, fmt.Errorf("watch since %v: went back to %v", a.ask.Since, u.Revision)
		}
		if a.rules, err = u.Apply(a.rules); err != nil {
			return u, fmt.Errorf("watch since %q: %w", a.ask.Since, err)
		}
		a.ask.Since, a.ask.InForce = u.Revision, u.Revision
		if u.Changes() {
			return u, nil
		}
	}
}

// policies returns the policies that the agent has.
func (a *agent) policies() []policy.Policy {
	ps := make([]policy.Policy, len(a.rules))
	for i, r := range a.rules {
		ps[i] = r.Policy
	}
	return ps
}

func (a *agent) has(ps ...policy.Policy) bool {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, policy.Compare)
	return slices.Equal(a.policies(), ps)
}

// must takes the next update over.
func (a *agent) must(t testing.TB) policy.Update {
	t.Helper()
	u, err := a.next(within(t, 15*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// follow takes updates over until the agent has just these policies.
func (a *agent) follow(t testing.TB, ps ...policy.Policy) {
	t.Helper()
	ctx := within(t, 15*time.Second)
	for !a.has(ps...) {
		if _, err := a.next(ctx); err != nil {
			t.Fatalf("%v; has %v, want %v", err, a.policies(), ps)
		}
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func testFull(t *testing.T, open Open) {
	s := open(t, 100)
	a := newAgent(s, "h1", "api", "web")
	if u := a.must(t); !u.Full || u.Count != 0 || len(u.Set) != 0 || u.Revision.IsZero() {
		t.Errorf("an empty feed begins with %+v, want a full update without rules", u)
	}
	ps := all(t, "web api tcp 8080", "x api tcp 1", "web y udp 2", "web web tcp 3-4", "x y tcp 5", "z z tcp 6")
	create(t, s, ps...)
	b := newAgent(s, "h2", "api", "web")
	b.follow(t, ps[:4]...)
	if !slices.IsSortedFunc(b.rules, func(a, b policy.Rule) int { return policy.Compare(a.Policy, b.Policy) }) {
		t.Errorf("rules are not sorted: %v", b.rules)
	}
	newAgent(s, "h3", "z").follow(t, ps[5])
	if u := newAgent(s, "h4").must(t); !u.Full || u.Count != 0 {
		t.Errorf("a host without groups gets %+v, want nothing", u)
	}
	if u := newAgent(s, "h5", "nobody").must(t); !u.Full || u.Count != 0 {
		t.Errorf("a host with an unknown group gets %+v, want nothing", u)
	}
}

func testDelta(t *testing.T, open Open) {
	s := open(t, 100)
	ps := all(t, "web api tcp 8080", "web api tcp 8081", "api db tcp 5432", "x y tcp 1", "api web udp 53")
	create(t, s, ps[0])
	a := newAgent(s, "h1", "api", "web")
	a.follow(t, ps[0])
	early := *a

	got := make(chan policy.Update, 1)
	go func() {
		defer close(got)
		if u, err := a.next(within(t, 15*time.Second)); err == nil {
			got <- u
		}
	}()
	create(t, s, ps[1])
	u, ok := <-got
	if !ok || u.Full || len(u.Set) != 1 || u.Set[0].Policy != ps[1] || len(u.Gone) > 0 || u.Count != 2 {
		t.Fatalf("watch during a creation: %+v %v, want %v only", u, ok, ps[1])
	}
	create(t, s, ps[2], ps[3], ps[4])
	remove(t, s, ps[0])
	a.follow(t, ps[1], ps[2], ps[4])
	remove(t, s, ps[1], ps[3])
	create(t, s, ps[1])
	remove(t, s, ps[1])
	a.follow(t, ps[2], ps[4])
	early.follow(t, ps[2], ps[4]) // who slept through all of it gets there too
	if diff := cmp.Diff(a.rules, early.rules, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("two agents differ:\n%s", diff)
	}
}

// testUntouched lets others' policies change while a watcher waits.
func testUntouched(t *testing.T, open Open) {
	s := open(t, 100)
	mine := Of(t, "web api tcp 8080")
	create(t, s, mine)
	a := newAgent(s, "h1", "web")
	a.follow(t, mine)
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := a.next(ctx)
		done <- err
	}()
	for i := range 20 {
		create(t, s, Of(t, fmt.Sprintf("x%d api tcp 1", i)))
	}
	if err := <-done; err == nil {
		t.Error("changes of other groups came as changes")
	} else if ctx.Err() == nil {
		t.Error(err)
	}
	more := Of(t, "y web tcp 1")
	create(t, s, more)
	a.follow(t, mine, more)
}

func testEpoch(t *testing.T, open Open) {
	s := open(t, 100)
	p := Of(t, "web api tcp 8080")
	create(t, s, p)
	for _, since := range []revision.Revision{{Epoch: "another", Counter: 1}, {Epoch: "another", Counter: 1 << 60}} {
		Eventually(t, "a watch from another epoch brings everything", func() bool {
			u, err := s.Watch(within(t, 15*time.Second), policy.Ask{Host: "h", Groups: []identity.Group{"web"}, Since: since})
			if err != nil || !u.Full {
				t.Fatalf("watch since %v of another epoch: %+v, %v, want everything", since, u, err)
			}
			return u.Count == 1
		})
	}
}

func testWatchCancelled(t *testing.T, open Open) {
	s := open(t, 100)
	a := newAgent(s, "h1", "web")
	a.must(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := a.next(ctx)
		done <- err
	}()
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a cancelled watch returned changes")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a cancelled watch went on")
	}
}

// testWatchers has agents with random groups follow random changes. Every state that one is told of adds up; in the end all have what is listed.
func testWatchers(t *testing.T, open Open) {
	s := open(t, 1000)
	end := Of(t, "end end tcp 1")
	agents := make([]*agent, 30)
	done := make(chan error, len(agents))
	for i := range agents {
		rnd := rand.New(rand.NewPCG(7, uint64(i)))
		groups := []identity.Group{"end"}
		for g := range 6 {
			if rnd.IntN(3) == 0 {
				groups = append(groups, identity.Group(fmt.Sprintf("g%d", g)))
			}
		}
		a := newAgent(s, fmt.Sprintf("h%d", i), groups...)
		agents[i] = a
		ctx := within(t, 60*time.Second)
		go func() {
			for !slices.Contains(a.policies(), end) {
				if _, err := a.next(ctx); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	rnd := rand.New(rand.NewPCG(11, 13))
	for range 100 {
		if p := randomPolicy(t, rnd); rnd.IntN(2) == 0 {
			create(t, s, p, randomPolicy(t, rnd))
		} else {
			remove(t, s, p, randomPolicy(t, rnd))
		}
	}
	create(t, s, end)
	for range agents {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for _, a := range agents {
		if diff := cmp.Diff(list(t, s, policy.Filter{Either: a.ask.Groups}), a.policies(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("agent with %v differs (-list +agent):\n%s", a.ask.Groups, diff)
		}
	}
}

// tags returns the tags of the groups of an agent's rules. A group that has two fails the test.
func tags(t testing.TB, rules []policy.Rule) map[identity.Group]identity.Tag {
	t.Helper()
	of := map[identity.Group]identity.Tag{}
	owner := map[identity.Tag]identity.Group{}
	note := func(g identity.Group, tag identity.Tag) {
		if was, ok := of[g]; ok && was != tag || tag == 0 {
			t.Errorf("group %q has the tags %v and %v", g, was, tag)
		}
		if was, ok := owner[tag]; ok && was != g {
			t.Errorf("tag %v is of %q and %q", tag, was, g)
		}
		of[g], owner[tag] = tag, g
	}
	for _, r := range rules {
		note(r.Source, r.SourceTag)
		note(r.Destination, r.DestinationTag)
	}
	return of
}

func testTags(t *testing.T, open Open) {
	s := open(t, 5)
	ps := all(t, "a b tcp 1", "b c tcp 1", "c c tcp 2", "d a tcp 3", "a e udp 4")
	create(t, s, ps...)
	one, other := newAgent(s, "h1", "a", "b", "c"), newAgent(s, "h2", "a", "d", "e")
	one.follow(t, ps...)
	other.follow(t, ps[0], ps[3], ps[4])
	if of := tags(t, append(slices.Clone(one.rules), other.rules...)); len(of) != 5 {
		t.Errorf("tags are %v, want one for each of five groups", of)
	}
}

func testTagsRest(t *testing.T, open Open) {
	s := open(t, 100)
	ps := all(t, "a b tcp 1", "c b tcp 1")
	create(t, s, ps...)
	a := newAgent(s, "h1", "a", "b", "c", "d")
	a.follow(t, ps...)
	before := tags(t, a.rules)
	remove(t, s, ps[0])
	a.follow(t, ps[1])
	more := Of(t, "d c tcp 1")
	create(t, s, more)
	a.follow(t, ps[1], more)
	after := tags(t, a.rules)
	if after["d"] == before["a"] || after["b"] != before["b"] || after["c"] != before["c"] {
		t.Errorf("tags were %v and are %v: d must not have what a had a moment ago, and the others what they had", before, after)
	}
}

func testTag(t *testing.T, open Open) {
	s := open(t, 3)
	router, err := s.Tag(t.Context(), identity.IngressRouter, identity.Router)
	if err != nil || router == 0 {
		t.Fatalf("tag of the router: %v, %v", router, err)
	}
	p := Of(t, "a b tcp 1")
	create(t, s, p)
	remove(t, s, p)
	for range 2 {
		if again, err := s.Tag(t.Context(), identity.IngressRouter, identity.Router); again != router || err != nil {
			t.Errorf("tag of the router: %v, %v, want %v", again, err, router)
		}
	}
	if tag, err := s.Tag(t.Context(), identity.IngressRouter, "another"); !errors.Is(err, fault.Conflict) {
		t.Errorf("tag of another kind: %v, %v, want a Conflict fault", tag, err)
	}
	if tag, err := s.Tag(t.Context(), "more", "another"); err == nil {
		t.Errorf("tag %v was given to another group, though those of a and b rest and there are only three", tag)
	}
}
