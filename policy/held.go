package policy

import (
	"maps"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// Polled is the epoch of answers that come from polling a server of the deployed kind. Their counters are its time stamps, which may
// repeat and go back, and nothing but being an answer proves them.
const Polled = "polled"

const (
	// longHold is how long removals are held at least when a list may have lost what it leaves out.
	longHold = 10 * time.Minute
	// behindGrace is how long answers older than the last one are refused: one of several servers may lag a little.
	behindGrace = 10 * time.Second
)

// Held decides what the answers of a Feed, and the lack of them, mean for the rules that a host enforces. What an answer adds or
// changes holds at once. What it leaves out is dropped
//   - at once when an answer of the same epoch says so, an empty one too: it is sealed;
//   - after the hold (the longer of three intervals and 10 minutes) when the epoch is new or the counter stays back, or when the answer of
//     a server that is Polled is an empty list;
//   - at once, whatever is held, when none of the groups asked for is touched by it, or when the list gives the tag of one of its
//     groups to another group: it would let the wrong one in.
//
// It has no clock and no lock: callers pass the wall-clock time, which may go back, and do not call it concurrently.
type Held struct {
	hold   time.Duration
	groups []identity.Group
	rev    revision.Revision
	broken bool   // only a complete list will do
	listed []Rule // sorted by policy, never changed in place
	sum    Digest // of listed
	absent map[Policy]absence
	behind time.Time // when the first answer came that is older than rev; zero: the last one was not
}

// absence is a rule that was listed once and is not now.
type absence struct {
	rule  Rule
	until time.Time // kept till then
}

// NewHeld returns a Held that knows nothing. interval is the longest time between two answers.
func NewHeld(interval time.Duration) *Held {
	return &Held{hold: max(3*interval, longHold), absent: map[Policy]absence{}}
}

// Since returns where to watch from for groups (sorted, without duplicates). It is zero when only a complete list will do: when
// nothing is known yet, or only about other groups.
func (h *Held) Since(groups []identity.Group) revision.Revision {
	if h.broken || !slices.Equal(groups, h.groups) {
		return revision.Revision{}
	}
	return h.rev
}

// Knows reports whether there was a list of the rules that touch g: then what Keep has for it is complete.
func (h *Held) Knows(g identity.Group) bool {
	_, ok := slices.BinarySearch(h.groups, g)
	return ok
}

// Revision returns that of the last answer, zero when there was none.
func (h *Held) Revision() revision.Revision { return h.rev }

// Absent returns how many of the rules in Keep no current list has.
func (h *Held) Absent() int { return len(h.absent) }

// Update takes in the answer of a Feed to a question about groups. One that does not add up to its own seal, or that adds to a list
// never seen, is fault.Invalid, and changes nothing but that the next question is for a complete list. One that is older than what
// is known is fault.Unavailable and changes nothing, for 10 seconds: ask again.
func (h *Held) Update(u Update, groups []identity.Group, now time.Time) error {
	if !u.Full && (h.Since(groups).IsZero() || u.Revision.Epoch != h.rev.Epoch) {
		h.broken = true
		return fault.Invalidf("changes at revision %v are for a list this host does not have: ask for a complete one", u.Revision)
	}
	polled := u.Revision.Epoch == Polled
	back := u.Revision.Epoch == h.rev.Epoch && u.Revision.Counter < h.rev.Counter && !polled
	if back && h.lags(now) {
		return fault.Unavailablef("the answer is of revision %v, older than %v: the server lags behind", u.Revision, h.rev)
	}
	next, sum, err := u.apply(h.listed, h.sum)
	if err != nil {
		h.broken = true
		return err
	}
	h.expire(now)
	if u.Revision.Epoch != h.rev.Epoch || back || polled && len(next) == 0 {
		for _, r := range missing(h.listed, next) {
			h.absent[r.Policy] = absence{r, now.Add(h.hold)}
		}
	}
	h.rev, h.broken, h.groups, h.listed, h.sum, h.behind = u.Revision, false, slices.Clone(groups), next, sum, time.Time{}
	h.settle()
	return nil
}

// lags reports whether an answer older than the last one is to be refused: for a while since the first such.
func (h *Held) lags(now time.Time) bool {
	if h.behind.IsZero() || now.Before(h.behind) {
		h.behind = now
	}
	return now.Sub(h.behind) < behindGrace
}

// settle forgets what is absent and cannot be kept beside the list, and gives the rest the list's tags.
func (h *Held) settle() {
	if len(h.absent) == 0 {
		return
	}
	tags, owners := map[identity.Group]identity.Tag{}, map[identity.Tag]identity.Group{}
	for _, r := range h.listed {
		tags[r.Source], owners[r.SourceTag] = r.SourceTag, r.Source
		tags[r.Destination], owners[r.DestinationTag] = r.DestinationTag, r.Destination
	}
	retag := func(g identity.Group, t *identity.Tag) bool {
		if now, ok := tags[g]; ok {
			*t = now
			return true
		}
		owner, taken := owners[*t]
		return !taken || owner == g
	}
	maps.DeleteFunc(h.absent, func(p Policy, a absence) bool {
		_, listed := find(h.listed, p)
		return listed || !h.Knows(p.Source) && !h.Knows(p.Destination)
	})
	for p, a := range h.absent {
		if !retag(p.Source, &a.rule.SourceTag) || !retag(p.Destination, &a.rule.DestinationTag) {
			delete(h.absent, p)
			continue
		}
		h.absent[p] = a
	}
}

// Keep returns the rules to enforce at time now, sorted by policy. The slice is not to be changed.
func (h *Held) Keep(now time.Time) []Rule {
	h.expire(now)
	if len(h.absent) == 0 {
		return h.listed
	}
	keep := slices.Clone(h.listed)
	for _, a := range h.absent {
		keep = append(keep, a.rule)
	}
	slices.SortFunc(keep, func(a, b Rule) int { return Compare(a.Policy, b.Policy) })
	return keep
}

// expire forgets the rules whose time is over.
func (h *Held) expire(now time.Time) {
	limit := now.Add(h.hold)
	for p, a := range h.absent {
		if a.until.After(limit) { // the clock went back
			a.until = limit
			h.absent[p] = a
		}
		if !now.Before(a.until) {
			delete(h.absent, p)
		}
	}
}

// missing returns the rules of a sorted list whose policies another sorted list lacks.
func missing(from, in []Rule) []Rule {
	var out []Rule
	for _, r := range from {
		for len(in) > 0 && Compare(in[0].Policy, r.Policy) < 0 {
			in = in[1:]
		}
		if len(in) == 0 || in[0].Policy != r.Policy {
			out = append(out, r)
		}
	}
	return out
}

// find looks a policy up in a sorted list.
func find(sorted []Rule, p Policy) (int, bool) {
	return slices.BinarySearchFunc(sorted, p, compareTo)
}
