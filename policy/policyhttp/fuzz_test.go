package policyhttp

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

const fuzzItem = `{"source":{"id":"a","tag":"0001"},"destination":{"id":"b","tag":"0002","protocol":"tcp","ports":{"start":1,"end":2},"port":3}}`

func FuzzBodies(f *testing.F) {
	f.Add([]byte(`{"policies":[` + fuzzItem + `]}`))
	f.Add([]byte(`{"policies":[{"source":{"id":"a"},"destination":{"id":"b","protocol":"udp","ports":{"start":1,"end":65535},"port":65535}}]}`))
	f.Add([]byte(`{"Policies":null,"policies":[null,7]}`))
	f.Add([]byte(`{"policies":[{"source":{"id":"a"},"destination":{"id":"b","protocol":"tcp","port":7,"ports":{"start":1,"end":2}}}],"policies":[]}`))
	f.Add([]byte(` { "policies" : [ {"destination":{"ports":{"end":2,"start":1,"start":2},"protocol":"tcp","id":"b"},"source":{"ID":"c","id":"a"}} ] } `))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []version{v0, v1} {
			ps, err := decodePolicies(b, v)
			if slow, serr := decodeAny(b, v); !slices.Equal(ps, slow) || (err == nil) != (serr == nil) || err != nil && err.Error() != serr.Error() {
				t.Fatalf("%s: %v, %v; by encoding/json %v, %v", v, ps, err, slow, serr)
			}
			if (err == nil) == (len(ps) == 0) {
				t.Fatalf("%s: %v, %v", v, ps, err)
			}
			for _, p := range ps {
				if p.Validate() != nil {
					t.Fatalf("%s: took %v", v, p)
				}
			}
			if err != nil {
				continue
			}
			again, err := decodePolicies(encodePolicies(ps), v1)
			if err != nil || len(again) != len(ps) {
				t.Fatalf("written and read: %v, %v, want %v", again, err, ps)
			}
		}
	})
}

// TestPlainBodies: what clients send is read without encoding/json, and what is odd in any way is not.
func TestPlainBodies(t *testing.T) {
	const a, b = `{"policies":[{"source":{"id":"a"},"destination":{"id":"b","protocol":"tcp",`, `}}]}`
	for _, body := range []string{a + `"ports":{"start":1,"end":2}` + b, a + ` "ports" : { "end" : 2 , "start" : 1 } ` + b + "\n"} {
		if ps, ok := plainPolicies([]byte(body), v1); !ok || len(ps) != 1 || ps[0].String() != "a -> b tcp 1-2" {
			t.Errorf("%s: %v, %v", body, ps, ok)
		}
	}
	if ps, ok := plainPolicies([]byte(a+`"port":7`+b), v0); !ok || len(ps) != 1 || ps[0].String() != "a -> b tcp 7" {
		t.Errorf("v0: %v, %v", ps, ok)
	}
	for _, body := range []string{
		``, `{}`, `[]`, `{"policies":[]}`, `{"policies":null}`, `{"policies":[null]}`, a + `"ports":{"start":1,"end":2}` + b + "}", a + `"ports":{"start":2,"end":1}` + b,
		a + `"ports":{"start":1,"end":2},"id":"c"` + b, a + `"ports":{"start":1,"end":2},"ID":"c"` + b, a + `"ports":{"start":1,"end":2},"tag":""` + b,
		a + `"ports":{"start":1,"end":2,"end":3}` + b, a + `"ports":{"start":1.0,"end":2}` + b, a + `"port":7` + b,
	} {
		if ps, ok := plainPolicies([]byte(body), v1); ok {
			t.Errorf("%s was read as %v", body, ps)
		}
	}
}

