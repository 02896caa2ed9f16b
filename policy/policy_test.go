package policy_test

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

func TestProtocol(t *testing.T) {
	for text, want := range map[string]policy.Protocol{"tcp": policy.TCP, "udp": policy.UDP} {
		if p, err := policy.ParseProtocol(text); err != nil || p != want || p.String() != text {
			t.Errorf("ParseProtocol(%q) = %v, %v", text, p, err)
		}
	}
	for _, s := range []string{"", "TCP", "tcp ", "icmp", "6"} {
		if p, err := policy.ParseProtocol(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("ParseProtocol(%q) = %v, %v, want an Invalid fault", s, p, err)
		}
	}
	if got := policy.Protocol(1).String(); got != "1" {
		t.Errorf("protocol 1 is written %q", got)
	}
	p := policy.UDP
	if err := json.Unmarshal([]byte(`"sctp"`), &p); err == nil || p != policy.UDP {
		t.Errorf("a bad protocol became %v, %v", p, err)
	}
	if b, err := json.Marshal(p); err != nil || string(b) != `"udp"` {
		t.Errorf("udp is written %s, %v", b, err)
	}
}

func TestPorts(t *testing.T) {
	for text, want := range map[string]policy.Ports{"1": {First: 1, Last: 1}, "65535": {First: 65535, Last: 65535}, "8000-8100": {First: 8000, Last: 8100}} {
		p, err := policy.ParsePorts(text)
		if err != nil || p != want || p.String() != text {
			t.Errorf("ParsePorts(%q) = %v, %v", text, p, err)
		}
	}
	for _, s := range []string{"", "0", "0-5", "5-0", "9-8", "65536", "1-65536", "-1", "1-", "-", "1-2-3", "a", " 1", "1,2", "+1", "1 - 2"} {
		if p, err := policy.ParsePorts(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("ParsePorts(%q) = %v, %v, want an Invalid fault", s, p, err)
		}
	}
	p := policy.Ports{First: 10, Last: 12}
	for port, want := range map[uint16]bool{9: false, 10: true, 11: true, 12: true, 13: false} {
		if p.Contains(port) != want {
			t.Errorf("%v contains %d: %v, want %v", p, port, !want, want)
		}
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"", "1", "1-2", "0-0", "65535-65535", "1--2", "01-002"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := policy.ParsePorts(s)
		if err != nil {
			return
		}
		if p.First == 0 || p.Last < p.First {
			t.Fatalf("%q became %v", s, p)
		}
		if again, err := policy.ParsePorts(p.String()); err != nil || again != p {
			t.Fatalf("%q became %v, which is read as %v, %v", s, p, again, err)
		}
	})
}

func TestValidate(t *testing.T) {
	good := policy.Policy{Source: "web", Destination: "api", Protocol: policy.TCP, Ports: policy.Ports{First: 8080, Last: 8080}}
	if err := good.Validate(); err != nil {
		t.Errorf("%v: %v", good, err)
	}
	if got := good.String(); got != "web -> api tcp 8080" {
		t.Errorf("written %q", got)
	}
	for name, spoil := range map[string]func(p *policy.Policy){
		"source":      func(p *policy.Policy) { p.Source = "" },
		"destination": func(p *policy.Policy) { p.Destination = "a,b" },
		"protocol":    func(p *policy.Policy) { p.Protocol = 0 },
		"ports":       func(p *policy.Policy) { p.Ports = policy.Ports{First: 0, Last: 1} },
	} {
		bad := good
		spoil(&bad)
		if err := bad.Validate(); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: %v, want an Invalid fault that names the %s", bad, err, name)
		}
	}
}

func TestCompare(t *testing.T) {
	sorted := []policy.Policy{
		{Source: "b", Destination: "a", Protocol: policy.TCP, Ports: policy.Ports{First: 1, Last: 1}},
		{Source: "a", Destination: "b", Protocol: policy.TCP, Ports: policy.Ports{First: 1, Last: 1}},
		{Source: "a", Destination: "b", Protocol: policy.TCP, Ports: policy.Ports{First: 1, Last: 2}},
		{Source: "a", Destination: "b", Protocol: policy.TCP, Ports: policy.Ports{First: 2, Last: 2}},
		{Source: "a", Destination: "b", Protocol: policy.UDP, Ports: policy.Ports{First: 1, Last: 1}},
		{Source: "b", Destination: "b", Protocol: policy.TCP, Ports: policy.Ports{First: 1, Last: 1}},
	}
	for i, a := range sorted {
		for j, b := range sorted {
			if got := policy.Compare(a, b); (got < 0) != (i < j) || (got == 0) != (i == j) {
				t.Errorf("Compare(%v, %v) = %d", a, b, got)
			}
		}
	}
}

