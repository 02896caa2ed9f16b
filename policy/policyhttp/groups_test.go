package policyhttp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/secgroup"
)

const securityGroups = "/networking/v1/internal/security_groups"

// hold puts groups into a store as if they followed Cloud Controller.
func hold(t testing.TB, s *policysql.Store, list ...secgroup.Record) {
	t.Helper()
	g := s.SecurityGroups()
	if ok, err := g.Hold(t.Context(), "test", time.Minute); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if _, err := g.Replace(t.Context(), policysql.Replacement{Groups: list, Stamp: "1", Holder: "test"}); err != nil {
		t.Fatal(err)
	}
}

// TestSecurityGroupsAreSpelledAsDeployed holds the very bytes of the internal API, and that deployed agents can read the text of the rules,
// which they unquote as Go does.
func TestSecurityGroupsAreSpelledAsDeployed(t *testing.T) {
	a := start(t)
	rules := `[{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443","type":0,"code":0,"description":"\"</é>\" \\ ` + "\U0001f600" + `\u2028\u0001","log":true}]`
	hold(t, a.store,
		secgroup.Record{GUID: "g1", Name: "all of staging", Rules: rules, StagingDefault: true},
		secgroup.Record{GUID: "g2", Name: "s1 & s2", Rules: "[]", StagingSpaces: []string{"s1"}, RunningSpaces: []string{"s1", "s2"}, Members: nil},
		secgroup.Record{GUID: "g3", Name: "s3", Rules: "[]", RunningSpaces: []string{"s3"}},
	)
	got := ask(t, a.Server, "", "GET "+securityGroups+"?space_guids=s2,none&per_page=5000", "")
	start := `{"next":0,"security_groups":[{"guid":"g1","name":"all of staging","rules":`
	end := `,"staging_default":true,"running_default":false,"staging_space_guids":[],"running_space_guids":[]},` +
		`{"guid":"g2","name":"s1 \u0026 s2","rules":"[]","staging_default":false,"running_default":false,"staging_space_guids":["s1"],"running_space_guids":["s1","s2"]}]}`
	if got.code != 200 || !strings.HasPrefix(got.body, start) || !strings.HasSuffix(got.body, end) {
		t.Fatalf("answer %d %s\nexpected %s...%s", got.code, got.body, start, end)
	}
	quoted := got.body[len(start) : len(got.body)-len(end)]
	text, err := strconv.Unquote(quoted)
	if err != nil || text != rules {
		t.Errorf("go unquotes %s to %s, %v; expected %s", quoted, text, err, rules)
	}
	var fromJSON string
	if err := json.Unmarshal([]byte(quoted), &fromJSON); err != nil || fromJSON != rules {
		t.Errorf("json reads %s, %v", fromJSON, err)
	}
	if rev := got.header.Get("X-Silk-Revision"); rev != a.store.SecurityGroups().Stats().Revision.String() {
		t.Errorf("a page of revision %q", rev)
	}
	for query, want := range map[string]string{"": "g1", "?space_guids=": "g1", "?space_guids=s3": "g1 g3", "?space_guids=s1&from=2": "g2", "?per_page=x&limit=0": "g1"} {
		if got := guidsIn(ask(t, a.Server, "", "GET /networking/any/internal/security_groups"+query, "").body); got != want {
			t.Errorf("%q: %s, expected %s", query, got, want)
		}
	}
	for _, query := range []string{"?from=-1", "?limit=-5", "?from=1.5", "?limit=x"} {
		if got := ask(t, a.Server, "", "GET "+securityGroups+query, ""); got.code != 500 || !strings.Contains(got.body, "invalid value for '") {
			t.Errorf("%s: %d %s", query, got.code, got.body)
		}
	}
}

func guidsIn(body string) string {
	var all []string
	for _, m := range regexp.MustCompile(`"guid":"([^"]*)"`).FindAllStringSubmatch(body, -1) {
		all = append(all, m[1])
	}
	return strings.Join(all, " ")
}

