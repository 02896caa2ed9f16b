package policytest

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// GroupsSubject is what RunSecurityGroups tests: a book of security groups and what tells agents of it.
type GroupsSubject struct {
	Book secgroup.Book
	Feed secgroup.Feed
}

// OpenGroups returns a new and empty subject, which ends with the test.
type OpenGroups func(t testing.TB) GroupsSubject

// RunSecurityGroups tests the security groups that open returns.
func RunSecurityGroups(t *testing.T, open OpenGroups) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, s GroupsSubject)
	}{
		{"WhatIsCreatedIsListedInOrder", testGroupList},
		{"ChangesChangeOnlyWhatTheySay", testGroupChange},
		{"WhatIsWrongIsRefused", testGroupRefusal},
		{"AWatchTellsWhatIsAsked", testGroupWatch},
		{"AWatchWakesForWhatIsAsked", testGroupWake},
		{"CancelledContext", testGroupCancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open(t)) })
	}
}

// RulesTo returns the rules, as text, of a group that allows everything to an address.
func RulesTo(address string) string {
	return `[{"protocol":"all","destination":"` + address + `","ports":"","type":0,"code":0,"description":"","log":false}]`
}

func makeGroup(t testing.TB, s GroupsSubject, r secgroup.Record) secgroup.Kept {
	t.Helper()
	if r.Rules == "" {
		r.Rules = RulesTo("10.0.0.1")
	}
	k, err := s.Book.Create(t.Context(), r)
	if err != nil {
		t.Fatalf("create %s: %v", r.Name, err)
	}
	return k
}

func groupNames(t testing.TB, s GroupsSubject) string {
	t.Helper()
	list, err := s.Book.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, k := range list {
		names = append(names, k.Name)
	}
	return strings.Join(names, " ")
}

func testGroupList(t *testing.T, s GroupsSubject) {
	if got := groupNames(t, s); got != "" {
		t.Errorf("a new book has %q", got)
	}
	first := makeGroup(t, s, secgroup.Record{Name: "zebra"})
	makeGroup(t, s, secgroup.Record{Name: "ape", GUID: "given"})
	third := makeGroup(t, s, secgroup.Record{Name: "größe <&>\U0001f600", RunningDefault: true, StagingSpaces: []string{"s2", "s1", "s2"}, Members: []identity.Group{"web"},
		Rules: `[{"protocol":"icmp","destination":"10.0.0.0/8,10.0.0.9","type":8,"code":-1,"description":"\"quoted\" \\ <é>\u2028\u0001` + "\U0001f600" + `","log":true}]`})
	if len(first.GUID) != 36 || first.GUID == third.GUID {
		t.Errorf("guids %q and %q: expected different ones of 36 bytes", first.GUID, third.GUID)
	}
	list, err := s.Book.List(t.Context())
	if err != nil || len(list) != 3 || list[1].GUID != "given" {
		t.Fatalf("list: %v, %v", list, err)
	}
	if d := cmp.Diff(third, list[2], cmpopts.EquateEmpty()); d != "" || list[2].CloudController {
		t.Errorf("what was created and what is listed (-want +got):\n%s", d)
	}
	if !slices.Equal(list[2].StagingSpaces, []string{"s1", "s2"}) || !list[2].RunningDefault || list[2].StagingDefault {
		t.Errorf("listed %+v", list[2])
	}
	if rules, problems := secgroup.CloudController.Read([]byte(list[2].Rules)); len(rules) != 1 || len(problems) != 0 || rules[0].Description != "\"quoted\" \\ <é>\u2028\x01\U0001f600" {
		t.Errorf("rules %v, %v", rules, problems)
	}
	if err := s.Book.Delete(t.Context(), "given"); err != nil {
		t.Fatal(err)
	}
	makeGroup(t, s, secgroup.Record{Name: "bee"})
	if got := groupNames(t, s); got != "zebra größe <&>\U0001f600 bee" {
		t.Errorf("listed %q", got)
	}
}

