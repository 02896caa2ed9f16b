package policy_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// heldTags are the tags that the tests give to groups, unless a rule says otherwise.
var heldTags = map[identity.Group]identity.Tag{"a": 1, "b": 2, "c": 3, "d": 4}

// heldRules reads "a>b:80 c>d:90": source, destination and port of tcp policies; "a=7>b:80" gives a the tag 7.
func heldRules(t *testing.T, text string) []policy.Rule {
	t.Helper()
	var out []policy.Rule
	for f := range strings.FieldsSeq(text) {
		pair, port, _ := strings.Cut(f, ":")
		from, to, _ := strings.Cut(pair, ">")
		ports, err := policy.ParsePorts(port)
		if err != nil {
			t.Fatal(err)
		}
		r := policy.Rule{Policy: policy.Policy{Protocol: policy.TCP, Ports: ports}}
		r.Source, r.SourceTag = heldGroup(t, from)
		r.Destination, r.DestinationTag = heldGroup(t, to)
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b policy.Rule) int { return policy.Compare(a.Policy, b.Policy) })
	return out
}

func heldGroup(t *testing.T, text string) (identity.Group, identity.Tag) {
	name, tag, given := strings.Cut(text, "=")
	if !given {
		return identity.Group(name), heldTags[identity.Group(name)]
	}
	v, err := identity.ParseTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	return identity.Group(name), v
}

