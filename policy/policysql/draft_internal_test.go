package policysql

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

func pol(source, destination string, port int) policy.Policy {
	return policy.Policy{Source: identity.Group(source), Destination: identity.Group(destination), Protocol: policy.TCP, Ports: policy.Ports{First: uint16(port), Last: uint16(port)}}
}

func empty() *view { return newView(revision.Revision{Epoch: "e", Counter: 1}, 1000, nil, nil) }

// settle applies requests to a view as one batch and returns the view after it.
func settle(t *testing.T, v *view, p *pool, now int64, qs ...request) (*view, change, []error) {
	t.Helper()
	d := newDraft(v, p, now)
	errs := make([]error, len(qs))
	for i, q := range qs {
		_, errs[i] = d.judge(q)
	}
	c := d.change()
	for _, g := range c.freed {
		p.set(g.Tag, now)
	}
	return v.with(c, revision.Revision{Epoch: "e", Counter: v.head.Counter + 1}, v.stamp+1000), c, errs
}

func TestQuotaCountsWhatIsNew(t *testing.T) {
	p := newPool(100, time.Hour)
	create := func(quota int, ps ...policy.Policy) request { return request{op: create, policies: ps, quota: quota} }
	v, _, _ := settle(t, empty(), p, 1, create(0, pol("a", "b", 1), pol("a", "b", 2), pol("b", "a", 1)))
	for name, c := range map[string]struct {
		q  request
		ok bool
	}{
		"existing ones at the limit":       {create(2, pol("a", "b", 1), pol("a", "b", 2)), true},
		"existing ones above the limit":    {create(1, pol("a", "b", 1), pol("a", "b", 2)), true},
		"one more":                         {create(2, pol("a", "b", 3)), false},
		"one more, within":                 {create(3, pol("a", "b", 3)), true},
		"the same one twice":               {create(3, pol("a", "b", 3), pol("a", "b", 3)), true},
		"another source":                   {create(2, pol("b", "a", 2)), true},
		"one of two sources":               {create(2, pol("c", "a", 2), pol("a", "b", 3)), false},
		"a destination does not count":     {create(2, pol("c", "a", 2), pol("d", "a", 2)), true},
		"existing and new ones above it":   {create(2, pol("a", "b", 1), pol("a", "c", 9)), false},
		"no limit":                         {create(0, pol("a", "b", 3), pol("a", "b", 4)), true},
		"more than the limit from nothing": {create(2, pol("n", "b", 1), pol("n", "b", 2), pol("n", "b", 3)), false},
	} {
		_, change, errs := settle(t, v, p, 1, c.q)
		if ok := errs[0] == nil; ok != c.ok || !ok && (!errors.Is(errs[0], fault.Exhausted) || !errors.Is(errs[0], ErrQuota)) {
			t.Errorf("%s: %v", name, errs[0])
		}
		if !c.ok && !change.empty() {
			t.Errorf("%s: a refused request changes %+v", name, change)
		}
	}
	// What earlier requests of the batch did counts.
	_, _, errs := settle(t, v, p, 1, create(3, pol("a", "b", 3)), create(3, pol("a", "b", 4)), request{op: remove, policies: []policy.Policy{pol("a", "b", 1)}}, create(3, pol("a", "b", 4)), create(3, pol("a", "b", 5)))
	if errs[0] != nil || errs[1] == nil || errs[3] != nil || errs[4] == nil {
		t.Errorf("a batch was judged %v, want the second and the last refused", errs)
	}
}

func TestExhaustionSaysHowManyTagsAreWhere(t *testing.T) {
	p := newPool(4, time.Hour)
	v, _, _ := settle(t, empty(), p, 1, request{op: create, policies: []policy.Policy{pol("a", "b", 1), pol("c", "c", 1)}})
	v, _, _ = settle(t, v, p, 1, request{op: remove, policies: []policy.Policy{pol("c", "c", 1)}})
	_, c, errs := settle(t, v, p, 1, request{op: create, policies: []policy.Policy{pol("a", "d", 1), pol("a", "e", 1)}})
	if !errors.Is(errs[0], fault.Exhausted) || errors.Is(errs[0], ErrQuota) || !c.empty() {
		t.Fatalf("%v, %+v, want an Exhausted fault and no change", errs[0], c)
	}
	for _, part := range []string{"2 of 4 tags are in use", "1 were freed less than 1h0m0s ago"} {
		if !strings.Contains(errs[0].Error(), part) {
			t.Errorf("%q lacks %q", errs[0], part)
		}
	}
}

