package secgroup_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/secgroup"
)

// rule returns one for everything to an address of 10.0.0.0/24, whose description is of no consequence.
func rule(last, description string) secgroup.Rule {
	a := "10.0.0." + last
	return secgroup.Rule{Destinations: []secgroup.Range{rng(a, a)}, Description: description}
}

func texts(rules []secgroup.Rule) string {
	var all []string
	for _, r := range rules {
		all = append(all, strings.TrimPrefix(r.String(), "all 10.0.0."))
	}
	return strings.Join(all, " ")
}

var several = []secgroup.Group{
	{GUID: "member", Members: []identity.Group{"web", "db"}, Rules: []secgroup.Rule{rule("1", "")}},
	{GUID: "bound", RunningSpaces: []string{"s1", "s2"}, Rules: []secgroup.Rule{rule("2", ""), rule("3", ""), rule("2", "again"), rule("5", "of the defaults")}},
	{GUID: "running", RunningDefault: true, RunningSpaces: []string{"s1"}, Members: []identity.Group{"web"}, Rules: []secgroup.Rule{rule("4", ""), rule("5", "")}},
	{GUID: "both", RunningDefault: true, StagingDefault: true, Rules: []secgroup.Rule{rule("6", ""), rule("4", "")}},
	{GUID: "staging", StagingSpaces: []string{"s1"}, Rules: []secgroup.Rule{rule("7", "")}},
}

func TestSelect(t *testing.T) {
	for _, tt := range []struct {
		c               secgroup.Container
		bound, defaults string
	}{
		{secgroup.Container{Space: "s1", Workload: "app", Group: "web"}, "1 3 2", "6 5 4"},
		{secgroup.Container{Space: "s1", Workload: "task"}, "3 2", "6 5 4"},
		{secgroup.Container{Space: "s1", Workload: "staging", Group: "db"}, "1 7", "4 6"},
		{secgroup.Container{Space: "s3", Workload: "app"}, "", "6 5 4"},
		{secgroup.Container{Space: "s3", Workload: "staging"}, "", "4 6"},
		{secgroup.Container{Workload: "app"}, "", "6 5 4"},
		{secgroup.Container{Space: "s1", Workload: "other"}, "", ""},
		{secgroup.Container{Space: "s1", Workload: "APP", Group: "db"}, "1", ""},
		{secgroup.Container{Group: "web"}, "5 4 1", ""},
		{secgroup.Container{}, "", ""},
	} {
		bound, defaults := secgroup.Select(several, tt.c).Rules()
		if texts(bound) != tt.bound || texts(defaults) != tt.defaults {
			t.Errorf("%+v: bound %q, defaults %q, expected %q and %q", tt.c, texts(bound), texts(defaults), tt.bound, tt.defaults)
		}
	}
}

func TestDefaultsAreTheSameForAll(t *testing.T) {
	_, want := secgroup.Select(several, secgroup.Container{Workload: "app"}).Rules()
	_, got := secgroup.Select(several, secgroup.Container{Space: "s1", Workload: "app", Group: "web"}).Rules()
	if d := cmp.Diff(want, got, addrs); d != "" {
		t.Errorf("the defaults depend on what is bound (-want +got):\n%s", d)
	}
}

func TestAnEmptySpaceIsNoSpace(t *testing.T) {
	groups := []secgroup.Group{{RunningSpaces: []string{""}, Members: []identity.Group{""}, Rules: []secgroup.Rule{rule("1", "")}}}
	if s := secgroup.Select(groups, secgroup.Container{Workload: "app"}); len(s.Bound) != 0 || len(s.Defaults) != 0 {
		t.Errorf("a container without space has %v", s)
	}
}

func TestAskedOrderPrefersWhatIsGivenLast(t *testing.T) {
	logged, plain := rule("1", ""), rule("1", "")
	logged.Log = true
	for want, given := range map[bool][]secgroup.Rule{true: {plain, logged}, false: {logged, plain}} {
		first := secgroup.Match(secgroup.Asked(given), secgroup.Packet{Protocol: secgroup.TCP, Destination: logged.Destinations[0].First, Port: 1})
		if first == nil || first.Log != want {
			t.Errorf("of %v the first that matches is %v, expected the one that was given last", given, first)
		}
	}
}

func TestRecordKeepsAGroup(t *testing.T) {
	for _, g := range several {
		got, problems := g.Record().Group()
		if d := cmp.Diff(g, got, addrs); d != "" || len(problems) > 0 {
			t.Errorf("%v (-want +got):\n%s", problems, d)
		}
	}
}

func TestValidate(t *testing.T) {
	good := secgroup.Record{GUID: "c8b6a0b5-2d9f-4d0e-9e5c-0d6b6c5d3c11", Name: "public networks", Rules: "[]", RunningSpaces: []string{"s"}, Members: []identity.Group{"web"}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for reason, spoil := range map[string]func(*secgroup.Record){
		"guid is empty":         func(r *secgroup.Record) { r.GUID = "" },
		"37 bytes":              func(r *secgroup.Record) { r.GUID = strings.Repeat("x", 37) },
		"expected no slash":     func(r *secgroup.Record) { r.GUID = "a/b" },
		"name is empty":         func(r *secgroup.Record) { r.Name = "" },
		"256 bytes":             func(r *secgroup.Record) { r.Name = strings.Repeat("x", 256) },
		"printable":             func(r *secgroup.Record) { r.Name = "a\nb" },
		"space is empty":        func(r *secgroup.Record) { r.StagingSpaces = []string{""} },
		"expected no comma":     func(r *secgroup.Record) { r.RunningSpaces = []string{"a,b"} },
		"policy group is empty": func(r *secgroup.Record) { r.Members = []identity.Group{""} },
	} {
		bad := good
		spoil(&bad)
		if err := bad.Validate(); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%+v: %v, expected %q", bad, err, reason)
		}
	}
}

func TestSumTellsListsApart(t *testing.T) {
	a := secgroup.Record{GUID: "a", Name: "n", Rules: "[]", StagingSpaces: []string{"s", "t"}}
	lists := [][]secgroup.Record{nil, {a}, {a, a}, {{GUID: "a", Name: "n", Rules: "[]", StagingSpaces: []string{"st"}}}, {{GUID: "a", Name: "n", Rules: "[]", RunningSpaces: []string{"s", "t"}}},
		{{GUID: "an", Rules: "[]", StagingSpaces: []string{"s", "t"}}}, {{GUID: "a", Name: "n", Rules: "[]", StagingSpaces: []string{"s"}, RunningSpaces: []string{"t"}}},
		{a, {GUID: "b"}}, {{GUID: "b"}, a}, {{GUID: "a", Name: "n", Rules: "[]", StagingSpaces: []string{"s", "t"}, RunningDefault: true}},
		{{GUID: "a", Name: "n", Rules: "[]", StagingSpaces: []string{"s", "t"}, Members: []identity.Group{"m"}}}}
	seen := map[secgroup.Digest]int{}
	for i, l := range lists {
		if j, ok := seen[secgroup.Sum(l)]; ok {
			t.Errorf("%v and %v have the same digest", lists[j], l)
		}
		seen[secgroup.Sum(l)] = i
	}
}
