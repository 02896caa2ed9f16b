package policyagent

import (
	"errors"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

func groupUpdate(epoch string, counter uint64, names ...string) secgroup.Update {
	u := secgroup.Update{Revision: revision.Revision{Epoch: epoch, Counter: counter}, Full: true}
	for _, n := range names {
		u.Groups = append(u.Groups, secgroup.Record{GUID: n, Name: n, Rules: "[]"})
	}
	u.Count, u.Sum = len(u.Groups), secgroup.Sum(u.Groups)
	return u
}

// TestWhatAListOfSecurityGroupsMeans: what is added counts at once, and what is missing does if the list follows from the one before.
func TestWhatAListOfSecurityGroupsMeans(t *testing.T) {
	now := time.Now()
	var g groups
	step := func(what string, later time.Duration, u secgroup.Update, want ...string) {
		t.Helper()
		now = now.Add(later)
		g.expire(now)
		if _, err := g.update(u, []string{"s"}, nil, now); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var got []string
		for _, r := range g.all() {
			got = append(got, r.GUID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, expected %v", what, got, want)
		}
	}
	step("the first", 0, groupUpdate("e", 5, "a", "b"), "a", "b")
	step("a removal", 0, groupUpdate("e", 6, "b"), "b")
	step("all removed", 0, groupUpdate("e", 7))
	step("again", 0, groupUpdate("e", 8, "a", "b"), "a", "b")
	if _, err := g.update(groupUpdate("e", 7, "b"), nil, nil, now); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a server that lags: %v", err)
	}
	step("one that has gone back", groupsLag, groupUpdate("e", 7, "b"), "b", "a")
	step("a restored database", time.Minute, groupUpdate("f", 1, "c"), "c", "b", "a")
	step("some minutes later", groupsHold-time.Minute, groupUpdate("f", 2, "c"), "c", "b", "a")
	step("ten minutes later", time.Minute, groupUpdate("f", 3, "c"), "c")
	step("a server of the deployed kind", 0, groupUpdate(policy.Polled, 9, "c", "d"), "c", "d")
	step("which has lost everything", 0, groupUpdate(policy.Polled, 3), "c", "d")
	step("for long", groupsHold, groupUpdate(policy.Polled, 3))
	torn := groupUpdate(policy.Polled, 10, "x", "y")
	torn.Groups = torn.Groups[:1]
	if changed, err := g.update(torn, nil, nil, now); !errors.Is(err, fault.Invalid) || changed || len(g.all()) != 0 {
		t.Errorf("half a list: %v %v", changed, err)
	}
}

func TestSavedSecurityGroups(t *testing.T) {
	s := state{dir: t.TempDir()}
	if h, err := s.loadGroups(); h != nil || err != nil {
		t.Errorf("nothing: %v %v", h, err)
	}
	want := heldGroups{Revision: revision.Revision{Epoch: "e", Counter: 3}, Spaces: []string{"s1"}, Listed: groupUpdate("", 0, "a", "ü").Groups,
		Absent: groupUpdate("", 0, "x").Groups, Until: time.Unix(1e9, 0).UTC()}
	if err := s.saveGroups(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.loadGroups()
	if err != nil || got.Revision != want.Revision || !slices.EqualFunc(got.Listed, want.Listed, secgroup.Record.Equal) ||
		!slices.EqualFunc(got.Absent, want.Absent, secgroup.Record.Equal) || !got.Until.Equal(want.Until) || !slices.Equal(got.Spaces, want.Spaces) {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzSavedSecurityGroups(f *testing.F) {
	f.Add([]byte(`{"revision":"e.3","spaces":["s"],"members":["m"],"listed":[{"GUID":"a","Name":"b","Rules":"[]"}],"sum":"00"}`))
	f.Add([]byte(`{"listed":null}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseGroups(b)
		if err != nil {
			return
		}
		s := state{dir: t.TempDir()}
		if err := s.saveGroups(*h); err != nil {
			t.Fatal(err)
		}
		if again, err := s.loadGroups(); err != nil || len(again.Listed) != len(h.Listed) {
			t.Errorf("%+v came back as %+v, %v", h, again, err)
		}
	})
}

func FuzzLabels(f *testing.F) {
	f.Add([]byte(`{"space_id":"s","container_workload":"app"}`))
	f.Add([]byte(`{"space_id":7}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := readLabels(b)
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Error(err)
		}
		if (l.space != "" || l.workload != "") && !l.any {
			t.Errorf("%+v", l)
		}
	})
}