// TestDraftAgreesWithAMap judges random batches and compares policies and tags with a plain reckoning.
func TestDraftAgreesWithAMap(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 7))
	p := newPool(30, 20*time.Microsecond)
	v := empty()
	held := map[policy.Policy]bool{}
	tagged := map[identity.Group]identity.Tagged{}
	now := int64(1)
	for range 3000 {
		now += 7
		var qs []request
		for range 1 + rnd.IntN(4) {
			q := request{op: []operation{create, create, remove, remove, tag}[rnd.IntN(5)]}
			for range rnd.IntN(4) {
				q.policies = append(q.policies, pol(fmt.Sprintf("g%d", rnd.IntN(9)), fmt.Sprintf("g%d", rnd.IntN(9)), 1+rnd.IntN(2)))
			}
			q.group = identity.Tagged{Group: identity.Group(fmt.Sprintf("g%d", 7+rnd.IntN(4))), Kind: []string{identity.App, identity.Router}[rnd.IntN(2)]}
			qs = append(qs, q)
		}
		before := slices.Clone(p.state[:41])
		next, c, errs := settle(t, v, p, now, qs...)
		kept := map[identity.Group]bool{}
		for i, q := range qs {
			for _, p := range q.policies {
				switch {
				case q.op == create && errs[i] == nil:
					held[p] = true
				case q.op == remove:
					delete(held, p)
				}
			}
			if q.op == tag && errs[i] == nil {
				kept[q.group.Group] = true
			}
		}
		got := map[policy.Policy]bool{}
		named := map[identity.Group]bool{}
		for r := range next.rows.all() {
			got[r.policy()] = true
			named[r.source.Group], named[r.destination.Group] = true, true
			if g := next.group(r.source.Group); g != r.source {
				t.Fatalf("%v: its source is %v, want %v", r.policy(), r.source, g)
			}
		}
		if !maps.Equal(got, held) || next.sources.n != next.rows.n {
			t.Fatalf("there are %v, want %v", got, held)
		}
		was := tagged
		tagged = map[identity.Group]identity.Tagged{}
		for g := range next.groups.all() {
			if tagged[g.Group] = g.Tagged; p.state[g.Tag] != used {
				t.Fatalf("tag %v of %q is free", g.Tag, string(g.Group))
			}
			if old, had := was[g.Group]; had && old != g.Tagged {
				t.Fatalf("%v became %v", old, *g)
			} else if !had && before[g.Tag] > never && now < before[g.Tag]+p.quarantine {
				t.Fatalf("%q got tag %v, freed at %d, at %d", string(g.Group), g.Tag, before[g.Tag], now)
			}
		}
		for name := range named {
			if _, ok := tagged[name]; !ok {
				t.Fatalf("%q has no tag", string(name))
			}
		}
		for name, g := range was {
			if _, still := tagged[name]; !still && (named[name] || kept[name] || g.Kind != identity.App) {
				t.Fatalf("%v lost its tag", g)
			}
		}
		for _, g := range c.freed {
			if _, still := tagged[g.Group]; still || named[g.Group] {
				t.Fatalf("%v was freed", *g)
			}
		}
		inUse, _ := p.figures(now)
		if inUse != len(tagged) {
			t.Fatalf("%d tags are in use, by %d groups", inUse, len(tagged))
		}
		v = next
	}
	if len(held) == 0 || !slices.ContainsFunc(slices.Collect(maps.Values(tagged)), func(g identity.Tagged) bool { return g.Kind == identity.Router }) {
		t.Error("nothing is left: the test tested little")
	}
}
