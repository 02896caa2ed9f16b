package nat

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func texts(changes []change) []string {
	var out []string
	for _, c := range changes {
		out = append(out, c.String())
	}
	return out
}

func TestPlan(t *testing.T) {
	w, err := wishOf(Config{Local: []netip.Prefix{netip.MustParsePrefix("10.255.30.0/24")}, NoMasquerade: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16")}, VTEP: "silk-vtep"})
	if err != nil {
		t.Fatal(err)
	}
	const rule = `ip saddr @nat-local ip daddr != @nat-local ip daddr != @nat-no-masquerade oifname != "silk-vtep" masquerade`
	there := func(change func(*state)) state {
		s := state{table: true, chain: right, rules: []string{rule}, sets: map[string]setState{
			setLocal:        {right, w.sets[setLocal]},
			setNoMasquerade: {right, w.sets[setNoMasquerade]},
		}}
		change(&s)
		return s
	}
	for _, tt := range []struct {
		name string
		s    state
		want []string
	}{
		{"all there", there(func(*state) {}), nil},
		{"nothing there", state{}, []string{
			"add table inet silk",
			"add set inet silk nat-local { type ipv4_addr; flags interval; }",
			"add element inet silk nat-local { 10.255.30.0-10.255.30.255 }",
			"add set inet silk nat-no-masquerade { type ipv4_addr; flags interval; }",
			"add element inet silk nat-no-masquerade { 10.255.0.0-10.255.255.255 }",
			"add chain inet silk nat-postrouting { type nat hook postrouting priority 100; policy accept; }",
			"add rule inet silk nat-postrouting " + rule,
		}},
		{"another subnet", there(func(s *state) { s.sets[setLocal] = setState{right, []span{{1, 2}}} }), []string{
			"flush set inet silk nat-local",
			"add element inet silk nat-local { 10.255.30.0-10.255.30.255 }",
		}},
		{"two rules", there(func(s *state) { s.rules = []string{rule, rule} }), []string{
			"flush chain inet silk nat-postrouting",
			"add rule inet silk nat-postrouting " + rule,
		}},
		{"a set of another kind", there(func(s *state) { s.sets[setLocal] = setState{is: wrong} }), []string{
			"flush chain inet silk nat-postrouting",
			"delete set inet silk nat-local",
			"add set inet silk nat-local { type ipv4_addr; flags interval; }",
			"add element inet silk nat-local { 10.255.30.0-10.255.30.255 }",
			"add rule inet silk nat-postrouting " + rule,
		}},
		{"a chain of another kind", there(func(s *state) { s.chain = wrong }), []string{
			"flush chain inet silk nat-postrouting",
			"delete chain inet silk nat-postrouting",
			"add chain inet silk nat-postrouting { type nat hook postrouting priority 100; policy accept; }",
			"add rule inet silk nat-postrouting " + rule,
		}},
	} {
		if diff := cmp.Diff(tt.want, texts(plan(w, tt.s))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestSpans(t *testing.T) {
	for _, tt := range []struct{ prefixes, want []string }{
		{nil, nil},
		{[]string{"10.0.0.0/24", "10.0.1.0/24"}, []string{"10.0.0.0-10.0.1.255"}},
		{[]string{"10.0.1.0/24", "10.0.0.0/16", "10.0.9.9/32"}, []string{"10.0.0.0-10.0.255.255"}},
		{[]string{"10.0.0.1/32", "10.0.0.3/32"}, []string{"10.0.0.1", "10.0.0.3"}},
		{[]string{"0.0.0.0/0", "255.255.255.255/32"}, []string{"0.0.0.0-255.255.255.255"}},
	} {
		var in []netip.Prefix
		for _, p := range tt.prefixes {
			in = append(in, netip.MustParsePrefix(p))
		}
		spans := spansOf(in)
		var got []string
		for _, s := range spans {
			got = append(got, s.String())
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%v: %v, want %v", tt.prefixes, got, tt.want)
		}
		if back := spansOfMarks(marksOf(spans)); !slices.Equal(back, spans) {
			t.Errorf("%v: became %v in the kernel's form and back", spans, back)
		}
	}
	// What nft(8) adds, and any order.
	if got := spansOfMarks([]mark{{at: 20, end: true}, {at: 0, end: true}, {at: 10}}); !slices.Equal(got, []span{{10, 19}}) {
		t.Errorf("%v", got)
	}
}

// FuzzMessages: whatever the kernel sends, reading it ends.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 12, 0, 3, 128, 8, 0, 1, 128, 4, 0, 1, 0})
	f.Add([]byte{1, 0, 0, 0, 20, 0, 4, 128, 16, 0, 1, 128, 9, 0, 1, 0, 'm', 'e', 't', 'a', 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		parseElements(body)
		recognise(body)
		isOurSet(body)
		isOurChain(body)
		tableUse(body)
	})
}
