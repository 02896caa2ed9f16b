package policy

import (
	"slices"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// HeldState is what a Held knows, to be stored.
type HeldState struct {
	Revision revision.Revision
	Groups   []identity.Group // that the rules are of
	Listed   []Rule           // those of the last list, sorted by policy; shared with the Held, not to be changed
	Absent   []HeldRule       // the others, sorted by policy
}

// HeldRule is a rule in a HeldState that no current list has.
type HeldRule struct {
	Rule
	Until time.Time // kept till then
}

// State returns what h knows. That the next list has to be a complete one is not kept: the seal tells again.
func (h *Held) State() HeldState {
	s := HeldState{Revision: h.rev, Groups: slices.Clone(h.groups), Listed: h.listed}
	for _, a := range h.absent {
		s.Absent = append(s.Absent, HeldRule{a.rule, a.until})
	}
	slices.SortFunc(s.Absent, compareHeld)
	return s
}

func compareHeld(a, b HeldRule) int { return Compare(a.Policy, b.Policy) }

// Restore returns a Held that goes on from s. Rules that make no sense are left out, and then the next list has to be a complete one.
func (s HeldState) Restore(interval time.Duration) *Held {
	h := NewHeld(interval)
	h.groups = slices.Compact(slices.Sorted(slices.Values(s.Groups)))
	sensible := func(r Rule) bool { return r.Validate() == nil && r.SourceTag != 0 && r.DestinationTag != 0 }
	h.listed = sorted(s.Listed)
	if slices.ContainsFunc(h.listed, func(r Rule) bool { return !sensible(r) }) {
		h.listed = slices.DeleteFunc(slices.Clone(h.listed), func(r Rule) bool { return !sensible(r) })
	}
	sound := len(h.listed) == len(s.Listed)
	for _, r := range s.Absent {
		_, twice := h.absent[r.Policy]
		_, listed := find(h.listed, r.Policy)
		if sound = sound && !twice && !listed && sensible(r.Rule); sensible(r.Rule) && !listed {
			h.absent[r.Policy] = absence{r.Rule, r.Until}
		}
	}
	h.rev, h.broken, h.sum = s.Revision, !sound, Sum(h.listed)
	h.settle()
	return h
}
