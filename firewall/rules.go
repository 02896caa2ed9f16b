package firewall

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// book is what the rules that touch a host's groups come to.
type book struct {
	tags    map[identity.Group]tagUse       // of the groups that rules speak of
	owners  map[identity.Tag]identity.Group // the reverse
	allowed map[identity.Group][]Allow      // to local groups, none empty. Lists are never changed in place: rulesets share them
}

// tagUse is a group's tag and how many ends of rules say so.
type tagUse struct {
	tag identity.Tag
	n   int
}

// localGroups returns the groups of endpoints.
func localGroups(here []Endpoint) map[identity.Group]bool {
	local := map[identity.Group]bool{}
	for _, e := range here {
		local[e.Group] = true
	}
	delete(local, "")
	return local
}

// touching returns the rules that touch a local group, sorted by policy and without duplicates. They are rules itself if that is so.
func touching(rules []policy.Rule, local map[identity.Group]bool) []policy.Rule {
	whole := true
	var last identity.Group // local destination of the rules before
	for i := 0; i < len(rules) && whole; i++ {
		r := &rules[i]
		switch {
		case last != "" && r.Destination == last:
		case local[r.Destination]:
			last = r.Destination
		default:
			whole = local[r.Source]
		}
	}
	if !whole {
		rules = slices.DeleteFunc(slices.Clone(rules), func(r policy.Rule) bool { return !local[r.Source] && !local[r.Destination] })
	}
	if inOrder(rules) {
		return rules
	}
	if whole {
		rules = slices.Clone(rules)
	}
	slices.SortFunc(rules, compareRule)
	return slices.Compact(rules)
}

func compareRule(a, b policy.Rule) int {
	return cmp.Or(policy.Compare(a.Policy, b.Policy), cmp.Compare(a.SourceTag, b.SourceTag), cmp.Compare(a.DestinationTag, b.DestinationTag))
}

// inOrder reports whether rules are sorted by policy, none twice.
func inOrder(rules []policy.Rule) bool {
	for i := 1; i < len(rules); i++ {
		if policy.Compare(rules[i-1].Policy, rules[i].Policy) >= 0 {
			return false
		}
	}
	return true
}

// read makes a book of rules as touching returns them. What is wrong with some of them is refused, and they are not in it. What a
// rule says of its groups' tags holds for all: a group that has two tags, or a tag that two groups have, is a problem, and such
// rules are left out.
func (c *compiler) read(rules []policy.Rule, local map[identity.Group]bool) *book {
	b := &book{tags: map[identity.Group]tagUse{}, owners: map[identity.Tag]identity.Group{}, allowed: map[identity.Group][]Allow{}}
	good := map[identity.Group]bool{}
	bad := map[int]bool{}
	for i := range rules {
		if err := c.checkRule(&rules[i], good); err != nil {
			c.refuse(rules[i].String(), err)
			bad[i] = true
		}
	}
	doubtful := c.nameTags(b, rules, bad)
	var list []Allow // of the destination of the rules before
	for i := range rules {
		r := &rules[i]
		if i == 0 || r.Destination != rules[i-1].Destination {
			list = nil
		}
		why := ""
		if len(doubtful) > 0 {
			why = cmp.Or(doubtful[r.Source], doubtful[r.Destination])
		}
		switch {
		case bad[i]:
		case why != "":
			c.refuse(r.String(), fault.Conflictf("%s", why))
		case list != nil || local[r.Destination]:
			list = append(list, Allow{r.SourceTag, r.Protocol, r.Ports})
			b.allowed[r.Destination] = list
		}
	}
	for g, list := range b.allowed {
		b.allowed[g] = merge(list)
	}
	return b
}

// checkRule is policy.Validate and more; good are names of groups known to be so.
func (c *compiler) checkRule(r *policy.Rule, good map[identity.Group]bool) error {
	if !good[r.Source] || !good[r.Destination] || r.Protocol != policy.TCP && r.Protocol != policy.UDP || r.Ports.First == 0 || r.Ports.Last < r.Ports.First {
		if err := r.Validate(); err != nil {
			return err
		}
		good[r.Source], good[r.Destination] = true, true
	}
	for _, t := range []identity.Tag{r.SourceTag, r.DestinationTag} {
		if t == 0 || t > c.max {
			return fault.Invalidf("tag %v: expected 0001 to %v", t, c.max)
		}
	}
	return nil
}

// nameTags learns the tags of groups and returns why some groups are in doubt.
func (c *compiler) nameTags(b *book, rules []policy.Rule, bad map[int]bool) map[identity.Group]string {
	doubtful := map[identity.Group]string{}
	learn := func(g identity.Group, t identity.Tag) {
		had, ok := b.tags[g]
		if ok && had.tag == t {
			b.tags[g] = tagUse{t, had.n + 1}
			return
		}
		if ok {
			doubtful[g] = fmt.Sprintf("group %.40q has two tags, %v and %v", string(g), had.tag, t)
		}
		b.tags[g] = tagUse{t, had.n + 1}
		if o, ok := b.owners[t]; ok && o != g {
			why := fmt.Sprintf("tag %v belongs to two groups, %.40q and %.40q", t, string(o), string(g))
			doubtful[o], doubtful[g] = why, why
		} else if t == c.out.Router {
			doubtful[g] = fmt.Sprintf("tag %v is that of overlay ingress", t)
		}
		b.owners[t] = g
	}
	for i := range rules {
		if !bad[i] {
			learn(rules[i].Source, rules[i].SourceTag)
			learn(rules[i].Destination, rules[i].DestinationTag)
		}
	}
	maps.DeleteFunc(b.tags, func(g identity.Group, _ tagUse) bool { return doubtful[g] != "" })
	return doubtful
}
