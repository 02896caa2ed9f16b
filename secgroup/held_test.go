package secgroup_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

var noon = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)

// full returns an answer with groups of the running default, named by words such as "a" or "a=rules".
func full(epoch string, counter uint64, words string) secgroup.Update {
	u := secgroup.Update{Revision: revision.Revision{Epoch: epoch, Counter: counter}, Full: true}
	for _, w := range strings.Fields(words) {
		guid, rules, _ := strings.Cut(w, "=")
		u.Groups = append(u.Groups, secgroup.Record{GUID: guid, Name: guid, Rules: rules, RunningDefault: true})
	}
	u.Count, u.Sum = len(u.Groups), secgroup.Sum(u.Groups)
	return u
}

func kept(h *secgroup.Held, now time.Time) string {
	var words []string
	for _, r := range h.Keep(now) {
		w := r.GUID
		if r.Rules != "" {
			w += "=" + r.Rules
		}
		words = append(words, w)
	}
	return strings.Join(words, " ")
}

// TestHeld tells what is enforced after answers, each given some time after the one before.
func TestHeld(t *testing.T) {
	eleven := "a b c d e f g h i j k"
	for name, steps := range map[string][]struct {
		u     secgroup.Update
		after time.Duration
		want  string
	}{
		"what a sealed list lacks ceases at once": {
			{full("e", 1, "a b"), 0, "a b"}, {full("e", 2, "b=x"), 0, "b=x"}, {full("e", 3, ""), 0, ""},
		},
		"another epoch adds at once and removes late": {
			{full("e", 5, "a b"), 0, "a b"}, {full("f", 1, "b=x c"), 0, "b=x c a b"}, {full("f", 2, "b=x c"), 9 * time.Minute, "b=x c a b"}, {full("f", 3, "b=x c"), time.Minute, "b=x c"},
		},
		"what comes back is held no more": {
			{full("e", 5, "a b"), 0, "a b"}, {full("f", 1, ""), 0, "a b"}, {full("f", 2, "a"), 0, "a b"}, {full("f", 3, ""), 0, "b"},
		},
		"three lists of a polled server": {
			{full(policy.Polled, 5, "a b"), 0, "a b"}, {full(policy.Polled, 1, "b"), 0, "b a"}, {full(policy.Polled, 2, "b=x"), 0, "b=x a"}, {full(policy.Polled, 1, "b"), 0, "b"},
		},
		"a polled list that lacks it once": {
			{full(policy.Polled, 5, "a b"), 0, "a b"}, {full(policy.Polled, 1, "b"), 0, "b a"}, {full(policy.Polled, 5, "a b"), 0, "a b"}, {full(policy.Polled, 1, "b"), 0, "b a"},
			{full(policy.Polled, 1, "b"), 0, "b a"},
		},
		"an empty polled list": {
			{full(policy.Polled, 5, "a"), 0, "a"}, {full(policy.Polled, 0, ""), 0, "a"}, {full(policy.Polled, 0, ""), 0, "a"}, {full(policy.Polled, 0, ""), 0, "a"}, {full(policy.Polled, 0, ""), 10 * time.Minute, ""},
		},
		"a polled list that lacks many": {
			{full(policy.Polled, 5, eleven), 0, eleven}, {full(policy.Polled, 1, "a b c d e f g h"), 0, eleven}, {full(policy.Polled, 1, "a b c d e f g h"), time.Minute, eleven},
			{full(policy.Polled, 1, "a b c d e f g h"), time.Minute, eleven}, {full(policy.Polled, 1, "a b c d e f g h"), 9 * time.Minute, "a b c d e f g h"},
		},
		"a server of the deployed kind takes over": {
			{full("e", 5, "a b"), 0, "a b"}, {full(policy.Polled, 1, "b"), 0, "b a"}, {full(policy.Polled, 1, "b"), time.Minute, "b a"}, {full(policy.Polled, 1, "b"), time.Minute, "b a"},
			{full(policy.Polled, 1, "b"), 8 * time.Minute, "b"},
		},
		"a clock that went back holds no longer": {
			{full("e", 5, "a"), 0, "a"}, {full("f", 1, ""), 0, "a"}, {full("f", 2, ""), -time.Hour, "a"}, {full("f", 3, ""), 10 * time.Minute, ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, now := secgroup.NewHeld(time.Minute), noon
			for i, s := range steps {
				now = now.Add(s.after)
				if err := h.Update(s.u, h.Ask("h", nil, nil), now); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				if got := kept(h, now); got != s.want {
					t.Fatalf("step %d: enforced %q, expected %q", i, got, s.want)
				}
				h = h.State().Restore(time.Minute) // at any moment the agent may be another process
			}
		})
	}
}

func TestHeldRefuses(t *testing.T) {
	h := secgroup.NewHeld(time.Minute)
	ask := func() secgroup.Ask { return h.Ask("h", []string{"s"}, nil) }
	if a := ask(); !a.Since.IsZero() {
		t.Errorf("the first question is %+v", a)
	}
	if err := h.Update(full("e", 5, "a b"), ask(), noon); err != nil {
		t.Fatal(err)
	}
	if a := ask(); a.Since.Counter != 5 || a.Sum != secgroup.Sum(h.Keep(noon)) {
		t.Errorf("the second question is %+v", a)
	}
	if a := h.Ask("h", []string{"s", "t"}, nil); !a.Since.IsZero() {
		t.Errorf("a question about something else is %+v", a)
	}
	torn := full("e", 6, "a")
	torn.Count = 2
	if err := h.Update(torn, ask(), noon); !errors.Is(err, fault.Invalid) || !ask().Since.IsZero() || kept(h, noon) != "a b" {
		t.Errorf("a torn answer: %v, then asked from %v, enforced %s", err, ask().Since, kept(h, noon))
	}
	if err := h.Update(secgroup.Update{Revision: revision.Revision{Epoch: "f", Counter: 9}}, ask(), noon); !errors.Is(err, fault.Invalid) || kept(h, noon) != "a b" {
		t.Errorf("nothing new in another epoch: %v, enforced %s", err, kept(h, noon))
	}
	if err := h.Update(full("e", 4, "b"), ask(), noon); !errors.Is(err, fault.Unavailable) || kept(h, noon) != "a b" {
		t.Errorf("an older answer: %v, enforced %s", err, kept(h, noon))
	}
	if err := h.Update(full("e", 4, "b"), ask(), noon.Add(11*time.Second)); err != nil || kept(h, noon) != "b a" {
		t.Errorf("an answer that stays older: %v, enforced %s", err, kept(h, noon))
	}
}

// TestHeldForgetsWhatNobodyHereHas has the containers of a space leave while its group is held.
func TestHeldForgetsWhatNobodyHereHas(t *testing.T) {
	h := secgroup.NewHeld(time.Minute)
	list := []secgroup.Record{{GUID: "a", Name: "a", RunningSpaces: []string{"s"}}, {GUID: "b", Name: "b", RunningSpaces: []string{"t"}}}
	u := secgroup.Update{Revision: revision.Revision{Epoch: "e", Counter: 1}, Full: true, Groups: list, Count: 2, Sum: secgroup.Sum(list)}
	if err := h.Update(u, h.Ask("h", []string{"s", "t"}, nil), noon); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"a b", "b"} {
		spaces := [][]string{{"s", "t"}, {"t"}}[i]
		if err := h.Update(full(fmt.Sprint("f", i), 1, ""), h.Ask("h", spaces, nil), noon); err != nil || kept(h, noon) != want {
			t.Errorf("asked for %v: %v, enforced %q, expected %q", spaces, err, kept(h, noon), want)
		}
	}
}