func FuzzWatch(f *testing.F) {
	f.Add([]byte(`{"host":"h","set":"` + setOf([]identity.Group{"a"}).String() + `","groups":["a"],"since":"e.1","in_force":"e.1","wait":60}`))
	f.Add([]byte(`{"host":"h","set":"` + setOf(nil).String() + `","wait":-1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, id, wait, err := decodeWatch(b)
		if err != nil {
			return
		}
		if a.Host == "" || wait < 0 || wait > MaxWait || a.Groups != nil && setOf(a.Groups) != id {
			t.Fatalf("took %+v %v %v", a, id, wait)
		}
	})
}

func FuzzUpdate(f *testing.F) {
	f.Add([]byte(`{"revision":"e.1","full":true,"set":[` + fuzzItem + `],"gone":[],"count":1,"sum":"0123456789abcdef"}`))
	f.Add([]byte(`{"revision":"e.1","full":true,"set":[7],"gone":[` + fuzzItem + `],"count":1,"sum":"0123456789abcdef"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := decodeUpdate(b)
		p, ok := errors.AsType[*Partial](err)
		if err != nil && !ok {
			return
		}
		if ok && (len(p.Skipped) == 0 || p.Error() == "") {
			t.Fatal("nothing was left out")
		}
		if ok && u.Full {
			if _, err := u.Apply(nil); err != nil {
				t.Fatalf("what is left cannot be applied: %v", err)
			}
		}
		for _, r := range u.Set {
			if r.Validate() != nil || r.SourceTag == 0 || r.DestinationTag == 0 {
				t.Fatalf("took %+v", r)
			}
		}
		again, err := decodeUpdate(shape{version: v1, tags: 2}.encodeUpdate(policy.Update{Revision: u.Revision, Set: u.Set, Gone: u.Gone, Count: u.Count, Sum: u.Sum}))
		if err != nil || len(again.Set) != len(u.Set) || len(again.Gone) != len(u.Gone) {
			t.Fatalf("written and read: %+v, %v, want %+v", again, err, u)
		}
	})
}

func FuzzList(f *testing.F) {
	f.Add([]byte(`{"total_policies":1,"policies":[` + fuzzItem + `]}`))
	f.Add([]byte(`{"policies":[{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, tags := range []bool{true, false} {
			rules, err := decodeList(b, tags)
			if _, ok := errors.AsType[*Partial](err); err != nil && !ok && rules != nil {
				t.Fatal("policies beside an error")
			}
			for _, r := range rules {
				if r.Validate() != nil || tags && r.SourceTag == 0 {
					t.Fatalf("took %+v", r)
				}
			}
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("id=a,b&source_id=&dest_id=%2C")
	f.Add("id=a;b")
	f.Fuzz(func(t *testing.T, q string) {
		got, err := filterOf(q)
		if err == nil && strings.Contains("&"+q, "&id=") && got.Either == nil {
			t.Fatalf("%q selects everything", q)
		}
	})
}

func FuzzString(f *testing.F) {
	f.Add("a<b>&\"\\\u2028\xff")
	f.Fuzz(func(t *testing.T, s string) {
		want, err := json.Marshal(s)
		if got := appendString(nil, s); err != nil || string(got) != string(want) {
			t.Fatalf("%q is written %s, want %s", s, got, want)
		}
	})
}

func TestTagsAreWrittenAsIdentityDoes(t *testing.T) {
	for length := 1; length <= 3; length++ {
		for n := range 1 << 16 {
			if got, want := string(appendTag(nil, identity.Tag(n), length)), identity.Tag(n).Text(length); got != want {
				t.Fatalf("tag %d of length %d is %q, want %q", n, length, got, want)
			}
		}
	}
}

// FuzzGroups holds that only an answer that adds up is read, that it is written and read again as the same, and that hostile bodies are refused or mean something.
func FuzzGroups(f *testing.F) {
	list := []secgroup.Record{{GUID: "g", Name: "n", Rules: `[{"protocol":"all"}]`, StagingSpaces: []string{"s"}, Members: []identity.Group{"web"}}}
	f.Add(encodeGroups(secgroup.Update{Revision: revision.Revision{Epoch: "e", Counter: 1}, Full: true, Groups: list, Count: 1, Sum: secgroup.Sum(list)}))
	f.Add(encodeGroups(secgroup.Update{Revision: revision.Revision{Epoch: "e", Counter: 1}, Count: 1, Sum: secgroup.Sum(list)}))
	f.Add([]byte(`{"host":"h","spaces":["a","b"],"policy_groups":["c"],"since":"e.1","sum":"0123456789abcdef","wait":5}`))
	f.Add([]byte(`[{"protocol":"tcp","destination":"10.0.0.0/8","ports":"1"}]`))
	f.Add([]byte(`[{"protocol":"tcp","destinations":["10.0.0.0/8"],"ports":["1"]}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if u, err := decodeGroups(b); err == nil {
			again, err := decodeGroups(encodeGroups(u))
			if err != nil || again.Sum != u.Sum || !slices.EqualFunc(again.Groups, u.Groups, secgroup.Record.Equal) {
				t.Fatalf("%+v, written and read again %+v, %v", u, again, err)
			}
		}
		var w wireGroupWatch
		if json.Unmarshal(b, &w) == nil {
			if a, err := w.ask(); err == nil && (a.Host == "" || !slices.IsSorted(a.Spaces) || !slices.IsSorted(a.Members)) {
				t.Fatalf("asks %+v", a)
			}
		}
		if text, err := rulesText(b); err == nil {
			if _, problems := secgroup.CloudController.Read([]byte(text)); len(problems) > 0 {
				t.Fatalf("took %s, of which %v", text, problems)
			}
		}
	})
}