func heldText(rules []policy.Rule) string {
	var out []string
	for _, r := range rules {
		group := func(g identity.Group, tag identity.Tag) string {
			if heldTags[g] == tag {
				return string(g)
			}
			return string(g) + "=" + strings.TrimLeft(tag.String(), "0")
		}
		out = append(out, group(r.Source, r.SourceTag)+">"+group(r.Destination, r.DestinationTag)+":"+r.Ports.String())
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func fullUpdate(t *testing.T, rev revision.Revision, text string) policy.Update {
	rules := heldRules(t, text)
	return policy.Update{Revision: rev, Full: true, Set: rules, Count: len(rules), Sum: policy.Sum(rules)}
}

func groupsOf(text string) []identity.Group {
	var out []identity.Group
	for f := range strings.FieldsSeq(text) {
		out = append(out, identity.Group(f))
	}
	return out
}

func rev(epoch string, n uint64) revision.Revision {
	return revision.Revision{Epoch: epoch, Counter: n}
}

// heldStep is one answer, and what is kept then.
type heldStep struct {
	after  time.Duration // since the start
	groups string        // asked for; empty: as before
	rev    revision.Revision
	list   string // a complete list
	keep   string
}

func TestHeldKeepsWhatAListMayHaveLost(t *testing.T) {
	old := func(stamp uint64) revision.Revision { return rev(policy.Polled, stamp) }
	for name, steps := range map[string][]heldStep{
		"an answer of the same epoch removes at once, even all": {
			{groups: "a b", rev: rev("x", 1), list: "a>b:80 a>b:81", keep: "a>b:80 a>b:81"},
			{rev: rev("x", 2), list: "a>b:80", keep: "a>b:80"},
			{rev: rev("x", 3), list: "", keep: ""},
		},
		"a new epoch adds at once and holds removals for ten minutes": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80 a>b:81", keep: "a>b:80 a>b:81"},
			{after: time.Second, rev: rev("y", 1), list: "a>b:80 b>a:1", keep: "a>b:80 a>b:81 b>a:1"},
			{after: 10 * time.Minute, rev: rev("y", 2), list: "a>b:80", keep: "a>b:80 a>b:81"},
			{after: 10*time.Minute + time.Second, rev: rev("y", 2), list: "a>b:80", keep: "a>b:80"},
		},
		"epochs that take turns do not hold for longer": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80 a>b:81", keep: "a>b:80 a>b:81"},
			{after: time.Second, rev: rev("y", 1), list: "a>b:80", keep: "a>b:80 a>b:81"},
			{after: 5 * time.Minute, rev: rev("z", 1), list: "a>b:80", keep: "a>b:80 a>b:81"},
			{after: 11 * time.Minute, rev: rev("y", 1), list: "a>b:80", keep: "a>b:80"},
		},
		"an empty list of a new epoch removes nothing at first": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80", keep: "a>b:80"},
			{after: time.Second, rev: rev("y", 1), list: "", keep: "a>b:80"},
			{after: time.Hour, rev: rev("y", 1), list: "", keep: ""},
		},
		"what is held goes at once when its source's tag is another's": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80 d>b:1", keep: "a>b:80 d>b:1"},
			{rev: rev("y", 1), list: "c=1>b:80", keep: "c=1>b:80 d>b:1"},
		},
		"what is held takes the tag that its group has now": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80 a>b:81", keep: "a>b:80 a>b:81"},
			{rev: rev("y", 1), list: "a=7>b:80", keep: "a=7>b:80 a=7>b:81"},
		},
		"what is held and comes back is listed": {
			{groups: "a b", rev: rev("x", 9), list: "a>b:80", keep: "a>b:80"},
			{rev: rev("y", 1), list: "", keep: "a>b:80"},
			{rev: rev("y", 2), list: "a>b:80", keep: "a>b:80"},
			{rev: rev("y", 3), list: "", keep: ""},
		},
		"other groups: what touches none of them goes, the rest is complete": {
			{groups: "a b", rev: rev("x", 1), list: "a>b:80 c>a:1", keep: "a>b:80 c>a:1"},
			{groups: "b d", rev: rev("x", 2), list: "a>b:80 c>d:1", keep: "a>b:80 c>d:1"},
			{groups: "d", rev: rev("y", 1), list: "", keep: "c>d:1"},
			{groups: "a", rev: rev("y", 1), list: "", keep: ""},
		},
		"a server that is polled removes at once, whatever its stamps": {
			{groups: "a b", rev: old(7), list: "a>b:80 a>b:81 a>b:82", keep: "a>b:80 a>b:81 a>b:82"},
			{rev: old(8), list: "a>b:80 a>b:81", keep: "a>b:80 a>b:81"},
			{rev: old(8), list: "a>b:81", keep: "a>b:81"},
			{rev: old(0), list: "a>b:82", keep: "a>b:82"},
		},
		"an empty list of a server that is polled is held": {
			{groups: "a b", rev: old(7), list: "a>b:80", keep: "a>b:80"},
			{after: time.Minute, rev: old(8), list: "", keep: "a>b:80"},
			{after: 10 * time.Minute, rev: old(8), list: "", keep: "a>b:80"},
			{after: 11 * time.Minute, rev: old(8), list: "", keep: ""},
		},
		"a server that has learned revisions, or lost them, is a new epoch": {
			{groups: "a b", rev: old(7), list: "a>b:80", keep: "a>b:80"},
			{rev: rev("x", 1), list: "a>b:81", keep: "a>b:80 a>b:81"},
			{rev: old(8), list: "a>b:82", keep: "a>b:80 a>b:81 a>b:82"},
		},
		"a clock that goes back holds for ten minutes again, not for years": {
			{after: 1000 * time.Hour, groups: "a b", rev: rev("x", 9), list: "a>b:80", keep: "a>b:80"},
			{after: 1000 * time.Hour, rev: rev("y", 1), list: "", keep: "a>b:80"},
			{after: time.Hour, rev: rev("y", 1), list: "", keep: "a>b:80"},
			{after: time.Hour + 11*time.Minute, rev: rev("y", 1), list: "", keep: ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := policy.NewHeld(time.Minute)
			start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			var groups []identity.Group
			for i, s := range steps {
				if s.groups != "" {
					groups = groupsOf(s.groups)
				}
				if err := h.Update(fullUpdate(t, s.rev, s.list), groups, start.Add(s.after)); err != nil {
					t.Fatalf("answer %d: %v", i, err)
				}
				if got := heldText(h.Keep(start.Add(s.after))); got != s.keep {
					t.Fatalf("after answer %d: kept %q, want %q", i, got, s.keep)
				}
				h = h.State().Restore(time.Minute) // a restart at any time changes nothing
				if got := heldText(h.Keep(start.Add(s.after))); got != s.keep {
					t.Fatalf("after answer %d and a restart: kept %q, want %q", i, got, s.keep)
				}
				if h.Since(groups) != s.rev {
					t.Errorf("after answer %d and a restart: watches from %v, want %v", i, h.Since(groups), s.rev)
				}
			}
		})
	}
}

func TestHeldFollowsChanges(t *testing.T) {
	h, now, groups := policy.NewHeld(time.Minute), time.Now(), groupsOf("a b")
	if !h.Since(groups).IsZero() || h.Knows("a") {
		t.Error("it knows something before the first answer")
	}
	if err := h.Update(fullUpdate(t, rev("x", 1), "a>b:80 a>b:81"), groups, now); err != nil {
		t.Fatal(err)
	}
	then := h.Keep(now)
	want := heldRules(t, "a>b:80 b>a:5")
	u := policy.Update{Revision: rev("x", 4), Set: heldRules(t, "b>a:5"), Gone: []policy.Policy{heldRules(t, "a>b:81")[0].Policy}, Count: 2, Sum: policy.Sum(want)}
	if err := h.Update(u, groups, now); err != nil {
		t.Fatal(err)
	}
	if got := heldText(h.Keep(now)); got != heldText(want) {
		t.Errorf("kept %q, want %q", got, heldText(want))
	}
	if heldText(then) != "a>b:80 a>b:81" {
		t.Error("a list that was given out changed")
	}
	if h.Since(groups) != rev("x", 4) || !h.Since(groupsOf("a")).IsZero() || !h.Knows("b") || h.Knows("c") {
		t.Error("it mistakes what it knows")
	}
}

