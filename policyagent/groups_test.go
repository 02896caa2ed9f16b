package policyagent

import (
	"errors"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
	"github.com/google/go-cmp/cmp"
)

// TestHeldGroupsGoInTime: what is held because a database was lost is enforced until its time is over, which counts as a change.
func TestHeldGroupsGoInTime(t *testing.T) {
	now := time.Now()
	g := groups{held: secgroup.NewHeld(watchWait)}
	answer := func(epoch string, names ...string) secgroup.Update {
		u := secgroup.Update{Revision: revision.Revision{Epoch: epoch, Counter: 1}, Full: true}
		for _, n := range names {
			u.Groups = append(u.Groups, secgroup.Record{GUID: n, Name: n, Rules: "[]", RunningDefault: true})
		}
		u.Count, u.Sum = len(u.Groups), secgroup.Sum(u.Groups)
		return u
	}
	for _, x := range []struct {
		u       secgroup.Update
		changed bool
		version uint64
	}{{answer("e", "a"), true, 1}, {answer("e", "a"), false, 1}, {answer("f", "b"), true, 2}} {
		if changed, err := g.update(x.u, secgroup.Ask{Spaces: []string{"s"}}, now); changed != x.changed || err != nil || g.version != x.version {
			t.Errorf("%+v: %v %v, version %d", x, changed, err, g.version)
		}
	}
	if list, changed := g.keep(now); len(list) != 2 || changed {
		t.Errorf("%v %v", list, changed)
	}
	g.dirty = false
	if list, changed := g.keep(now.Add(time.Hour)); len(list) != 1 || !changed || g.version != 3 || !g.dirty {
		t.Errorf("an hour later: %v %v", list, changed)
	}
}

// TestAnAnswerDoesNotHideThatGroupsWentInTime: whichever comes first when the time of held groups is over, a pass or an answer, what is enforced changes.
func TestAnAnswerDoesNotHideThatGroupsWentInTime(t *testing.T) {
	now := time.Now()
	answer := func(epoch, name string, full bool) secgroup.Update {
		list := []secgroup.Record{{GUID: name, Name: name, Rules: "[]", RunningDefault: true}}
		u := secgroup.Update{Revision: revision.Revision{Epoch: epoch, Counter: 1}, Full: full, Count: 1, Sum: secgroup.Sum(list)}
		if full {
			u.Groups = list
		}
		return u
	}
	bad := answer("f", "b", true)
	bad.Sum++
	for name, last := range map[string]secgroup.Update{"nothing is new": answer("f", "b", false), "the same list": answer("f", "b", true), "a list that does not add up": bad} {
		g := groups{held: secgroup.NewHeld(watchWait)}
		for _, u := range []secgroup.Update{answer("e", "a", true), answer("f", "b", true)} {
			if _, err := g.update(u, secgroup.Ask{Spaces: []string{"s"}}, now); err != nil {
				t.Fatal(err)
			}
		}
		version := g.version
		if list, _ := g.keep(now); len(list) != 2 {
			t.Fatalf("%s: %v", name, list)
		}
		g.dirty = false
		later := now.Add(time.Hour)
		if changed, _ := g.update(last, secgroup.Ask{Spaces: []string{"s"}}, later); !changed || g.version == version || !g.dirty {
			t.Errorf("%s: changed %v, version %d, before %d, to be stored %v", name, changed, g.version, version, g.dirty)
		}
		if list, _ := g.keep(later); len(list) != 1 {
			t.Errorf("%s: %v", name, list)
		}
	}
}

func TestSavedSecurityGroups(t *testing.T) {
	s := state{dir: t.TempDir()}
	if h, err := s.loadGroups(); h != nil || err != nil {
		t.Errorf("nothing: %v %v", h, err)
	}
	record := func(name string) secgroup.Record { return secgroup.Record{GUID: name, Name: name, Rules: "[]"} }
	want := secgroup.HeldState{Revision: revision.Revision{Epoch: "e", Counter: 3}, Spaces: []string{"s1"}, Listed: []secgroup.Record{record("a"), record("ü")},
		Absent: []secgroup.HeldRecord{{Record: record("x"), Until: time.Unix(1e9, 0).UTC(), Lacked: 2}}}
	if err := s.saveGroups(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.loadGroups()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, *got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
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