func testGroupChange(t *testing.T, s GroupsSubject) {
	g := makeGroup(t, s, secgroup.Record{Name: "a", RunningSpaces: []string{"s1", "s2"}, StagingDefault: true})
	change := func(c secgroup.Change) secgroup.Kept {
		t.Helper()
		k, err := s.Book.Change(t.Context(), g.GUID, c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	want := g
	want.Members, want.RunningSpaces = []identity.Group{"web"}, []string{"s2", "s3"}
	got := change(secgroup.Change{Bind: secgroup.Scope{Members: []identity.Group{"web"}, RunningSpaces: []string{"s3"}}, Unbind: secgroup.Scope{RunningSpaces: []string{"s1", "s9"}}})
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("bound (-want +got):\n%s", d)
	}
	name, rules := "b", RulesTo("10.0.0.2")
	want.Name, want.Rules, want.StagingDefault, want.RunningDefault = name, rules, false, true
	got = change(secgroup.Change{Name: &name, Rules: &rules, Bind: secgroup.Scope{RunningDefault: true}, Unbind: secgroup.Scope{StagingDefault: true}})
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("changed (-want +got):\n%s", d)
	}
	if got = change(secgroup.Change{}); !cmp.Equal(want, got, cmpopts.EquateEmpty()) {
		t.Errorf("no change made it %+v", got)
	}
	list, err := s.Book.List(t.Context())
	if d := cmp.Diff([]secgroup.Kept{want}, list, cmpopts.EquateEmpty()); d != "" || err != nil {
		t.Errorf("listed, %v (-want +got):\n%s", err, d)
	}
}

func testGroupRefusal(t *testing.T, s GroupsSubject) {
	makeGroup(t, s, secgroup.Record{Name: "a", GUID: "a-guid"})
	makeGroup(t, s, secgroup.Record{Name: "b", GUID: "b-guid"})
	create := func(r secgroup.Record) error {
		if r.Rules == "" {
			r.Rules = "[]"
		}
		_, err := s.Book.Create(t.Context(), r)
		return err
	}
	change := func(guid string, c secgroup.Change) error {
		_, err := s.Book.Change(t.Context(), guid, c)
		return err
	}
	name, long, rules := "a", strings.Repeat("x", 256), `[{"protocol":"all","destination":"::/0"}]`
	for what, c := range map[string]struct {
		err    error
		kind   fault.Kind
		reason string
	}{
		"a name twice":         {create(secgroup.Record{Name: "a"}), fault.Conflict, `name "a"`},
		"a guid twice":         {create(secgroup.Record{Name: "c", GUID: "a-guid"}), fault.Conflict, `guid "a-guid"`},
		"no name":              {create(secgroup.Record{}), fault.Invalid, "name is empty"},
		"a guid with a slash":  {create(secgroup.Record{Name: "c", GUID: "a/b"}), fault.Invalid, "slash"},
		"rules that are none":  {create(secgroup.Record{Name: "c", Rules: "{}"}), fault.Invalid, "array"},
		"a bad rule":           {create(secgroup.Record{Name: "c", Rules: rules}), fault.Invalid, "rule 1: destination"},
		"an empty space":       {create(secgroup.Record{Name: "c", RunningSpaces: []string{""}}), fault.Invalid, "space is empty"},
		"a bad member":         {create(secgroup.Record{Name: "c", Members: []identity.Group{"a,b"}}), fault.Invalid, "commas"},
		"another's name":       {change("b-guid", secgroup.Change{Name: &name}), fault.Conflict, `name "a"`},
		"a name that is long":  {change("b-guid", secgroup.Change{Name: &long}), fault.Invalid, "256 bytes"},
		"a bad rule later":     {change("b-guid", secgroup.Change{Rules: &rules}), fault.Invalid, "IPv6"},
		"a change of nothing":  {change("c-guid", secgroup.Change{Name: &name}), fault.NotFound, "c-guid"},
		"a removal of nothing": {s.Book.Delete(t.Context(), "c-guid"), fault.NotFound, "c-guid"},
	} {
		if fault.Of(c.err) != c.kind || c.err == nil || !strings.Contains(c.err.Error(), c.reason) {
			t.Errorf("%s: %v (%v), expected %v with %q", what, c.err, fault.Of(c.err), c.kind, c.reason)
		}
	}
	if got := groupNames(t, s); got != "a b" {
		t.Errorf("after what was refused there is %q", got)
	}
}

// watchGroups asks, and applies the answer.
func watchGroups(t testing.TB, s GroupsSubject, a secgroup.Ask, held []secgroup.Record) ([]secgroup.Record, secgroup.Update) {
	t.Helper()
	u, err := s.Feed.Watch(t.Context(), a)
	if err != nil {
		t.Fatalf("watch: %v", err)
	}
	next, err := u.Apply(held)
	if err != nil {
		t.Fatal(err)
	}
	return next, u
}

func recordNames(list []secgroup.Record) string {
	var names []string
	for _, r := range list {
		names = append(names, r.Name)
	}
	return strings.Join(names, " ")
}

