// Package policytest holds what every policy.Book and every policy.Feed must do, as tests to run against one: a database store, or the client of a
// policy-server with a store behind it.
//
// Use: policytest.Run(t, func(t testing.TB, maxTag identity.Tag) policy.Book {...}), policytest.RunFeed(t, func(t testing.TB, maxTag identity.Tag) policytest.Subject {...}).
package policytest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// OpenBook returns a new and empty book, which ends with the test. Its store gives tags up to maxTag, and freed ones not again during the test.
type OpenBook func(t testing.TB, maxTag identity.Tag) policy.Book

// Run tests the books that open returns.
func Run(t *testing.T, open OpenBook) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, open OpenBook)
	}{
		{"WhatIsCreatedIsListedInOrder", testList},
		{"FiltersSelect", testFilters},
		{"RepetitionIsNoError", testRepetition},
		{"NearlyEqualPoliciesAreDistinct", testDistinct},
		{"InvalidRequestChangesNothing", testInvalid},
		{"ExhaustionChangesNothing", testExhaustion},
		{"ManyInOneRequest", testMany},
		{"ConcurrentWritersLoseNothing", testConcurrent},
		{"RandomRequests", testRandom},
		{"CancelledContext", testCancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open) })
	}
}

// Of returns a policy from "source destination protocol ports", such as "web api tcp 8080-8090".
func Of(t testing.TB, text string) policy.Policy {
	t.Helper()
	var source, destination, protocol, ports string
	if n, err := fmt.Sscan(text, &source, &destination, &protocol, &ports); n != 4 {
		t.Fatalf("policy %q: %v", text, err)
	}
	p := policy.Policy{Source: identity.Group(source), Destination: identity.Group(destination)}
	var err, perr error
	p.Protocol, err = policy.ParseProtocol(protocol)
	p.Ports, perr = policy.ParsePorts(ports)
	if err := errors.Join(err, perr); err != nil {
		t.Fatalf("policy %q: %v", text, err)
	}
	return p
}

func all(t testing.TB, texts ...string) []policy.Policy {
	t.Helper()
	ps := make([]policy.Policy, len(texts))
	for i, s := range texts {
		ps[i] = Of(t, s)
	}
	return ps
}

// Eventually waits for something that must become true within 15 s.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	testkit.Until(t, 15*time.Second, what, ok)
}

func create(t testing.TB, b policy.Book, ps ...policy.Policy) {
	t.Helper()
	if err := b.Create(t.Context(), ps); err != nil {
		t.Fatalf("create %v: %v", first(ps), err)
	}
}

func remove(t testing.TB, b policy.Book, ps ...policy.Policy) {
	t.Helper()
	if err := b.Delete(t.Context(), ps); err != nil {
		t.Fatalf("delete %v: %v", first(ps), err)
	}
}

// first keeps messages short.
func first(ps []policy.Policy) []policy.Policy { return ps[:min(3, len(ps))] }

func list(t testing.TB, b policy.Book, f policy.Filter) []policy.Policy {
	t.Helper()
	ps, err := b.List(t.Context(), f)
	if err != nil {
		t.Fatalf("list %+v: %v", f, err)
	}
	return ps
}

func wantListed(t testing.TB, b policy.Book, f policy.Filter, want ...policy.Policy) {
	t.Helper()
	want = slices.Clone(want)
	slices.SortFunc(want, policy.Compare)
	if diff := cmp.Diff(want, list(t, b, f), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("policies of %+v differ (-want +got):\n%s", f, diff)
	}
}

func testList(t *testing.T, open OpenBook) {
	b := open(t, 100)
	wantListed(t, b, policy.Filter{})
	ps := all(t, "web api tcp 8080", "api db tcp 5432", "web api udp 53", "web web tcp 7000-7010", "web api tcp 8080")
	create(t, b, ps...)
	wantListed(t, b, policy.Filter{}, ps[:4]...)
	remove(t, b, ps[1], ps[1], ps[3])
	wantListed(t, b, policy.Filter{}, ps[0], ps[2])
	create(t, b, ps[1])
	wantListed(t, b, policy.Filter{}, ps[:3]...)
	remove(t, b, ps...)
	wantListed(t, b, policy.Filter{})
}

