package policysql

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// operation is what a request wants.
type operation int

const (
	verify operation = iota // that what is known is the database's newest
	create
	remove
	tag
)

// request is a call of the store.
type request struct {
	op       operation
	policies []policy.Policy
	quota    int             // of create; 0: none
	group    identity.Tagged // of tag
}

// verdict answers a request that succeeded.
type verdict struct {
	revision revision.Revision
	tag      identity.Tag
}

// ErrQuota is in the tree of an error of CreateWithin that a quota is the reason of.
var ErrQuota = errors.New("policy quota exceeded")

// draft judges requests in order, each by what is there after those before it, and gathers what they change. It has no I/O; what it took from the pool of
// tags must be given back when its change does not come about.
type draft struct {
	base *view
	tags *pool
	now  int64 // by the database's clock, in microseconds

	rows   map[policy.Policy]bool    // policies that differ from base, and whether they are there
	counts map[identity.Group]int    // by source, how many policies it has more than in base
	parts  map[identity.Group]int    // how often a group is source or destination of an added policy
	groups map[identity.Group]*group // that have a tag now
	found  map[identity.Group]*group // of base, as far as they were looked for
	lost   map[identity.Group]bool   // groups that lost a policy
	kept   map[identity.Group]bool   // groups whose tag was asked for
	taken  []freedTag
}

func newDraft(base *view, tags *pool, now int64) *draft {
	return &draft{base: base, tags: tags, now: now, rows: map[policy.Policy]bool{}, counts: map[identity.Group]int{}, parts: map[identity.Group]int{},
		groups: map[identity.Group]*group{}, found: map[identity.Group]*group{}, lost: map[identity.Group]bool{}, kept: map[identity.Group]bool{}}
}

// judge decides one request. One that is refused changes nothing.
func (d *draft) judge(q request) (identity.Tag, error) {
	switch q.op {
	case create:
		return 0, d.create(q.policies, q.quota)
	case remove:
		for _, p := range q.policies {
			if d.has(p) {
				d.set(p, false)
				d.lost[p.Source], d.lost[p.Destination] = true, true
			}
		}
	case tag:
		return d.tag(q.group)
	}
	return 0, nil
}

func (d *draft) has(p policy.Policy) bool {
	if there, ok := d.rows[p]; ok {
		return there
	}
	s, t := d.group(p.Source), d.group(p.Destination)
	return s != nil && t != nil && d.base.holds(newRow(s, t, p.Ports, p.Protocol))
}

// set makes a policy be there or not, which it was or was not.
func (d *draft) set(p policy.Policy, there bool) {
	n := 1
	if !there {
		n = -1
	}
	d.counts[p.Source] += n
	if was, ok := d.rows[p]; ok && was != there {
		delete(d.rows, p) // as in base again
		if was {
			d.part(p, -1)
		}
		return
	}
	d.rows[p] = there
	if there {
		d.part(p, 1)
	}
}

func (d *draft) part(p policy.Policy, n int) {
	d.parts[p.Source] += n
	d.parts[p.Destination] += n
}

// group returns a group that has a tag, or nil.
func (d *draft) group(name identity.Group) *group {
	if g := d.groups[name]; g != nil {
		return g
	}
	g, ok := d.found[name]
	if !ok {
		g = d.base.group(name)
		d.found[name] = g
	}
	return g
}

func (d *draft) create(ps []policy.Policy, quota int) error {
	fresh := make(map[policy.Policy]bool, len(ps))
	more := map[identity.Group]int{}
	var untagged []identity.Group
	seen := map[identity.Group]bool{}
	for _, p := range ps {
		if fresh[p] || d.has(p) {
			continue
		}
		fresh[p] = true
		more[p.Source]++
		for _, name := range [2]identity.Group{p.Source, p.Destination} {
			if seen[name] {
				continue
			}
			seen[name] = true
			if g := d.group(name); g == nil {
				untagged = append(untagged, name)
			} else if g.Kind != identity.App {
				return fault.Conflictf("policy group %q has a tag of kind %q: policies cannot name it", string(name), g.Kind)
			}
		}
	}
	if err := d.within(more, quota); err != nil {
		return err
	}
	if err := d.give(untagged, identity.App); err != nil {
		return err
	}
	for p := range fresh {
		d.set(p, true)
	}
	return nil
}