func testGroupWatch(t *testing.T, s GroupsSubject) {
	for _, r := range []secgroup.Record{
		{Name: "s1s", StagingSpaces: []string{"s1"}}, {Name: "running", RunningDefault: true, RunningSpaces: []string{"s1"}}, {Name: "s2", RunningSpaces: []string{"s2"}},
		{Name: "staging", StagingDefault: true}, {Name: "web", Members: []identity.Group{"web"}}, {Name: "s1", RunningSpaces: []string{"s1", "s3"}}, {Name: "nobody"},
	} {
		makeGroup(t, s, r)
	}
	for want, a := range map[string]secgroup.Ask{
		"running staging":               {},
		"s1s running staging s1":        {Spaces: []string{"s1"}},
		"running s2 staging":            {Spaces: []string{"none", "s2"}},
		"s1s running s2 staging web s1": {Spaces: []string{"s1", "s2", "s3"}, Members: []identity.Group{"db", "web"}},
	} {
		a.Host = "host"
		got, u := watchGroups(t, s, a, nil)
		if recordNames(got) != want || !u.Full || u.Revision.IsZero() {
			t.Errorf("%+v: told %q, full %v, at %v, expected %q", a, recordNames(got), u.Full, u.Revision, want)
		}
		a.Since, a.Sum = revision.Revision{Epoch: "another", Counter: 1 << 60}, u.Sum
		if _, u = watchGroups(t, s, a, nil); !u.Full {
			t.Errorf("%+v: expected all of it", a)
		}
	}
}

func testGroupWake(t *testing.T, s GroupsSubject) {
	a := secgroup.Ask{Host: "host", Spaces: []string{"s1"}}
	held, u := watchGroups(t, s, a, nil)
	type answer struct {
		held []secgroup.Record
		u    secgroup.Update
	}
	ask := func() <-chan answer {
		a.Since, a.Sum = u.Revision, u.Sum
		c, a, held := make(chan answer, 1), a, held
		go func() {
			for { // an answer without news is one too
				u, err := s.Feed.Watch(t.Context(), a)
				if err != nil {
					t.Errorf("watch: %v", err)
					close(c)
					return
				}
				next, err := u.Apply(held)
				if err != nil {
					t.Error(err)
				}
				if u.Full || t.Context().Err() != nil {
					c <- answer{next, u}
					return
				}
				a.Since = u.Revision
			}
		}()
		return c
	}
	var g secgroup.Kept
	for i, step := range []struct {
		f    func() error
		want string
	}{
		{func() (err error) {
			g, err = s.Book.Create(t.Context(), secgroup.Record{Name: "g", Rules: "[]"})
			return err
		}, "-"},
		{func() error {
			return alter(t, s, g, secgroup.Change{Bind: secgroup.Scope{RunningSpaces: []string{"s2"}}})
		}, "-"},
		{func() error {
			return alter(t, s, g, secgroup.Change{Bind: secgroup.Scope{RunningSpaces: []string{"s1"}}})
		}, "g"},
		{func() error { r := RulesTo("10.0.0.9"); return alter(t, s, g, secgroup.Change{Rules: &r}) }, "g"},
		{func() error {
			return alter(t, s, g, secgroup.Change{Unbind: secgroup.Scope{RunningSpaces: []string{"s1"}}})
		}, ""},
		{func() error { return alter(t, s, g, secgroup.Change{Bind: secgroup.Scope{StagingDefault: true}}) }, "g"},
		{func() error { return s.Book.Delete(t.Context(), g.GUID) }, ""},
	} {
		var c <-chan answer
		if step.want != "-" {
			c = ask()
		}
		if err := step.f(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if c == nil {
			continue
		}
		got := <-c
		if recordNames(got.held) != step.want {
			t.Errorf("step %d: told %q, expected %q", i, recordNames(got.held), step.want)
		}
		held, u = got.held, got.u
	}
}

func alter(t testing.TB, s GroupsSubject, g secgroup.Kept, c secgroup.Change) error {
	_, err := s.Book.Change(t.Context(), g.GUID, c)
	return err
}

func testGroupCancelled(t *testing.T, s GroupsSubject) {
	_, u := watchGroups(t, s, secgroup.Ask{Host: "host"}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Feed.Watch(ctx, secgroup.Ask{Host: "host", Since: u.Revision, Sum: u.Sum}); err == nil {
		t.Error("a watch of somebody who has gone answers")
	}
	if _, err := s.Book.Create(ctx, secgroup.Record{Name: "a", Rules: "[]"}); err == nil {
		t.Error("a creation of somebody who has gone succeeds")
	}
}
