package policy

import (
	"math/rand/v2"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/identity"
)

// TestApplyAgreesWithAMap: against the plain way to apply an update.
func TestApplyAgreesWithAMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	some := func(n int) []Rule {
		var out []Rule
		for range r.IntN(n) {
			port := uint16(1 + r.IntN(9))
			out = append(out, Rule{Policy{identity.Group(rune('a' + r.IntN(3))), identity.Group(rune('a' + r.IntN(3))), TCP, Ports{port, port}}, identity.Tag(1 + r.IntN(5)), 1})
		}
		return out
	}
	for i := range 5000 {
		held, u := some(30), Update{Full: i%5 == 0, Set: some(6)}
		for _, g := range some(6) {
			u.Gone = append(u.Gone, g.Policy)
		}
		given := slices.Clone(held)
		want := map[Policy]Rule{}
		if !u.Full {
			for _, h := range held {
				want[h.Policy] = h
			}
		}
		for _, p := range u.Gone {
			delete(want, p)
		}
		for _, s := range u.Set {
			want[s.Policy] = s
		}
		for _, w := range want {
			u.Count, u.Sum = u.Count+1, u.Sum.Add(w)
		}
		got, err := u.Apply(held)
		if err != nil || len(got) != len(want) || !slices.Equal(held, given) {
			t.Fatalf("%+v of %v: %v, %v, want %v", u, given, got, err, want)
		}
		for k, g := range got {
			if want[g.Policy] != g || k > 0 && Compare(got[k-1].Policy, g.Policy) >= 0 {
				t.Fatalf("%+v of %v: %v, want %v in order", u, given, got, want)
			}
		}
	}
}

// TestDifferences: what Differences finds leads from one list to the other, and is nothing more.
func TestDifferences(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 2))
		list := func() (out []Rule) {
			for port := range uint16(1 + rng.IntN(12)) {
				if rng.IntN(3) > 0 {
					p := Policy{Source: "a", Destination: "b", Protocol: TCP, Ports: Ports{First: port + 1, Last: port + 1}}
					out = append(out, Rule{Policy: p, SourceTag: identity.Tag(1 + rng.IntN(8)/7), DestinationTag: 9})
				}
			}
			return out
		}
		want, have := list(), list()
		set, gone := Differences(want, have)
		var missing, extra []Rule
		for _, r := range want {
			if !slices.Contains(have, r) {
				missing = append(missing, r)
			}
		}
		for _, r := range have {
			if !slices.Contains(want, r) {
				extra = append(extra, r)
			}
		}
		if !slices.Equal(set, missing) || !slices.Equal(gone, extra) {
			t.Fatalf("%v from %v: set %v, want %v; gone %v, want %v", want, have, set, missing, gone, extra)
		}
	}
}
