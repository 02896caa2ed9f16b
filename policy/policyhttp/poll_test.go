package policyhttp_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// TestClientPollsAServerWithoutTheWatch: a server of the deployed kind, which later learns the watch.
func TestClientPollsAServerWithoutTheWatch(t *testing.T) {
	store := openStore(t, 0)
	b := backendOf(store)
	internal := policyhttp.InternalHandler(b, discard, policyhttp.InternalOptions{})
	var learned atomic.Bool
	var lists atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == policyhttp.PathPolicies {
			lists.Add(1)
		}
		if r.URL.Path == policyhttp.PathWatch && !learned.Load() {
			http.NotFound(w, r)
			return
		}
		internal.ServeHTTP(w, r)
	}))
	defer s.Close()
	c := policyhttp.NewClient([]string{s.URL}, nil, policyhttp.ClientOptions{Wait: time.Second, Poll: 10 * time.Millisecond, Again: 300 * time.Millisecond})
	defer c.Close()
	create := func(text string) {
		t.Helper()
		if err := store.Create(t.Context(), []policy.Policy{policytest.Of(t, text)}); err != nil {
			t.Fatal(err)
		}
	}
	create("a b tcp 1")
	create("x y tcp 1")
	follow := policy.Ask{Host: "h", Groups: []identity.Group{"a", "b"}}
	watch := func() policy.Update {
		t.Helper()
		u, err := c.Watch(t.Context(), follow)
		if err != nil {
			t.Fatal(err)
		}
		follow.Since = u.Revision
		return u
	}
	u := watch()
	if rules, err := u.Apply(nil); err != nil || !u.Full || len(rules) != 1 || u.Revision.Epoch != policyhttp.Polled || rules[0].SourceTag != 1 {
		t.Fatalf("first: %+v, %v, want the one policy in full", u, err)
	}
	before := lists.Load()
	if u := watch(); u.Changes() || u.Count != 1 || lists.Load() != before {
		t.Errorf("without news: %+v after %d lists, want no change and no list", u, lists.Load()-before)
	}
	create("b a udp 5-6")
	if u := watch(); !u.Full || u.Count != 2 {
		t.Errorf("after a change: %+v, want two policies", u)
	}
	learned.Store(true)
	policytest.Eventually(t, "the client watches again", func() bool { return watch().Revision.Epoch != policyhttp.Polled })
	create("b b tcp 7")
	if u := watch(); u.Full || len(u.Set) != 1 || u.Count != 3 {
		t.Errorf("after a change, watching: %+v, want the one that is new", u)
	}
	learned.Store(false) // and back: an upgrade is undone
	if u := watch(); !u.Full || u.Count != 3 || u.Revision.Epoch != policyhttp.Polled {
		t.Errorf("without the watch again: %+v, want all in full", u)
	}
	follow.Groups = nil
	follow.Since = u.Revision
	if u := watch(); !u.Full || u.Count != 0 {
		t.Errorf("host without groups: %+v, want nothing in full", u)
	}
}

// answering is a server that gives one answer to everything.
func answering(t *testing.T, code int, body string) *policyhttp.Client {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == policyhttp.PathWatch && code == 404:
			http.NotFound(w, r)
		case r.URL.Path == policyhttp.PathLastUpdated:
			w.Write([]byte("17"))
		default:
			if code != 404 {
				w.WriteHeader(code)
			}
			w.Write([]byte(body))
		}
	}))
	t.Cleanup(s.Close)
	c := policyhttp.NewClient([]string{s.URL}, nil, policyhttp.ClientOptions{})
	t.Cleanup(c.Close)
	return c
}

func TestBadRulesAreLeftOutAndNamed(t *testing.T) {
	good := `{"source":{"id":"a","tag":"0001"},"destination":{"id":"b","tag":"02","protocol":"tcp","ports":{"start":1,"end":1}}}`
	bad := []string{
		`7`, `{}`, strings.Replace(good, "0001", "", 1), strings.Replace(good, "0001", "11170", 1), strings.Replace(good, "tcp", "icmp", 1),
		strings.Replace(good, `"start":1`, `"start":9`, 1), strings.Replace(good, `"id":"a"`, `"id":""`, 1), strings.Replace(good, `"id":"a"`, `"id":"a\u0000"`, 1),
	}
	items := strings.Join(append(bad, good), ",")
	for name, c := range map[string]*policyhttp.Client{
		"watch":   answering(t, 200, `{"revision":"e.1","full":true,"set":[`+items+`],"gone":[],"count":9,"sum":"0000000000000000"}`),
		"polling": answering(t, 404, `{"total_policies":9,"policies":[`+items+`]}`),
	} {
		u, err := c.Watch(t.Context(), policy.Ask{Host: "h", Groups: []identity.Group{"a"}})
		p, ok := errors.AsType[*policyhttp.Partial](err)
		if !ok || len(p.Skipped) != len(bad) || !strings.Contains(err.Error(), "8 policies") {
			t.Errorf("%s: %v, want %d left out", name, err, len(bad))
		}
		if rules, err := u.Apply(nil); err != nil || len(rules) != 1 || rules[0].DestinationTag != 2 {
			t.Errorf("%s: %v, %v, want the good one", name, rules, err)
		}
	}
}

func TestAnswersThatAreNoneChangeNothing(t *testing.T) {
	for _, code := range []int{200, 404} {
		for _, text := range []string{
			``, `[]`, `{}`, `null`, `"x"`, `{"policies":null}`, `{"total_policies":2,"policies":[]}`, `{"revision":"","full":true,"set":[],"count":0,"sum":"0000000000000000"}`,
			`{"revision":"e.1","full":true,"set":[],"count":1,"sum":"0000000000000000"}`, `{"revision":"e.1","full":true,"set":[],"count":0,"sum":"x"}`, `{"revision":"e.1"`,
		} {
			if u, err := answering(t, code, text).Watch(t.Context(), policy.Ask{Host: "h", Groups: []identity.Group{"a"}}); err == nil || u.Changes() {
				t.Errorf("%d %s: %+v, %v, want an error", code, text, u, err)
			}
		}
	}
	for _, code := range []int{301, 400, 403, 500, 503} {
		if u, err := answering(t, code, `{"error":"x"}`).Watch(t.Context(), policy.Ask{Host: "h"}); err == nil || u.Changes() {
			t.Errorf("%d: %+v, %v, want an error", code, u, err)
		}
	}
}
