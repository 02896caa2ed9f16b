package policyagent

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/secgroup"
)

// reaches says what each container may reach outside the overlay. It remembers what it has made, so that containers with the same rules share one
// firewall.Egress, and a pass that finds nothing new makes none. It is the enforcement's alone.
type reaches struct {
	deny map[string]*firewall.List // denied networks by phase: see phase

	groups   []secgroup.Group   // as of version
	read     map[string]reading // by the text of rules
	version  uint64
	problems []firewall.Problem
	lists    map[string]made // by groups, see groupsKey

	bound  map[secgroup.Container]*firewall.Egress
	shared map[string]*firewall.Egress // by the groups: see sameGroups
	static map[string]fixed            // by netOutRules and phase
}

// made is a list that was made of groups.
type made struct {
	list     *firewall.List
	problems []firewall.Problem
	of       []secgroup.Group // so that the rules of no others come to lie where theirs do
	used     bool             // by this version of the groups
}

// fixed is what a container's own rules come to.
type fixed struct {
	egress   *firewall.Egress
	problems []firewall.Problem
}

// reading is what a text of rules says.
type reading struct {
	rules    []secgroup.Rule
	problems []secgroup.Problem
}

// The phases of containers: what networks are denied to them, besides those that always are.
const (
	phaseNone    = ""
	phaseRunning = "running"
	phaseStaging = "staging"
)

func phase(workload string) string {
	switch workload {
	case secgroup.App, secgroup.Task:
		return phaseRunning
	case secgroup.Staging:
		return phaseStaging
	}
	return phaseNone
}

func newReaches(d DenyNetworks) reaches {
	return reaches{deny: map[string]*firewall.List{
		phaseNone:    firewall.NewDeny(prefixes(d.Always)),
		phaseRunning: firewall.NewDeny(append(prefixes(d.Always), prefixes(d.Running)...)),
		phaseStaging: firewall.NewDeny(append(prefixes(d.Always), prefixes(d.Staging)...)),
	}, bound: map[secgroup.Container]*firewall.Egress{}, shared: map[string]*firewall.Egress{}, static: map[string]fixed{}}
}