func TestHeldRefusesWhatDoesNotAddUp(t *testing.T) {
	now, groups := time.Now(), groupsOf("a b")
	for name, u := range map[string]policy.Update{
		"a seal that does not fit":       {Revision: rev("x", 2), Set: heldRules(t, "b>a:5"), Count: 3, Sum: 1},
		"a list shorter than its seal":   {Revision: rev("x", 2), Full: true, Count: 1},
		"changes to another epoch's":     {Revision: rev("y", 2), Count: 1, Sum: policy.Sum(heldRules(t, "a>b:80"))},
		"changes of no revision at all":  {Count: 1, Sum: policy.Sum(heldRules(t, "a>b:80"))},
		"an empty list sealed as longer": {Revision: rev("y", 2), Full: true, Count: 7},
	} {
		h := policy.NewHeld(time.Minute)
		if err := h.Update(fullUpdate(t, rev("x", 1), "a>b:80"), groups, now); err != nil {
			t.Fatal(err)
		}
		if err := h.Update(u, groups, now); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want it refused", name, err)
		}
		if got := heldText(h.Keep(now)); got != "a>b:80" || !h.Since(groups).IsZero() {
			t.Errorf("%s: kept %q and watches from %v, want what was there and a complete list next", name, got, h.Since(groups))
		}
		if err := h.Update(fullUpdate(t, rev("x", 3), "b>a:1"), groups, now); err != nil || heldText(h.Keep(now)) != "b>a:1" {
			t.Errorf("%s: %v, then kept %q, want the complete list of the epoch to count as ever", name, err, heldText(h.Keep(now)))
		}
	}
	h := policy.NewHeld(time.Minute)
	if err := h.Update(fullUpdate(t, rev("x", 1), "a>b:80"), groups, now); err != nil {
		t.Fatal(err)
	}
	u := policy.Update{Revision: rev("x", 2), Count: 1, Sum: policy.Sum(heldRules(t, "a>b:80"))}
	if err := h.Update(u, groupsOf("a"), now); !errors.Is(err, fault.Invalid) {
		t.Errorf("changes for other groups: %v, want them refused", err)
	}
}

func TestHeldWaitsForAServerThatLags(t *testing.T) {
	h, now, groups := policy.NewHeld(time.Minute), time.Now(), groupsOf("a b")
	if err := h.Update(fullUpdate(t, rev("x", 5), "a>b:80"), groups, now); err != nil {
		t.Fatal(err)
	}
	old := fullUpdate(t, rev("x", 4), "a>b:81")
	for _, after := range []time.Duration{0, 9 * time.Second} {
		if err := h.Update(old, groups, now.Add(after)); !errors.Is(err, fault.Unavailable) {
			t.Fatalf("after %v: %v, want it refused for now", after, err)
		}
		if got := heldText(h.Keep(now.Add(after))); got != "a>b:80" {
			t.Fatalf("after %v: kept %q, want what was there: the other policy has been removed since", after, got)
		}
	}
	if err := h.Update(old, groups, now.Add(10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if got := heldText(h.Keep(now)); got != "a>b:80 a>b:81" {
		t.Errorf("kept %q, want both: the counter really went back", got)
	}
}

func TestHeldLeavesOutWhatMakesNoSense(t *testing.T) {
	h := policy.NewHeld(time.Minute)
	if err := h.Update(fullUpdate(t, rev("x", 5), "a>b:80 a>b:81"), groupsOf("a b"), time.Now()); err != nil {
		t.Fatal(err)
	}
	s := h.State()
	s.Listed = slices.Clone(s.Listed)
	s.Listed[0].SourceTag = 0
	if h = s.Restore(time.Minute); !h.Since(groupsOf("a b")).IsZero() || heldText(h.Keep(time.Now())) != "a>b:81" {
		t.Errorf("kept %q and watches from %v, want the sound rule and a complete list next", heldText(h.Keep(time.Now())), h.Since(groupsOf("a b")))
	}
}