// TestPagesAreNeverTorn reads page by page as a deployed agent does, while groups go.
func TestPagesAreNeverTorn(t *testing.T) {
	a := start(t)
	var list []secgroup.Record
	for i := range 7 {
		list = append(list, secgroup.Record{GUID: fmt.Sprintf("g%d", i), Name: "n", Rules: "[]", RunningDefault: true})
	}
	hold(t, a.store, list...)
	for _, size := range []string{"limit=3", "per_page=2", "limit=1&per_page=5000"} {
		var all []string
		for from := int64(0); ; {
			got := ask(t, a.Server, "", "GET "+securityGroups+"?"+size+"&from="+strconv.FormatInt(from, 10), "")
			var page struct{ Next int64 }
			if err := json.Unmarshal([]byte(got.body), &page); err != nil || got.code != 200 {
				t.Fatalf("%d %s, %v", got.code, got.body, err)
			}
			all = append(all, guidsIn(got.body))
			hold(t, a.store, list[1:]...)
			if from = page.Next; from == 0 {
				break
			}
		}
		if got := strings.Join(all, " "); got != "g0 g1 g2 g3 g4 g5 g6" {
			t.Errorf("%s: %s", size, got)
		}
		hold(t, a.store)
		hold(t, a.store, list...)
	}
}

