package secgroup

import (
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

const (
	longHold    = 10 * time.Minute // for which groups are held at least when a list may have lost them
	behindGrace = 10 * time.Second // for which answers older than the last one are refused
	lists       = 3                // of a polled server, in a row, without a group, after which that is gone
)

// Held decides what the answers of a Feed, and the lack of them, mean for the groups that a host enforces. What an answer adds or changes holds at once. What it
// leaves out ceases
//   - at once when an answer of the same epoch says so, an empty one too: it is sealed;
//   - after the hold (the longer of three intervals and 10 minutes) when the epoch is new or the counter stays back: both what a group was and what it is hold till then;
//   - when a server that is polled (policy.Polled) has left it out of three lists in a row; when such a list is empty, or lacks more than a quarter of more than eight
//     groups, after the hold;
//   - at once when it is none of the spaces and policy groups asked for that it was bound to.
//
// It has no clock and no lock: callers pass the wall-clock time, which may go back, and do not call it concurrently.
type Held struct {
	hold   time.Duration
	state  HeldState
	sum    Digest // of state.Listed
	broken bool   // only a complete list will do
	behind time.Time
}

// HeldState is what a Held knows, to be stored. Its slices are not to be changed.
type HeldState struct {
	Revision revision.Revision
	Spaces   []string // what the groups are of
	Members  []identity.Group
	Listed   []Record // those of the last list
	Absent   []HeldRecord
}

// HeldRecord is a group, or what it was, that no current list has.
type HeldRecord struct {
	Record
	Until  time.Time // held till then; zero: until enough lists lack it
	Lacked int       // how many lists in a row have lacked it
}

// NewHeld returns a Held that knows nothing. interval is the longest time between two answers.
func NewHeld(interval time.Duration) *Held {
	return &Held{hold: max(3*interval, longHold), sum: Sum(nil)}
}

// Restore returns a Held that goes on from s. What makes no sense is left out, and then the next list has to be a complete one.
func (s HeldState) Restore(interval time.Duration) *Held {
	h := NewHeld(interval)
	bad := func(r Record) bool { return r.Validate() != nil }
	h.broken = slices.ContainsFunc(s.Listed, bad) || !slices.IsSorted(s.Spaces) || !slices.IsSorted(s.Members)
	s.Listed = slices.DeleteFunc(slices.Clone(s.Listed), bad)
	s.Absent = slices.DeleteFunc(slices.Clone(s.Absent), func(r HeldRecord) bool { return bad(r.Record) })
	h.state, h.sum = s, Sum(s.Listed)
	return h
}

// State returns what h knows.
func (h *Held) State() HeldState { return h.state }

// Ask returns what to ask a Feed for spaces and policy groups (both sorted, without duplicates).
func (h *Held) Ask(host string, spaces []string, members []identity.Group) Ask {
	a := Ask{Host: host, Spaces: spaces, Members: members}
	if !h.broken && h.about(spaces, members) {
		a.Since, a.Sum = h.state.Revision, h.sum
	}
	return a
}

func (h *Held) about(spaces []string, members []identity.Group) bool {
	return slices.Equal(spaces, h.state.Spaces) && slices.Equal(members, h.state.Members)
}

// Revision returns that of the last answer, zero when there was none.
func (h *Held) Revision() revision.Revision { return h.state.Revision }

// Absent returns how many of the groups in Keep no current list has.
func (h *Held) Absent() int { return len(h.state.Absent) }

// Update takes in the answer of a Feed to a question. One that does not add up to its own seal is fault.Invalid, and changes nothing but
// that the next question is for everything. One that is older than what is known is fault.Unavailable and changes nothing, for 10 seconds:
// ask again.
func (h *Held) Update(u Update, a Ask, now time.Time) error {
	polled, same := u.Revision.Epoch == policy.Polled, u.Revision.Epoch == h.state.Revision.Epoch
	back := same && !polled && u.Revision.Counter < h.state.Revision.Counter
	if back && h.lags(now) {
		return fault.Unavailablef("the answer is of revision %v, older than %v: the server lags behind", u.Revision, h.state.Revision)
	}
	if !u.Full && (!same || !h.about(a.Spaces, a.Members)) {
		h.broken = true
		return fault.Invalidf("nothing is new at revision %v, but not about what this host has: ask for everything", u.Revision)
	}
	next, err := u.Apply(h.state.Listed)
	if err != nil {
		h.broken = true
		return err
	}
	h.expire(now)
	h.settle(next, a, polled)
	switch {
	case h.state.Revision.IsZero(), !u.Full:
	case polled && same:
		h.miss(next, a, now)
	case back || !same:
		h.lose(next, a, now)
	}
	h.state.Revision, h.state.Spaces, h.state.Members, h.state.Listed = u.Revision, slices.Clone(a.Spaces), slices.Clone(a.Members), next
	h.sum, h.broken, h.behind = u.Sum, false, time.Time{}
	return nil
}

// lags reports whether an answer older than the last one is to be refused: for a while since the first such.
func (h *Held) lags(now time.Time) bool {
	if h.behind.IsZero() || now.Before(h.behind) {
		h.behind = now
	}
	return now.Sub(h.behind) < behindGrace
}

// settle forgets what is absent and need not be held beside a list, and counts the list against the rest.
func (h *Held) settle(next []Record, a Ask, polled bool) {
	var kept []HeldRecord
	for _, r := range h.state.Absent {
		there := slices.IndexFunc(next, func(n Record) bool { return n.GUID == r.GUID })
		back := there >= 0 && (r.Until.IsZero() || next[there].Equal(r.Record))
		if polled && r.Until.IsZero() {
			r.Lacked++
		}
		if back || !r.Touches(a.Spaces, a.Members) || r.Until.IsZero() && r.Lacked >= lists {
			continue
		}
		kept = append(kept, r)
	}
	h.state.Absent = kept
}

// miss holds what a list of a polled server lacks: until enough of them do, or long when it lacks much.
func (h *Held) miss(next []Record, a Ask, now time.Time) {
	var gone []HeldRecord
	for _, r := range h.state.Listed {
		if r.Touches(a.Spaces, a.Members) && !slices.ContainsFunc(next, func(n Record) bool { return n.GUID == r.GUID }) {
			gone = append(gone, HeldRecord{Record: r, Lacked: 1})
		}
	}
	if n := len(h.state.Listed); len(next) == 0 || n > 8 && 4*len(gone) > n {
		for i := range gone {
			gone[i].Until = now.Add(h.hold)
		}
	}
	h.state.Absent = append(h.state.Absent, gone...)
}

// lose holds what a list of another history lacks or has otherwise.
func (h *Held) lose(next []Record, a Ask, now time.Time) {
	for _, r := range h.state.Listed {
		if r.Touches(a.Spaces, a.Members) && !slices.ContainsFunc(next, r.Equal) {
			h.state.Absent = append(h.state.Absent, HeldRecord{Record: r, Until: now.Add(h.hold)})
		}
	}
}

// Keep returns the groups to enforce at time now: those of the last list in its order, then those that are held. The slice is not to be changed.
func (h *Held) Keep(now time.Time) []Record {
	h.expire(now)
	keep := slices.Clip(h.state.Listed)
	for _, r := range h.state.Absent {
		keep = append(keep, r.Record)
	}
	return keep
}

// expire forgets what was held long enough.
func (h *Held) expire(now time.Time) {
	limit := now.Add(h.hold)
	var kept []HeldRecord
	for _, r := range h.state.Absent {
		if r.Until.After(limit) { // the clock went back
			r.Until = limit
		}
		if r.Until.IsZero() || now.Before(r.Until) {
			kept = append(kept, r)
		}
	}
	h.state.Absent = kept
}