// within reports, as fault.Exhausted, a source that would have more policies than quota.
func (d *draft) within(more map[identity.Group]int, quota int) error {
	if quota <= 0 {
		return nil
	}
	for _, source := range slices.Sorted(maps.Keys(more)) {
		n := d.counts[source] + more[source]
		for range d.base.from(source) {
			n++
		}
		if n > quota {
			return fault.New(fault.Exhausted, fmt.Errorf("%w: source %q would have %d policies, at most %d are allowed", ErrQuota, string(source), n, quota))
		}
	}
	return nil
}

// give gives tags to groups that have none, in order.
func (d *draft) give(names []identity.Group, kind string) error {
	taken, ok := d.tags.take(len(names), d.now)
	if !ok {
		used, held := d.tags.figures(d.now)
		return fault.Exhaustedf("no tag is left for policy group %q: %d of %d tags are in use, %d were freed less than %v ago",
			string(names[0]), used, d.tags.highest, held, d.tags.span())
	}
	d.taken = append(d.taken, taken...)
	for i, name := range names {
		name = identity.Group(strings.Clone(string(name))) // which may be a part of something large
		d.groups[name] = newGroup(identity.Tagged{Group: name, Tag: taken[i].tag, Kind: kind})
	}
	return nil
}

func (d *draft) tag(want identity.Tagged) (identity.Tag, error) {
	g := d.group(want.Group)
	if g == nil {
		if err := d.give([]identity.Group{want.Group}, want.Kind); err != nil {
			return 0, err
		}
		g = d.groups[want.Group]
	}
	if g.Kind != want.Kind {
		return 0, fault.Conflictf("policy group %q has a tag of kind %q, not %q", string(want.Group), g.Kind, want.Kind)
	}
	d.kept[want.Group] = true
	return g.Tag, nil
}

// change returns what the requests come to, in a fixed order.
func (d *draft) change() change {
	var c change
	for _, name := range slices.Sorted(maps.Keys(d.lost)) {
		if g := d.group(name); g.Kind == identity.App && !d.kept[name] && d.parts[name] == 0 && !d.remains(name) {
			if d.groups[name] == nil {
				c.freed = append(c.freed, g)
				continue
			}
			delete(d.groups, name) // came and went within the batch
			i := slices.IndexFunc(d.taken, func(t freedTag) bool { return t.tag == g.Tag })
			d.tags.untake(d.taken[i : i+1])
			d.taken = slices.Delete(d.taken, i, i+1)
		}
	}
	for _, g := range d.groups {
		c.tagged = append(c.tagged, g)
	}
	slices.SortFunc(c.tagged, compareGroups)
	for p, there := range d.rows {
		r := newRow(d.group(p.Source), d.group(p.Destination), p.Ports, p.Protocol)
		if there {
			c.add = append(c.add, r)
		} else {
			c.remove = append(c.remove, r)
		}
	}
	slices.SortFunc(c.add, byDestination)
	slices.SortFunc(c.remove, byDestination)
	return c
}

// remains reports whether any policy of base with a group is still there.
func (d *draft) remains(name identity.Group) bool {
	for r := range d.base.into(name) {
		if there, ok := d.rows[r.policy()]; there || !ok {
			return true
		}
	}
	for r := range d.base.from(name) {
		if there, ok := d.rows[r.policy()]; there || !ok {
			return true
		}
	}
	return false
}

// drop gives back what was taken.
func (d *draft) drop() { d.tags.untake(d.taken) }
