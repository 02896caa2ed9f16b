package policysql

import (
	"cmp"
	"encoding/binary"
	"iter"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// group is a group that has a tag. It never changes: another tag is another group.
type group struct {
	identity.Tagged
	prefix uint64 // of the name, for comparisons that need not look at it
}

func newGroup(g identity.Tagged) *group { return &group{g, prefixOf(g.Group)} }

// prefixOf returns the first eight bytes of a name as a number that orders as they do.
func prefixOf(name identity.Group) uint64 {
	var b [8]byte
	copy(b[:], name)
	return binary.BigEndian.Uint64(b[:])
}

// row is a policy as it is kept in memory: 40 bytes, and names of groups once. The prefixes of the names let most comparisons do without them.
type row struct {
	source, destination *group
	from, to            uint64 // prefixes of the groups' names
	ports               policy.Ports
	protocol            policy.Protocol
}

// newRow returns a row. A group may be missing in one that is not kept.
func newRow(source, destination *group, ports policy.Ports, protocol policy.Protocol) row {
	r := row{source: source, destination: destination, ports: ports, protocol: protocol}
	if source != nil {
		r.from = source.prefix
	}
	if destination != nil {
		r.to = destination.prefix
	}
	return r
}

func (r row) policy() policy.Policy {
	return policy.Policy{Source: r.source.Group, Destination: r.destination.Group, Protocol: r.protocol, Ports: r.ports}
}

func (r row) rule() policy.Rule {
	return policy.Rule{Policy: r.policy(), SourceTag: r.source.Tag, DestinationTag: r.destination.Tag}
}

// view is everything there is at one revision. It never changes.
type view struct {
	head    revision.Revision
	stamp   int64
	rows    ordered[row] // by byDestination
	sources ordered[row] // the same by bySource
	groups  ordered[*group]
}

func compareGroups(a, b *group) int {
	if a == b {
		return 0
	}
	return a.compare(b.prefix, b.Group)
}

// compare compares a group with a name, whose prefix is known.
func (g *group) compare(prefix uint64, name identity.Group) int {
	if g.prefix != prefix {
		return cmp.Compare(g.prefix, prefix)
	}
	return strings.Compare(string(g.Group), string(name))
}

// byDestination orders as policy.Compare does.
func byDestination(a, b row) int {
	if a.to != b.to {
		return cmp.Compare(a.to, b.to)
	}
	if c := compareGroups(a.destination, b.destination); c != 0 {
		return c
	}
	if a.from != b.from {
		return cmp.Compare(a.from, b.from)
	}
	if c := compareGroups(a.source, b.source); c != 0 {
		return c
	}
	return compareRest(a, b)
}

func bySource(a, b row) int {
	if a.from != b.from {
		return cmp.Compare(a.from, b.from)
	}
	if c := compareGroups(a.source, b.source); c != 0 {
		return c
	}
	if a.to != b.to {
		return cmp.Compare(a.to, b.to)
	}
	if c := compareGroups(a.destination, b.destination); c != 0 {
		return c
	}
	return compareRest(a, b)
}

func compareRest(a, b row) int {
	return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.ports.First, b.ports.First), cmp.Compare(a.ports.Last, b.ports.Last))
}

// newView makes a view of rows, in any order, and groups. It sorts both lists.
func newView(head revision.Revision, stamp int64, rows []row, groups []*group) *view {
	slices.SortFunc(groups, compareGroups)
	v := &view{head: head, stamp: stamp, groups: newOrdered(groups)}
	slices.SortFunc(rows, byDestination)
	v.rows = newOrdered(rows)
	slices.SortFunc(rows, bySource)
	v.sources = newOrdered(rows)
	return v
}

// group returns a group that has a tag, or nil.
func (v *view) group(name identity.Group) *group {
	prefix := prefixOf(name)
	g, _ := v.groups.find(func(g *group) int { return g.compare(prefix, name) })
	return g
}

func (v *view) has(p policy.Policy) bool {
	return v.holds(newRow(newGroup(identity.Tagged{Group: p.Source}), newGroup(identity.Tagged{Group: p.Destination}), p.Ports, p.Protocol))
}

// holds is has for a policy as a row, whose groups need not be those of the view.
func (v *view) holds(want row) bool {
	_, ok := v.rows.find(func(r row) int { return byDestination(r, want) })
	return ok
}

// into iterates over the policies to a group, from over those from it.
func (v *view) into(name identity.Group) iter.Seq[row] {
	prefix := prefixOf(name)
	return v.rows.span(func(r row) int {
		if r.to != prefix {
			return cmp.Compare(r.to, prefix)
		}
		return strings.Compare(string(r.destination.Group), string(name))
	})
}

func (v *view) from(name identity.Group) iter.Seq[row] {
	prefix := prefixOf(name)
	return v.sources.span(func(r row) int {
		if r.from != prefix {
			return cmp.Compare(r.from, prefix)
		}
		return strings.Compare(string(r.source.Group), string(name))
	})
}

