package firewall_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// TestCompilerIsCompile: whatever changes from one input to the next, a Compiler says what Compile says of the last one, problems included, and what it
// said before stays as it was.
func TestCompilerIsCompile(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		w := host{rng: rng, tags: map[identity.Group]identity.Tag{}, rules: map[policy.Policy]bool{}, sane: seed%3 != 0}
		for range 20 {
			w.policy()
		}
		w.endpoints()
		var k firewall.Compiler
		var was firewall.Ruleset
		var copied string
		for step := range 60 {
			w.change()
			in := w.input()
			got, problems := k.Compile(in)
			want, wantProblems := firewall.Compile(in)
			if a, b := fmt.Sprintf("%+v", want), fmt.Sprintf("%+v", got); a != b {
				t.Fatalf("seed %d, step %d: compiled from scratch\n%s\ncompiled again\n%s", seed, step, a, b)
			}
			if a, b := fmt.Sprint(wantProblems), fmt.Sprint(problems); a != b {
				t.Fatalf("seed %d, step %d: problems when compiled from scratch\n%s\nwhen compiled again\n%s", seed, step, a, b)
			}
			if now := fmt.Sprintf("%+v", was); step > 0 && now != copied {
				t.Fatalf("seed %d, step %d: the ruleset of the step before was changed from\n%s\nto\n%s", seed, step, copied, now)
			}
			was, copied = got, fmt.Sprintf("%+v", got)
		}
	}
}

// host is a random Input that changes a little at a time.
type host struct {
	rng   *rand.Rand
	tags  map[identity.Group]identity.Tag
	rules map[policy.Policy]bool
	ends  []firewall.Endpoint
	in    firewall.Input
	sane  bool // lists are in order and tags unique
}

func (w *host) group() identity.Group {
	g := identity.Group(fmt.Sprintf("g%d", w.rng.IntN(9)))
	if w.tags[g] == 0 {
		w.tags[g] = w.freeTag()
	}
	return g
}

func (w *host) freeTag() identity.Tag {
	for {
		t := identity.Tag(1 + w.rng.IntN(40))
		taken := false
		for _, x := range w.tags {
			taken = taken || x == t
		}
		if !taken {
			return t
		}
	}
}

func (w *host) policy() {
	if len(w.rules) > 8 && w.rng.IntN(2) == 0 {
		all := slices.SortedFunc(maps.Keys(w.rules), policy.Compare)
		delete(w.rules, all[w.rng.IntN(len(all))])
		return
	}
	p := policy.Policy{Source: w.group(), Destination: w.group(), Protocol: []policy.Protocol{policy.TCP, policy.UDP}[w.rng.IntN(2)], Ports: one(uint16(1 + w.rng.IntN(6)))}
	if w.rng.IntN(3) == 0 {
		p.Ports.Last += uint16(w.rng.IntN(4))
	}
	w.rules[p] = true
}

func (w *host) endpoints() {
	w.ends = nil
	for i := range 1 + w.rng.IntN(4) {
		w.ends = append(w.ends, end(byte(2+i), identity.Group(fmt.Sprintf("g%d", w.rng.IntN(9)))))
	}
}

func (w *host) change() {
	switch w.rng.IntN(12) {
	case 0:
		w.endpoints()
	case 1: // another tag, or two that change places
		a, b := w.group(), w.group()
		switch w.rng.IntN(3) {
		case 0:
			w.tags[a], w.tags[b] = w.tags[b], w.tags[a]
		case 1:
			w.tags[a] = w.freeTag()
		case 2:
			if !w.sane { // until one of them gets another
				w.tags[a] = w.tags[b]
			}
		}
	case 2:
		w.in.Router = identity.Tag(max(0, w.rng.IntN(60)-20))
	case 3:
		w.in.Unrestricted = !w.in.Unrestricted
	case 4: // nothing
	case 5, 6: // very little
		w.policy()
	default:
		for range 1 + w.rng.IntN(3) {
			w.policy()
		}
	}
}

func (w *host) input() firewall.Input {
	in := w.in
	in.Network, in.VTEP, in.Endpoints = network, "silk-vtep", w.ends
	for p := range w.rules {
		in.Rules = append(in.Rules, policy.Rule{Policy: p, SourceTag: w.tags[p.Source], DestinationTag: w.tags[p.Destination]})
	}
	slices.SortFunc(in.Rules, func(a, b policy.Rule) int { return policy.Compare(a.Policy, b.Policy) })
	if w.sane || len(in.Rules) == 0 || w.rng.IntN(2) == 0 {
		return in
	}
	r := &in.Rules[w.rng.IntN(len(in.Rules))]
	switch w.rng.IntN(6) {
	case 0:
		r.SourceTag = identity.Tag(w.rng.IntN(45))
	case 1:
		r.DestinationTag = identity.Tag(w.rng.IntN(45))
	case 2:
		r.Ports = policy.Ports{First: 9, Last: 3}
	case 3:
		r.Destination = ""
	case 4:
		in.Rules = append(in.Rules, *r, in.Rules[len(in.Rules)-1])
	case 5:
		w.rng.Shuffle(len(in.Rules), func(i, j int) { in.Rules[i], in.Rules[j] = in.Rules[j], in.Rules[i] })
	}
	return in
}
