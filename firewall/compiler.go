package firewall

import (
	"cmp"
	"slices"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// Compiler is Compile for one host over and over: it remembers the last rules and works on what differs. What it returns is always what
// Compile returns. Its zero value is ready; it is not safe for concurrent use.
//
// It keeps the Rules of the last input, and shares lists of allowances among the rulesets that it returns: neither may be changed.
type Compiler struct {
	rules  []policy.Rule // of the last input: in order, and none that cannot be enforced
	local  map[identity.Group]bool
	max    identity.Tag
	router identity.Tag
	book   *book // nil: nothing to go on from
}

// Compile returns what a host has to enforce, as the function of this name does.
func (k *Compiler) Compile(in Input) (Ruleset, []Problem) {
	c := begin(in)
	here := c.endpoints()
	local := localGroups(here)
	if !k.follow(c, local) {
		k.start(c, local)
	}
	c.groups(k.book)
	c.sources(here, k.book)
	c.outside(here)
	c.services()
	if k.rules == nil {
		k.book = nil
	}
	return c.out, c.problems
}

// start reads all rules.
func (k *Compiler) start(c *compiler, local map[identity.Group]bool) {
	before := len(c.problems)
	rules := touching(c.in.Rules, local)
	*k = Compiler{local: local, max: c.max, router: c.out.Router, book: c.read(rules, local)}
	if len(c.problems) == before && inOrder(c.in.Rules) {
		k.rules = c.in.Rules
	}
}

// manyChanges is above which share of the rules (one in so many) reading all of them costs no more.
const manyChanges = 16

// follow brings the book from the last rules to those of now and reports whether that is what reading all of them would come to. If not the book is
// of no use any more.
func (k *Compiler) follow(c *compiler, local map[identity.Group]bool) bool {
	if k.book == nil || k.max != c.max || k.router != c.out.Router || len(k.local) != len(local) {
		return false
	}
	for g := range local {
		if !k.local[g] {
			return false
		}
	}
	more, less, ok := changes(c.in.Rules, k.rules, len(k.rules)/manyChanges+64)
	if !ok {
		return false
	}
	foreign := func(r policy.Rule) bool { return !local[r.Source] && !local[r.Destination] }
	more, less = slices.DeleteFunc(more, foreign), slices.DeleteFunc(less, foreign)
	good := map[identity.Group]bool{}
	for i := range more {
		if c.checkRule(&more[i], good) != nil {
			return false
		}
	}
	if !k.book.retag(more, less, c.out.Router) {
		return false
	}
	k.rules = c.in.Rules
	k.book.replace(k.rules, append(more, less...), local)
	return true
}

// changes returns which rules are in want and not in have, which is in order, and the reverse. It is not ok if want is not in order, or if there are more
// of one kind than limit.
func changes(want, have []policy.Rule, limit int) (more, less []policy.Rule, ok bool) {
	// What is equal at both ends is in order. One rule before what differs is looked at too.
	n := 0
	for n < len(want) && n < len(have) && want[n] == have[n] {
		n++
	}
	end := 0
	for end < len(want)-n && end < len(have)-n && want[len(want)-1-end] == have[len(have)-1-end] {
		end++
	}
	if !inOrder(want[max(n-1, 0):min(len(want)-end+1, len(want))]) {
		return nil, nil, false
	}
	want, have = want[n:len(want)-end], have[n:len(have)-end]
	for len(want) > 0 || len(have) > 0 {
		switch {
		case len(have) == 0 || len(want) > 0 && compareRule(want[0], have[0]) < 0:
			more, want = append(more, want[0]), want[1:]
		case len(want) == 0 || compareRule(want[0], have[0]) > 0:
			less, have = append(less, have[0]), have[1:]
		default:
			want, have = want[1:], have[1:]
		}
		if len(more) > limit || len(less) > limit {
			return nil, nil, false
		}
	}
	return more, less, true
}

// retag takes in what changed of groups' tags and reports whether each still has one of its own.
func (b *book) retag(more, less []policy.Rule, router identity.Tag) bool {
	forget := func(g identity.Group) {
		u := b.tags[g]
		if u.n--; u.n > 0 {
			b.tags[g] = u
			return
		}
		delete(b.tags, g)
		delete(b.owners, u.tag)
	}
	learn := func(g identity.Group, t identity.Tag) bool {
		u, known := b.tags[g]
		owner, owned := b.owners[t]
		if known && u.tag != t || owned && owner != g || t == router {
			return false
		}
		b.tags[g], b.owners[t] = tagUse{t, u.n + 1}, g
		return true
	}
	for i := range less {
		forget(less[i].Source)
		forget(less[i].Destination)
	}
	for i := range more {
		if !learn(more[i].Source, more[i].SourceTag) || !learn(more[i].Destination, more[i].DestinationTag) {
			return false
		}
	}
	return true
}

// segment names the allowances of one source and protocol.
type segment struct {
	tag   identity.Tag
	proto policy.Protocol
}

// replace makes the lists anew as far as changed rules touch them.
func (b *book) replace(rules, changed []policy.Rule, local map[identity.Group]bool) {
	touched := map[identity.Group]map[segment][]identity.Group{} // destination, source and protocol: the sources' names
	for i := range changed {
		r := &changed[i]
		if !local[r.Destination] {
			continue
		}
		if touched[r.Destination] == nil {
			touched[r.Destination] = map[segment][]identity.Group{}
		}
		s := segment{r.SourceTag, r.Protocol}
		if names := touched[r.Destination][s]; !slices.Contains(names, r.Source) {
			touched[r.Destination][s] = append(names, r.Source)
		}
	}
	for g, segments := range touched {
		if list := splice(b.allowed[g], rules, g, segments); len(list) > 0 {
			b.allowed[g] = list
		} else {
			delete(b.allowed, g)
		}
	}
}

// splice returns a group's list with some segments made anew.
func splice(list []Allow, rules []policy.Rule, to identity.Group, segments map[segment][]identity.Group) []Allow {
	order := make([]segment, 0, len(segments))
	for s := range segments {
		order = append(order, s)
	}
	slices.SortFunc(order, func(a, b segment) int { return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.proto, b.proto)) })
	out := make([]Allow, 0, len(list)+len(order))
	for _, s := range order {
		first, _ := slices.BinarySearchFunc(list, Allow{Source: s.tag, Protocol: s.proto}, CompareAllow)
		out = append(out, list[:first]...)
		list = list[first:]
		for len(list) > 0 && list[0].Source == s.tag && list[0].Protocol == s.proto {
			list = list[1:]
		}
		var anew []Allow
		for _, from := range segments[s] {
			key := policy.Policy{Source: from, Destination: to, Protocol: s.proto}
			i, _ := slices.BinarySearchFunc(rules, key, func(r policy.Rule, p policy.Policy) int { return policy.Compare(r.Policy, p) })
			for ; i < len(rules) && rules[i].Source == from && rules[i].Destination == to && rules[i].Protocol == s.proto; i++ {
				if rules[i].SourceTag == s.tag {
					anew = append(anew, Allow{s.tag, s.proto, rules[i].Ports})
				}
			}
		}
		out = append(out, merge(anew)...)
	}
	return append(out, list...)
}