// touching returns the policies from or to any of groups, each once: first those to them, sorted, then those from them to others, which begin at a place.
func (v *view) touching(groups []identity.Group) (all []row, others int) {
	names := groups
	if !slices.IsSorted(names) {
		names = slices.Sorted(slices.Values(names))
	}
	names = slices.Compact(slices.Clone(names))
	all = make([]row, 0, 8*len(names))
	for _, g := range names {
		all = slices.AppendSeq(all, v.into(g))
	}
	others = len(all)
	here := make(map[*group]struct{}, len(names))
	for _, r := range all {
		here[r.destination] = struct{}{}
	}
	for _, g := range names {
		for r := range v.from(g) {
			if _, dup := here[r.destination]; !dup {
				all = append(all, r)
			}
		}
	}
	return all, others
}

// sortedTouching is touching, sorted.
func (v *view) sortedTouching(groups []identity.Group) []row {
	all, others := v.touching(groups)
	a, b := all[:others], all[others:]
	slices.SortFunc(b, byDestination)
	merged := make([]row, 0, len(all))
	for len(a) > 0 && len(b) > 0 {
		if byDestination(a[0], b[0]) < 0 {
			merged, a = append(merged, a[0]), a[1:]
		} else {
			merged, b = append(merged, b[0]), b[1:]
		}
	}
	return append(append(merged, a...), b...)
}

// selected returns what a filter selects, sorted.
func (v *view) selected(f policy.Filter) []row {
	var all []row
	switch {
	case f.Either != nil:
		return v.sortedTouching(f.Either)
	case f.Sources != nil: // whose policies are few, while everybody may talk to one destination
		all = v.between(f.Sources, f.Destinations)
	case f.Destinations != nil:
		for _, g := range distinct(f.Destinations) {
			all = slices.AppendSeq(all, v.into(g))
		}
		return all
	default:
		return slices.AppendSeq(make([]row, 0, v.rows.n), v.rows.all())
	}
	slices.SortFunc(all, byDestination)
	return all
}

func (v *view) between(sources, destinations []identity.Group) (all []row) {
	want := make(map[identity.Group]bool, len(destinations))
	for _, g := range destinations {
		want[g] = true
	}
	for _, g := range distinct(sources) {
		for r := range v.from(g) {
			if destinations == nil || want[r.destination.Group] {
				all = append(all, r)
			}
		}
	}
	return all
}

func distinct(groups []identity.Group) []identity.Group {
	sorted := slices.Clone(groups)
	slices.Sort(sorted)
	return slices.Compact(sorted)
}

// change is what leads from one view to the next.
type change struct {
	remove []row    // which are there
	add    []row    // which are not there, or removed
	freed  []*group // groups that have no tag any more
	tagged []*group // groups that have one now
}

func (c change) empty() bool { return len(c.remove)+len(c.add)+len(c.freed)+len(c.tagged) == 0 }

// with returns what c makes of v.
func (v *view) with(c change, head revision.Revision, stamp int64) *view {
	next := &view{head: head, stamp: stamp, rows: v.rows, sources: v.sources, groups: v.groups}
	if len(c.freed)+len(c.tagged) > 0 {
		e := v.groups.edit(compareGroups)
		for _, g := range c.freed {
			e.remove(g)
		}
		for _, g := range c.tagged {
			e.insert(g)
		}
		next.groups = e.done()
	}
	if len(c.remove)+len(c.add) > 0 {
		next.rows, next.sources = edited(v.rows, c, byDestination), edited(v.sources, c, bySource)
	}
	return next
}

func edited(o ordered[row], c change, compare func(a, b row) int) ordered[row] {
	e := o.edit(compare)
	for _, r := range c.remove {
		e.remove(r)
	}
	for _, r := range c.add {
		e.insert(r)
	}
	return e.done()
}

// Snapshot is what a store holds at one revision. It is immutable.
type Snapshot struct {
	Revision revision.Revision
	Stamp    int64 // as Store.Stamp
	v        *view
}

// Len returns the number of policies.
func (s *Snapshot) Len() int { return s.v.rows.n }

// All returns all policies with their tags, sorted by policy.Compare, without a copy of the list.
func (s *Snapshot) All() iter.Seq[policy.Rule] { return ruled(s.v.rows.all()) }

// Select returns the policies that f selects, sorted by policy.Compare.
func (s *Snapshot) Select(f policy.Filter) []policy.Rule { return rules(s.v.selected(f)) }

// Tags returns the groups that have a tag, sorted by name, without a copy of the list.
func (s *Snapshot) Tags() iter.Seq[identity.Tagged] {
	return func(yield func(identity.Tagged) bool) {
		for g := range s.v.groups.all() {
			if !yield(g.Tagged) {
				return
			}
		}
	}
}

func ruled(rows iter.Seq[row]) iter.Seq[policy.Rule] {
	return func(yield func(policy.Rule) bool) {
		for r := range rows {
			if !yield(r.rule()) {
				return
			}
		}
	}
}

func rules(rows []row) []policy.Rule {
	out := make([]policy.Rule, len(rows))
	for i, r := range rows {
		out[i] = r.rule()
	}
	return out
}
