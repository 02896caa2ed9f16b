package nft

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/firewall"
)

// state is the table as it is.
type state struct {
	exists    bool
	owned     bool   // by us: nobody else can change it
	ended     bool   // the set of what Cut ended has elements, or had when it was looked at
	doubtful  bool   // it was looked at while nftables changed: true only if nobody touched the table meanwhile
	meanwhile func() // hears what others do while this is read: the kernel keeps little of it for us, and what is lost counts as a change of ours
	odd       string // why the table cannot be mended piece by piece; "" if it can
	chains    map[string]string
	counts    map[string]bool
	sets      map[string]*set
}

// stateOf returns the state that a wish leads to.
func stateOf(w *wish, owned bool) *state {
	s := &state{exists: true, owned: owned, ended: w.frame.ended, chains: map[string]string{}, counts: map[string]bool{}, sets: map[string]*set{}}
	for _, c := range w.chains {
		s.chains[c.name] = c.canon
	}
	for _, name := range counters() {
		s.counts[name] = true
	}
	for i := range w.sets {
		s.sets[w.sets[i].name] = &w.sets[i]
	}
	return s
}

func (s *state) elements() (n int) {
	for _, x := range s.sets {
		n += x.len()
	}
	return n
}

// change is one request to the kernel, or a few of a kind for elements. Its text is the nft command.
type change struct {
	verb, object, name string
	chain              *chain // of chain; of rule: all of the chain's
	rule               *rule
	elems              []elem
	allow              []firewall.Allow
	spans              []firewall.Span
}

// plan returns the changes that lead from s to w. Their order is one that the kernel accepts in one transaction: what is referred to is
// there before and goes after what refers to it, and a key goes before it comes back with another verdict.
func plan(w *wish, s *state, own bool) []change {
	var p planner
	if s.exists && (s.odd != "" || own && !s.owned) {
		p.add(change{verb: "delete", object: "table"})
		s = &state{}
	}
	if !s.exists {
		p.add(change{verb: "add", object: "table"})
	}
	for _, name := range counters() {
		if !s.counts[name] {
			p.add(change{verb: "add", object: "counter", name: name})
		}
	}
	p.makeChains(w, s)
	p.fillSets(w, s)
	p.writeRules(w, s)
	p.prune(w, s)
	return p.changes
}

// counters returns the names of those that every table has.
func counters() []string {
	out := slices.Clone(logCounters)
	for _, r := range refusals {
		out = append(out, string(r.reason))
	}
	return out
}

type planner struct{ changes []change }

func (p *planner) add(c change) { p.changes = append(p.changes, c) }

func (p *planner) makeChains(w *wish, s *state) {
	for i := range w.chains {
		c := &w.chains[i]
		if _, there := s.chains[c.name]; !there {
			p.add(change{verb: "add", object: "chain", name: c.name, chain: c})
		}
	}
}

func (p *planner) fillSets(w *wish, s *state) {
	var added []change
	for i := range w.sets {
		want := &w.sets[i]
		have := s.sets[want.name]
		if have == nil {
			p.add(change{verb: "add", object: "set", name: want.name})
			have = &set{}
		}
		var more, less []firewall.Allow
		if !firewall.SameAllowed(want.allow, have.allow) {
			more, less = difference(want.allow, have.allow, firewall.CompareAllow)
		}
		moreElems, lessElems := difference(want.elems, have.elems, cmpElem)
		var moreSpans, lessSpans []firewall.Span
		if !firewall.SameSpans(want.spans, have.spans) {
			moreSpans, lessSpans = difference(want.spans, have.spans, firewall.CompareSpan)
		}
		if len(less)+len(lessElems)+len(lessSpans) > 0 {
			p.add(change{verb: "delete", object: "element", name: want.name, allow: less, elems: lessElems, spans: lessSpans})
		}
		if len(more)+len(moreElems)+len(moreSpans) > 0 {
			added = append(added, change{verb: "add", object: "element", name: want.name, allow: more, elems: moreElems, spans: moreSpans})
		}
	}
	p.changes = append(p.changes, added...)
}

// cmpElem also tells verdicts apart: a key that leads elsewhere goes and comes back.
func cmpElem(a, b elem) int {
	if c := compareElem(a, b); c != 0 {
		return c
	}
	return strings.Compare(a.chain, b.chain)
}

// difference returns what is in want and not in have, and the reverse. Both are sorted by compare.
func difference[T comparable](want, have []T, compare func(a, b T) int) (more, less []T) {
	// Two lists of one table are nearly the same: what is equal at both ends is passed over without comparing order.
	for len(want) > 0 && len(have) > 0 && want[len(want)-1] == have[len(have)-1] {
		want, have = want[:len(want)-1], have[:len(have)-1]
	}
	i, j := 0, 0
	for i < len(want) && i < len(have) && want[i] == have[i] {
		i++
	}
	j = i
	for i < len(want) && j < len(have) {
		switch c := compare(want[i], have[j]); {
		case c < 0:
			more = append(more, want[i])
			i++
		case c > 0:
			less = append(less, have[j])
			j++
		default:
			i++
			j++
		}
	}
	return append(more, want[i:]...), append(less, have[j:]...)
}

func (p *planner) writeRules(w *wish, s *state) {
	for i := range w.chains {
		c := &w.chains[i]
		canon, there := s.chains[c.name]
		if there && canon == c.canon {
			continue
		}
		if there {
			p.add(change{verb: "flush", object: "chain", name: c.name})
		}
		for j := range c.rules {
			p.add(change{verb: "add", object: "rule", name: c.name, rule: &c.rules[j]})
		}
	}
}

// prune deletes what is not wanted any more.
func (p *planner) prune(w *wish, s *state) {
	chains, sets := map[string]bool{}, map[string]bool{}
	for _, c := range w.chains {
		chains[c.name] = true
	}
	for _, x := range w.sets {
		sets[x.name] = true
	}
	var gone []string
	for _, name := range slices.Sorted(maps.Keys(s.chains)) {
		if !chains[name] {
			gone = append(gone, name)
			p.add(change{verb: "flush", object: "chain", name: name})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.sets)) { // maps lead to chains
		if !sets[name] {
			p.add(change{verb: "delete", object: "set", name: name})
		}
	}
	for _, name := range gone {
		p.add(change{verb: "delete", object: "chain", name: name})
	}
}

// String returns the nft command.
func (c change) String() string {
	object := c.object
	if c.object == "set" && kindOf(c.name).verdicts {
		object = "map"
	}
	text := c.verb + " " + object + " inet " + Name
	if c.name != "" {
		text += " " + c.name
	}
	switch {
	case c.object == "element":
		var list []string
		for _, a := range c.allow {
			list = append(list, allowText(a))
		}
		for _, e := range c.elems {
			list = append(list, elementText(c.name, e))
		}
		for _, s := range c.spans {
			list = append(list, spanText(s))
		}
		return text + " { " + strings.Join(list, ", ") + " }"
	case c.verb != "add":
		return text
	case c.object == "set":
		return text + " { " + kindOf(c.name).text + " }"
	case c.object == "chain" && c.chain.hook != noHook:
		return fmt.Sprintf("%s { %v }", text, c.chain.hook)
	case c.object == "rule":
		return text + " " + c.rule.text
	}
	return text
}