// rule makes one of 864 rules.
func rule(rnd *rand.Rand) policy.Rule {
	names := []identity.Group{"a", "b", "ab", ""}
	first := uint16(1 + rnd.IntN(3))
	r := policy.Rule{Policy: policy.Policy{Source: names[rnd.IntN(3)], Destination: names[rnd.IntN(3)], Protocol: []policy.Protocol{6, 17}[rnd.IntN(2)],
		Ports: policy.Ports{First: first, Last: first + uint16(rnd.IntN(2))}}}
	r.SourceTag, r.DestinationTag = identity.Tag(1+rnd.IntN(2)), identity.Tag(1+rnd.IntN(2))
	return r
}

// TestDigestTellsRulesApart has every field count, and where one name ends and the next begins.
func TestDigestTellsRulesApart(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	seen := map[policy.Digest]policy.Rule{}
	for range 20000 {
		r := rule(rnd)
		d := policy.Sum([]policy.Rule{r})
		if was, ok := seen[d]; ok && was != r {
			t.Fatalf("%+v and %+v have the digest %v", was, r, d)
		}
		seen[d] = r
	}
	if len(seen) < 400 {
		t.Fatalf("only %d digests: the test tested nothing", len(seen))
	}
}

func TestDigestIsKeptByAddAndRemove(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	var d policy.Digest
	var held []policy.Rule
	for range 500 {
		if len(held) > 0 && rnd.IntN(2) == 0 {
			i := rnd.IntN(len(held))
			d, held = d.Remove(held[i]), slices.Delete(held, i, i+1)
		} else {
			r := rule(rnd)
			d, held = d.Add(r), append(held, r)
		}
		rnd.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
		if want := policy.Sum(held); d != want {
			t.Fatalf("the digest of %d rules is %v, want %v", len(held), d, want)
		}
	}
}

// TestApply walks between random lists by updates.
func TestApply(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var held []policy.Rule
	for n := range 300 {
		byPolicy := map[policy.Policy]policy.Rule{}
		for range rnd.IntN(20) {
			r := rule(rnd)
			byPolicy[r.Policy] = r
		}
		u := policy.Update{Revision: revision.Revision{Epoch: "e", Counter: uint64(n)}, Full: rnd.IntN(3) == 0, Count: len(byPolicy)}
		var want []policy.Rule
		for _, r := range byPolicy {
			want = append(want, r)
			if u.Full || !slices.Contains(held, r) {
				u.Set = append(u.Set, r)
			}
		}
		for _, r := range held {
			if _, stays := byPolicy[r.Policy]; !stays && !u.Full {
				u.Gone = append(u.Gone, r.Policy)
			}
		}
		u.Sum = policy.Sum(want)
		if u.Changes() != (u.Full || len(u.Set)+len(u.Gone) > 0) {
			t.Fatalf("Changes is %v", u.Changes())
		}
		before := slices.Clone(held)
		got, err := u.Apply(held)
		slices.SortFunc(want, func(a, b policy.Rule) int { return policy.Compare(a.Policy, b.Policy) })
		if err != nil || !slices.Equal(got, want) || !slices.Equal(held, before) {
			t.Fatalf("update %d: %v, %v, want %v", n, got, err, want)
		}
		held = got
	}
}

func TestApplyRefusesWhatDoesNotAddUp(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	a, b := rule(rnd), rule(rnd)
	a.Source, b.Source = "a", "b"
	good := policy.Update{Set: []policy.Rule{b}, Count: 2, Sum: policy.Sum([]policy.Rule{a, b})}
	if _, err := good.Apply([]policy.Rule{a}); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(u *policy.Update){
		"a rule is lost":       func(u *policy.Update) { u.Set = nil },
		"a tag is another":     func(u *policy.Update) { u.Set[0].SourceTag ^= 1 },
		"the count is another": func(u *policy.Update) { u.Count++ },
		"the digest":           func(u *policy.Update) { u.Sum++ },
		"a rule too many gone": func(u *policy.Update) { u.Gone = []policy.Policy{a.Policy} },
		"it is full":           func(u *policy.Update) { u.Full = true },
	} {
		u := good
		u.Set = slices.Clone(good.Set)
		spoil(&u)
		if got, err := u.Apply([]policy.Rule{a}); !errors.Is(err, fault.Invalid) || got != nil {
			t.Errorf("%s: %v, %v, want an Invalid fault", name, got, err)
		}
	}
	if !a.Touches(a.Destination) || !a.Touches("a") || a.Touches("c") {
		t.Error("Touches is wrong")
	}
}