func testFilters(t *testing.T, open OpenBook) {
	b := open(t, 100)
	ps := all(t, "a b tcp 1", "b a tcp 1", "a a tcp 2", "b c udp 3", "c a tcp 4-5", "d e tcp 6")
	create(t, b, ps...)
	g := func(names ...identity.Group) []identity.Group { return append([]identity.Group{}, names...) }
	for _, c := range []struct {
		name string
		f    policy.Filter
		want []int
	}{
		{"nothing", policy.Filter{}, []int{0, 1, 2, 3, 4, 5}},
		{"either", policy.Filter{Either: g("a")}, []int{0, 1, 2, 4}},
		{"either of two, named twice", policy.Filter{Either: g("a", "b", "a")}, []int{0, 1, 2, 3, 4}},
		{"either of none", policy.Filter{Either: g()}, nil},
		{"either, empty or unknown", policy.Filter{Either: g("", "x")}, nil},
		{"sources", policy.Filter{Sources: g("b", "d", "b")}, []int{1, 3, 5}},
		{"sources of none", policy.Filter{Sources: g()}, nil},
		{"destinations", policy.Filter{Destinations: g("a", "e", "e")}, []int{1, 2, 4, 5}},
		{"both", policy.Filter{Sources: g("a", "b"), Destinations: g("a")}, []int{1, 2}},
		{"both, none of the one", policy.Filter{Sources: g("a", "b"), Destinations: g()}, nil},
		{"both, none of the other", policy.Filter{Sources: g(), Destinations: g("a")}, nil},
		{"either wins", policy.Filter{Either: g("d"), Sources: g("a"), Destinations: g("b")}, []int{5}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var want []policy.Policy
			for _, i := range c.want {
				want = append(want, ps[i])
			}
			wantListed(t, b, c.f, want...)
		})
	}
}

func testRepetition(t *testing.T, open OpenBook) {
	b := open(t, 100)
	p := Of(t, "web api tcp 8080")
	remove(t, b, p)
	create(t, b, p)
	create(t, b, p, p)
	wantListed(t, b, policy.Filter{}, p)
	remove(t, b, p, Of(t, "web api tcp 8081"), Of(t, "x y tcp 1"))
	remove(t, b, p)
	wantListed(t, b, policy.Filter{})
}

// testDistinct has names that differ in what databases may take for equal.
func testDistinct(t *testing.T, open OpenBook) {
	b := open(t, 100)
	base := Of(t, "web api tcp 8080-8090")
	ps := []policy.Policy{base}
	for _, name := range []identity.Group{"Api", "API", "api ", " api", "\u00e5pi", "a\u030api", "apı", "api\u00a0", "ａｐｉ", "'api'", `"api"`, `a\pi`, "ap%", "ap_", "?", "$1"} {
		p := base
		p.Destination = name
		ps = append(ps, p)
		p.Source, p.Destination = name, base.Destination
		ps = append(ps, p)
	}
	ps = append(ps, all(t, "web api udp 8080-8090", "web api tcp 8080", "web api tcp 8090", "web api tcp 8080-8091", "web api tcp 8079-8090", "web api tcp 1-65535")...)
	create(t, b, ps...)
	wantListed(t, b, policy.Filter{}, ps...)
	for i, p := range ps {
		if got := list(t, b, policy.Filter{Sources: []identity.Group{p.Source}, Destinations: []identity.Group{p.Destination}}); !slices.Contains(got, p) {
			t.Errorf("policy %d, %v, is not found by its groups: %v", i, p, got)
		}
	}
	remove(t, b, base)
	wantListed(t, b, policy.Filter{}, ps[1:]...)
}

func testInvalid(t *testing.T, open OpenBook) {
	b := open(t, 100)
	good, other := Of(t, "web api tcp 8080"), Of(t, "a b tcp 1")
	create(t, b, good)
	for name, spoil := range map[string]func(p *policy.Policy){
		"no source":           func(p *policy.Policy) { p.Source = "" },
		"no destination":      func(p *policy.Policy) { p.Destination = "" },
		"no protocol":         func(p *policy.Policy) { p.Protocol = 0 },
		"another protocol":    func(p *policy.Policy) { p.Protocol = 1 },
		"no ports":            func(p *policy.Policy) { p.Ports = policy.Ports{} },
		"ports run backwards": func(p *policy.Policy) { p.Ports = policy.Ports{First: 2, Last: 1} },
	} {
		bad := other
		spoil(&bad)
		if err := b.Create(t.Context(), []policy.Policy{other, bad}); !errors.Is(err, fault.Invalid) {
			t.Errorf("create, %s: %v, want an Invalid fault", name, err)
		}
		if err := b.Delete(t.Context(), []policy.Policy{good, bad}); !errors.Is(err, fault.Invalid) {
			t.Errorf("delete, %s: %v, want an Invalid fault", name, err)
		}
	}
	wantListed(t, b, policy.Filter{}, good)
}

