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