// prefixes reads networks that Validate has judged.
func prefixes(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// labels are what a container's metadata say of it.
type labels struct {
	space    string
	workload string
	any      bool // they say one of these
}

// readLabels reads them. What is not a text is as if it were not there, and an error.
func readLabels(metadata json.RawMessage) (l labels, err error) {
	var m struct {
		Space    json.RawMessage `json:"space_id"`
		Workload json.RawMessage `json:"container_workload"`
	}
	if len(metadata) == 0 || json.Unmarshal(metadata, &m) != nil {
		return l, nil
	}
	for _, x := range []struct {
		key  string
		raw  json.RawMessage
		into *string
	}{{"space_id", m.Space, &l.space}, {"container_workload", m.Workload, &l.workload}} {
		if len(x.raw) == 0 || string(x.raw) == "null" {
			continue
		}
		l.any = true
		if json.Unmarshal(x.raw, x.into) != nil {
			err = fault.Invalidf("metadata.%s: expected a text", x.key)
		}
	}
	return l, err
}

// selects returns which groups a container has. One whose metadata say nothing of it runs, as far as defaults go.
func (l labels) selects(g identity.Group) secgroup.Container {
	if !l.any {
		l.workload = secgroup.App
	}
	return secgroup.Container{Space: l.space, Workload: l.workload, Group: g}
}

// follow takes in the groups of a version. Rules are read again only where their text is another.
func (r *reaches) follow(records []secgroup.Record, version uint64) {
	if r.lists != nil && r.version == version {
		return
	}
	was, lists := r.read, map[string]made{}
	for k, m := range r.lists {
		if m.used { // of the version before: what is still so need not be made again
			m.used = false
			lists[k] = m
		}
	}
	*r = reaches{deny: r.deny, static: r.static, version: version, read: make(map[string]reading, len(records)),
		bound: map[secgroup.Container]*firewall.Egress{}, shared: map[string]*firewall.Egress{}, lists: lists}
	for _, x := range records {
		text, known := was[x.Rules]
		if !known {
			g, problems := x.Group()
			text = reading{g.Rules, problems}
		}
		r.read[x.Rules] = text
		for _, p := range text.problems {
			r.problems = append(r.problems, firewall.Problem{What: fmt.Sprintf("security group %.40s %.60q: rule %d", x.GUID, x.Name, p.Rule), Err: p.Err})
		}
		x.Rules = "" // they are read
		g, _ := x.Group()
		g.Rules = text.rules
		r.groups = append(r.groups, g)
	}
}

// dynamic returns what a container may reach by security groups. While none are known that is nothing.
func (r *reaches) dynamic(c secgroup.Container) *firewall.Egress {
	if e, ok := r.bound[c]; ok {
		return e
	}
	s := secgroup.Select(r.groups, c)
	key := groupsKey([]byte(groupsKey([]byte(phase(c.Workload)), s.Bound)+" |"), s.Defaults)
	e, ok := r.shared[key]
	if !ok {
		e = r.reach(s, c)
		r.shared[key] = e
	}
	r.bound[c] = e
	return e
}

// groupsKey names groups and what they say: rules are read once for each text, and stay where they are.
func groupsKey(key []byte, groups []secgroup.Group) string {
	for i := range groups {
		key = fmt.Appendf(key, " %q %p %d", groups[i].GUID, unsafe.SliceData(groups[i].Rules), len(groups[i].Rules))
	}
	return string(key)
}

// reach makes lists of a selection.
func (r *reaches) reach(s secgroup.Selection, c secgroup.Container) *firewall.Egress {
	e := &firewall.Egress{Deny: r.deny[phase(c.Workload)]}
	if mixed(s) { // only then the order in which rules are asked makes a difference
		bound, defaults := s.Rules()
		what := fmt.Sprintf("security groups of space %.40q, group %.40q", c.Space, string(c.Group))
		beside := groupsKey([]byte("beside "), s.Defaults) + " |" // what is in the defaults is not in the others
		e.Lists = append(e.Lists, r.list(beside, what, s.Bound, bound), r.list("ordered", "default security groups", s.Defaults, defaults))
		return e
	}
	for _, some := range parts(s) {
		if len(some) == 0 {
			continue
		}
		var rules []secgroup.Rule
		for i := range some {
			rules = append(rules, some[i].Rules...)
		}
		what := fmt.Sprintf("security group %.40s %.60q", some[0].GUID, some[0].Name)
		if len(some) > 1 {
			what += fmt.Sprintf(" and %d more", len(some)-1)
		}
		e.Lists = append(e.Lists, r.list("", what, some, rules))
	}
	return e
}

// maxApart is how many security groups of a container have a list of their own.
const maxApart = 6

// parts divides the groups of a selection into lists. A group that others have too has one of its own: all share it, and its change is that of one list. A list more
// costs packets that begin a connection one lookup more, so the others, and those beyond maxApart, are together.
func parts(s secgroup.Selection) [][]secgroup.Group {
	var out [][]secgroup.Group
	var together []secgroup.Group
	for i, g := range s.Bound {
		if len(g.RunningSpaces)+len(g.StagingSpaces)+len(g.Members) > 1 && len(out) < maxApart {
			out = append(out, s.Bound[i:i+1])
		} else {
			together = append(together, g)
		}
	}
	return append(out, together, s.Defaults)
}

// mixed reports whether some of a selection's rules are logged and others are not.
func mixed(s secgroup.Selection) bool {
	logged, all := 0, 0
	for _, groups := range [][]secgroup.Group{s.Bound, s.Defaults} {
		for i := range groups {
			for j := range groups[i].Rules {
				if all++; groups[i].Rules[j].Log {
					logged++
				}
			}
		}
	}
	return logged > 0 && logged < all
}

// list returns the list of groups whose rules are these, and notes what is left out of it. kind tells apart what rules of the same groups may be.
func (r *reaches) list(kind, what string, of []secgroup.Group, rules []secgroup.Rule) *firewall.List {
	key := groupsKey([]byte(kind), of)
	m, ok := r.lists[key]
	if !ok {
		m.of = slices.Clone(of)
		m.list, m.problems = firewall.NewList(rules)
		for i := range m.problems {
			m.problems[i].What = what + ": " + m.problems[i].What
		}
	}
	if !m.used {
		m.used = true
		r.problems = append(r.problems, m.problems...)
	}
	r.lists[key] = m
	return m.list
}

// own returns what a container may reach by rules that the runtime gave it, nil: everything. Without rules that is all that is not denied; with rules
// that cannot be read it is nothing.
func (r *reaches) own(netOut json.RawMessage, l labels) fixed {
	deny := r.deny[phase(l.workload)]
	if len(netOut) == 0 && len(deny.Spans()) == 0 {
		return fixed{}
	}
	key := phase(l.workload) + " " + string(netOut)
	f, ok := r.static[key]
	if ok {
		return f
	}
	f.egress = &firewall.Egress{Deny: deny, Open: len(netOut) == 0}
	if !f.egress.Open {
		rules, problems := secgroup.Garden.Read(netOut)
		for _, p := range problems {
			f.problems = append(f.problems, firewall.Problem{What: p.String(), Err: p.Err})
		}
		list, more := firewall.NewList(secgroup.Asked(rules))
		f.egress.Lists, f.problems = []*firewall.List{list}, append(f.problems, more...)
	}
	r.static[key] = f
	return f
}

// give sets what each container may reach.
func (a *agent) give(h *hosted, records []secgroup.Record, version uint64) {
	r := &a.cache.reaches
	if a.dynamic() {
		r.follow(records, version)
	}
	used := map[*firewall.Egress]bool{}
	for i := range h.containers {
		c := &h.containers[i]
		l, err := readLabels(c.metadata)
		if err != nil {
			h.problems = append(h.problems, firewall.Problem{What: "metadata of " + c.key.String(), Err: err})
		}
		var e *firewall.Egress
		if a.dynamic() {
			e = r.dynamic(l.selects(c.group()))
		} else {
			f := r.own(c.netOut, l)
			e = f.egress
			for _, p := range f.problems {
				h.problems = append(h.problems, firewall.Problem{What: "egress rules of " + c.key.String() + ": " + p.What, Err: p.Err})
			}
		}
		used[e] = true
		for j := range c.endpoints {
			c.endpoints[j].Egress = e
		}
	}
	h.problems = append(h.problems, r.problems...)
	r.forget(used)
}

// forget drops what no container has any more, once it is much.
func (r *reaches) forget(used map[*firewall.Egress]bool) {
	if len(r.static)+len(r.bound) < 2*len(used)+64 {
		return
	}
	for k, f := range r.static {
		if !used[f.egress] {
			delete(r.static, k)
		}
	}
	for k, e := range r.bound {
		if !used[e] {
			delete(r.bound, k)
		}
	}
	for k, e := range r.shared {
		if !used[e] {
			delete(r.shared, k)
		}
	}
}

// bindings returns the spaces and policy groups of containers, sorted, without duplicates: those whose security groups are asked for.
func (h hosted) bindings() (spaces []string, members []identity.Group) {
	spaces = []string{}
	for _, c := range h.containers {
		if l, _ := readLabels(c.metadata); l.space != "" && bindable(l.space) {
			spaces = append(spaces, l.space)
		}
	}
	slices.Sort(spaces)
	return slices.Compact(spaces), h.groups()
}

// bindable reports whether a group can be bound to a space of this name.
func bindable(space string) bool {
	r := secgroup.Record{GUID: "x", Name: "x", RunningSpaces: []string{space}}
	return r.Validate() == nil
}