func testExhaustion(t *testing.T, open OpenBook) {
	b := open(t, 4)
	ps := all(t, "a b tcp 1", "c d tcp 1")
	create(t, b, ps...)
	refused := func(texts ...string) {
		t.Helper()
		err := b.Create(t.Context(), all(t, texts...))
		if k := fault.Of(err); k != fault.Exhausted && k != fault.Conflict && k != fault.Denied { // over HTTP these are not told apart
			t.Errorf("create %v: %v, want an Exhausted fault", texts, err)
		}
	}
	refused("e f tcp 1")
	refused("a e tcp 1")
	refused("a c tcp 9", "a e tcp 1")
	wantListed(t, b, policy.Filter{}, ps...)
	more := all(t, "a c tcp 1", "d d tcp 1-9")
	create(t, b, more...)
	remove(t, b, ps...)
	refused("a e tcp 1") // b's tag is free, but not long enough
	wantListed(t, b, policy.Filter{}, more...)
}

func testMany(t *testing.T, open OpenBook) {
	b := open(t, identity.MaxTag)
	var ps []policy.Policy
	for i := range 3000 {
		ps = append(ps, Of(t, fmt.Sprintf("source-%d destination-%d tcp %d", i%500, i%700, 1000+i)))
	}
	create(t, b, ps...)
	wantListed(t, b, policy.Filter{}, ps...)
	remove(t, b, ps[:2500]...)
	wantListed(t, b, policy.Filter{}, ps[2500:]...)
}

// testConcurrent has writers that each have a policy of their own, beside one that all of them create and delete.
func testConcurrent(t *testing.T, open OpenBook) {
	b := open(t, 1000)
	common := Of(t, "all all tcp 1")
	var wg sync.WaitGroup
	var mu sync.Mutex
	var want []policy.Policy
	for w := range 16 {
		wg.Go(func() {
			for i := range 12 {
				p := Of(t, fmt.Sprintf("w%d d%d tcp %d", w, i%3, 1+i))
				err := b.Create(t.Context(), []policy.Policy{p, common})
				if err == nil && i%4 == 3 {
					err = b.Delete(t.Context(), []policy.Policy{p, common})
				} else {
					mu.Lock()
					want = append(want, p)
					mu.Unlock()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	create(t, b, common)
	wantListed(t, b, policy.Filter{}, append(want, common)...)
}

// testRandom compares a book with a map.
func testRandom(t *testing.T, open OpenBook) {
	b := open(t, 300)
	rnd := rand.New(rand.NewPCG(3, 5))
	held := map[policy.Policy]bool{}
	for range 120 {
		ps := make([]policy.Policy, 1+rnd.IntN(6))
		for i := range ps {
			ps[i] = randomPolicy(t, rnd)
		}
		there := rnd.IntN(2) == 0
		if there {
			create(t, b, ps...)
		} else {
			remove(t, b, ps...)
		}
		for _, p := range ps {
			if delete(held, p); there {
				held[p] = true
			}
		}
		wantListed(t, b, policy.Filter{}, slices.Collect(maps.Keys(held))...)
	}
}

func randomPolicy(t testing.TB, rnd *rand.Rand) policy.Policy {
	return Of(t, fmt.Sprintf("g%d g%d %s %d", rnd.IntN(6), rnd.IntN(6), [2]string{"tcp", "udp"}[rnd.IntN(2)], 1+rnd.IntN(2)))
}

func testCancelled(t *testing.T, open OpenBook) {
	b := open(t, 100)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Create(ctx, all(t, "a b tcp 1")); err == nil {
		t.Error("create with a cancelled context succeeded")
	}
	if err := b.Delete(ctx, all(t, "a b tcp 1")); err == nil {
		t.Error("delete with a cancelled context succeeded")
	}
}