func TestWatchOfSecurityGroupsRefuses(t *testing.T) {
	s := start(t).Server
	for body, part := range map[string]string{
		`{`:                                           "body is not",
		`{}`:                                          "host",
		`{"host":"a\n"}`:                              "host",
		`{"host":"a","spaces":["b","a"]}`:             "not sorted",
		`{"host":"a","policy_groups":["a","a"]}`:      "not sorted",
		`{"host":"a","since":"e.1"}`:                  "digest",
		`{"host":"a","since":"e.1","sum":"xyz"}`:      "digest",
		`{"host":"a","since":"nonsense"}`:             "revision",
		`{"host":"a","wait":-1}`:                      "wait",
		`{"host":"a","spaces":[` + many(20001) + `]}`: "at most 20000",
	} {
		if got := ask(t, s, "", "POST "+securityGroups+"/watch", body); got.code != 400 || !strings.Contains(got.body, part) {
			t.Errorf("%.60s: %d %.200s, expected 400 with %q", body, got.code, got.body, part)
		}
	}
	if got := ask(t, s, "", "POST /networking/v2/internal/security_groups/watch", "{}"); got.code != 404 {
		t.Errorf("another version: %d", got.code)
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,"s%06d"`, i)
	}
	return b.String()[1:]
}

// deployed hides the watch, and lets through a number of groups of a list only.
func deployed(t *testing.T, a *api, spoil func(w http.ResponseWriter, r *http.Request) bool) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/watch") {
			http.NotFound(w, r)
			return
		}
		if spoil == nil || !spoil(w, r) {
			a.Config.Handler.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// TestPollingAServerWithoutAWatch follows a server of the deployed kind.
func TestPollingAServerWithoutAWatch(t *testing.T) {
	a := start(t)
	var asked atomic.Value
	s := deployed(t, a, func(_ http.ResponseWriter, r *http.Request) bool {
		asked.Store(r.URL.RawQuery)
		return false
	})
	c := policyhttp.NewClient([]string{s.URL}, nil, policyhttp.ClientOptions{Timeout: 5 * time.Second, Wait: time.Second, PollGroups: 50 * time.Millisecond})
	t.Cleanup(c.Close)
	g := c.SecurityGroups()
	hold(t, a.store, secgroup.Record{GUID: "g1", Name: "a", Rules: policytest.RulesTo("10.0.0.1"), RunningSpaces: []string{"s1"}})
	ask := secgroup.Ask{Host: "h", Spaces: []string{"s1", "s2"}, Members: []identity.Group{"web"}}
	u, err := g.Watch(t.Context(), ask)
	if err != nil || !u.Full || len(u.Groups) != 1 || u.Groups[0].GUID != "g1" || u.Revision.Epoch != policyhttp.Polled {
		t.Fatalf("first: %+v, %v", u, err)
	}
	if q := asked.Load(); q != "per_page=5000&space_guids=s1%2Cs2" {
		t.Errorf("asked for %v", q)
	}
	held := u.Groups
	ask.Since, ask.Sum = u.Revision, u.Sum
	u, err = g.Watch(t.Context(), ask)
	if err != nil || u.Full {
		t.Fatalf("nothing is new: %+v, %v", u, err)
	}
	if _, err := u.Apply(held); err != nil {
		t.Error(err)
	}
	hold(t, a.store, secgroup.Record{GUID: "g1", Name: "a", Rules: policytest.RulesTo("10.0.0.2"), RunningSpaces: []string{"s1"}})
	testkit.Until(t, 10*time.Second, "the change is told", func() bool {
		u, err = g.Watch(t.Context(), ask)
		return err == nil && u.Full && u.Groups[0].Rules == policytest.RulesTo("10.0.0.2")
	})
}

// TestBadAnswersAreNoLists holds that an answer that may lack something is an error, whatever the server.
func TestBadAnswersAreNoLists(t *testing.T) {
	for _, body := range []string{``, `{}`, `null`, `[]`, `{"next":0}`, `{"next":0,"security_groups":null}`, `{"security_groups":[]}`, `{"next":0,"security_groups":[{}]}`,
		`{"next":0,"security_groups":[{"guid":"a"},{"guid":"a"}]}`, `{"next":5,"security_groups":[{"guid":"a"}]}`, `{"next":0,"security_groups":[`} {
		a := &api{Server: httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(body)) }))}
		t.Cleanup(a.Close)
		if u, err := client(t, deployed(t, a, nil).URL).SecurityGroups().Watch(t.Context(), secgroup.Ask{Host: "h"}); err == nil {
			t.Errorf("polled %s: %+v", body, u)
		}
	}
	sum := secgroup.Sum(nil).String()
	for _, body := range []string{`{}`, `null`, `{"revision":"e.1","full":true,"count":0,"sum":"` + sum + `"}`, `{"revision":"e.1","full":true,"security_groups":[],"count":1,"sum":"` + sum + `"}`,
		`{"revision":"e.1","full":true,"security_groups":[],"count":0,"sum":"0000000000000000"}`, `{"revision":"","full":true,"security_groups":[],"count":0,"sum":"` + sum + `"}`,
		`{"revision":"e.1","security_groups":[],"count":0,"sum":"` + sum + `"}`, `{"revision":"e.1","full":true,"security_groups":[{"guid":"a"}],"count":1,"sum":"` + sum + `"}`,
		`{"revision":"e.1","full":false,"security_groups":[],"count":0,"sum":"` + sum + `"}`} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(body)) }))
		t.Cleanup(s.Close)
		if u, err := client(t, s.URL).SecurityGroups().Watch(t.Context(), secgroup.Ask{Host: "h", Sum: 7}); err == nil {
			t.Errorf("watched %s: %+v", body, u)
		}
	}
}

// TestOnlyAdminsChangeSecurityGroups asks for each route as others.
func TestOnlyAdminsChangeSecurityGroups(t *testing.T) {
	s := start(t).Server
	const path = "/networking/v1/external/security_groups"
	for _, line := range []string{"GET " + path, "POST " + path, "GET " + path + "/x", "PATCH " + path + "/x", "DELETE " + path + "/x"} {
		for as, code := range map[string]int{"": 401, "dev": 403, "none": 403} {
			if got := ask(t, s, as, line, "{}"); got.code != code {
				t.Errorf("%s as %q: %d %s, expected %d", line, as, got.code, got.body, code)
			}
		}
	}
	for line, code := range map[string]int{"PUT " + path: 405, "PUT " + path + "/x": 405, "GET " + path + "/": 404, "GET " + path + "/x/y": 404, "GET " + path + "/x": 404, "DELETE " + path + "/x": 404} {
		if got := ask(t, s, "admin", line, ""); got.code != code {
			t.Errorf("%s: %d %s, expected %d", line, got.code, got.body, code)
		}
	}
	for body, part := range map[string]string{`{"nam":"a"}`: "nam", `{"name":"a"} x`: "follows", `{"name":"a"}`: "nothing is there", `{"name":"a","rules":[{"protocol":"tcp","destinations":["10.0.0.0/8"]}]}`: "ports are missing",
		`{"name":"a","rules":[{"protocol":"tcp","destination":"10.0.0.1/8","ports":"1"}]}`: "write 10.0.0.0/8"} {
		if got := ask(t, s, "admin", "POST "+path, body); got.code != 400 || !strings.Contains(got.body, part) {
			t.Errorf("%s: %d %s, expected 400 with %q", body, got.code, got.body, part)
		}
	}
}

// TestAnAbsentDatabaseIsAnError holds that no list is made up when the store cannot tell.
func TestAnAbsentDatabaseIsAnError(t *testing.T) {
	b := backendOf(openStore(t, 0))
	b.GroupPage = func(context.Context, []string, int64, int) (policyhttp.GroupPage, error) {
		return policyhttp.GroupPage{}, fault.Unavailablef("the database is away")
	}
	s := serve(t, b, externalOptions(), policyhttp.InternalOptions{})
	want(t, "a page", ask(t, s, "", "GET "+securityGroups, ""), 500, `{"error": "database read failed"}`)
	if _, err := client(t, deployed(t, &api{Server: s}, nil).URL).SecurityGroups().Watch(t.Context(), secgroup.Ask{Host: "h"}); !errors.Is(err, fault.Internal) {
		t.Errorf("watch: %v", err)
	}
}
