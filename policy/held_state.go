package policy

import (
	"cmp"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// HeldState is what a Held knows, to be stored.
type HeldState struct {
	Revision revision.Revision
	Groups   []identity.Group // that the rules are of
	Rules    []HeldRule
}

// HeldRule is a rule in a HeldState.
type HeldRule struct {
	Rule
	Until time.Time // kept till then; zero: the last list has it
}

// State returns what h knows, the rules sorted by policy. That the next list has to be a complete one is not kept: the seal tells again.
func (h *Held) State() HeldState {
	s := HeldState{Revision: h.rev, Groups: slices.Clone(h.groups), Rules: make([]HeldRule, 0, len(h.listed)+len(h.absent))}
	for _, r := range h.listed {
		s.Rules = append(s.Rules, HeldRule{Rule: r})
	}
	for _, a := range h.absent {
		s.Rules = append(s.Rules, HeldRule{a.rule, a.until})
	}
	if len(h.absent) > 0 {
		slices.SortFunc(s.Rules, compareHeld)
	}
	return s
}

func compareHeld(a, b HeldRule) int { return Compare(a.Policy, b.Policy) }

// Restore returns a Held that goes on from s. Rules that make no sense are left out, and then the next list has to be a complete one.
func (s HeldState) Restore(interval time.Duration) *Held {
	h := NewHeld(interval)
	h.groups = slices.Compact(slices.Sorted(slices.Values(s.Groups)))
	rules := slices.Clone(s.Rules)
	slices.SortFunc(rules, func(a, b HeldRule) int { return cmp.Or(compareHeld(a, b), a.Until.Compare(b.Until)) })
	rules = slices.CompactFunc(rules, func(a, b HeldRule) bool { return a.Policy == b.Policy })
	sound := len(rules) == len(s.Rules)
	for _, r := range rules {
		switch {
		case r.Validate() != nil || r.SourceTag == 0 || r.DestinationTag == 0:
			sound = false
		case !r.Until.IsZero():
			h.absent[r.Policy] = absence{r.Rule, r.Until}
		default:
			h.listed = append(h.listed, r.Rule)
		}
	}
	h.rev, h.broken, h.sum = s.Revision, !sound, Sum(h.listed)
	h.settle()
	return h
}
