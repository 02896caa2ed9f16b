package secgroup

import (
	"slices"

	"code.cloudfoundry.org/silk/identity"
)

// The workloads of containers, as the runtime names them in the metadata (container_workload).
const (
	App     = "app"
	Task    = "task"
	Staging = "staging"
)

// Container is what decides which groups a container has.
type Container struct {
	Space    string         // in Cloud Foundry; empty: none
	Workload string         // App, Task or Staging; with anything else the container has neither defaults nor groups of its space
	Group    identity.Group // its policy group; empty: none
}

// Selection is the groups of one container, in layers that share no group: what all containers of its phase have, and what is its own. Each
// is in the order of the list that they were selected from.
type Selection struct {
	Defaults []Group
	Bound    []Group // those of its space, then those of its policy group
}

// Select returns the groups that a container has.
func Select(groups []Group, c Container) Selection {
	running, staging := c.Workload == App || c.Workload == Task, c.Workload == Staging
	var s Selection
	var members []Group
	for _, g := range groups {
		spaces := g.RunningSpaces
		if staging {
			spaces = g.StagingSpaces
		}
		switch {
		case running && g.RunningDefault, staging && g.StagingDefault:
			s.Defaults = append(s.Defaults, g)
		case (running || staging) && c.Space != "" && slices.Contains(spaces, c.Space):
			s.Bound = append(s.Bound, g)
		case c.Group != "" && slices.Contains(g.Members, c.Group):
			members = append(members, g)
		}
	}
	s.Bound = append(s.Bound, members...)
	return s
}

// Rules returns the rules of the selection in the order in which they are asked: all of bound, then all of defaults. That is the reverse of
// the order in which groups and their rules are given, as in the deployed agent; it matters where one rule logs what another does not. A
// rule that was given before is left out, whatever its description: so defaults does not depend on what is bound, and containers of a phase
// can share it.
func (s Selection) Rules() (bound, defaults []Rule) {
	given := map[string]bool{}
	collect := func(groups []Group) []Rule {
		var all []Rule
		for _, g := range groups {
			for _, r := range g.Rules {
				if key := r.String(); !given[key] {
					given[key] = true
					all = append(all, r)
				}
			}
		}
		slices.Reverse(all)
		return all
	}
	defaults = collect(s.Defaults)
	return collect(s.Bound), defaults
}

// Asked returns rules that are given without groups, such as a container's own of the runtime, in the order in which they are asked: the
// reverse, each once.
func Asked(rules []Rule) []Rule {
	_, all := Selection{Defaults: []Group{{Rules: rules}}}.Rules()
	return all
}
