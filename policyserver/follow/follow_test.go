package follow_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/policyserver/cc"
	"code.cloudfoundry.org/silk/policyserver/follow"
	"code.cloudfoundry.org/silk/policyserver/outbound"
	"code.cloudfoundry.org/silk/secgroup"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// controller behaves as Cloud Controller does with security groups.
type controller struct {
	*httptest.Server

	mu     sync.Mutex
	groups []map[string]any
	stamp  int
	none   bool // it has no stamp
	size   int  // of pages; 0: as asked
	lists  int  // first pages that were asked for
	answer func(w http.ResponseWriter, r *http.Request) bool
}

func newController(t testing.TB) *controller {
	c := &controller{stamp: 1}
	c.Server = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(c.Close)
	return c
}

// group is one as the v3 API has it.
func group(guid, address string) map[string]any {
	return map[string]any{
		"guid": guid, "name": "name of " + guid, "globally_enabled": map[string]bool{"running": true, "staging": false},
		"rules": []any{map[string]any{"protocol": "all", "destination": address}},
		"relationships": map[string]any{
			"running_spaces": map[string]any{"data": []any{map[string]string{"guid": "s2"}, map[string]string{"guid": "s1"}}}, "staging_spaces": map[string]any{"data": []any{}},
		},
	}
}

// set makes groups those of the controller, whose stamp moves.
func (c *controller) set(groups ...map[string]any) {
	c.with(func() {
		c.groups = groups
		c.stamp++
	})
}

func (c *controller) with(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

func (c *controller) asked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists
}

func (c *controller) serve(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.Header.Get("Authorization") != "bearer t" {
		w.WriteHeader(401)
		return
	}
	if r.URL.Path == "/v3/security_groups" && !r.URL.Query().Has("page") {
		c.lists++
	}
	if c.answer != nil && c.answer(w, r) {
		return
	}
	switch r.URL.Path {
	case "/internal/v4/asg_latest_update":
		if c.none {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintf(w, `{"last_update":"2026-01-01T00:00:00.%09dZ"}`, c.stamp)
	case "/v3/security_groups":
		page, _ := strconv.Atoi(r.URL.Query().Get("page"))
		size, _ := strconv.Atoi(r.URL.Query().Get("per_page"))
		if c.size > 0 {
			size = c.size
		}
		page = max(page, 1)
		first := min((page-1)*size, len(c.groups))
		last := min(first+size, len(c.groups))
		json.NewEncoder(w).Encode(map[string]any{
			"pagination": map[string]any{"total_results": len(c.groups), "total_pages": max(1, (len(c.groups)+size-1)/size)}, "resources": append([]map[string]any{}, c.groups[first:last]...),
		})
	default:
		http.NotFound(w, r)
	}
}

func openStore(t testing.TB, db sqldb.Config) *policysql.SecurityGroups {
	t.Helper()
	s, err := policysql.Open(t.Context(), policysql.Config{DB: db, CloudController: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-done, s.Close()); err != nil {
			t.Error(err)
		}
	})
	return s.SecurityGroups()
}

// quick are options for tests that do not measure.
var quick = follow.Options{Every: 20 * time.Millisecond, MaxWait: 100 * time.Millisecond, Refresh: time.Hour, Settle: time.Hour, Lease: 20 * time.Second}

// run follows until the test ends, or stop is called.
func run(t testing.TB, c *controller, g *policysql.SecurityGroups, o follow.Options) (s *follow.Syncer, stop func()) {
	out := outbound.New(nil, 5*time.Second, "cloud controller")
	client := cc.New(cc.Config{Base: c.URL, Tokens: cc.Tokens{Token: func(context.Context) (string, error) { return "t", nil }, Forget: func(string) {}}}, out)
	s = follow.New(follow.Source{Stamp: client.GroupsStamp, List: client.SecurityGroups}, func() *policysql.SecurityGroups { return g }, o, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("it ended with %v", err)
		}
		out.Close()
	})
	t.Cleanup(stop)
	return s, stop
}

func known(t testing.TB, g *policysql.SecurityGroups) string {
	t.Helper()
	list, err := g.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for _, k := range list {
		rules, _ := secgroup.CloudController.Read([]byte(k.Rules))
		w := k.GUID
		for _, r := range rules {
			w += "=" + r.Destinations[0].String()
		}
		words = append(words, w)
	}
	return strings.Join(words, " ")
}

func eventually(t testing.TB, g *policysql.SecurityGroups, want string) {
	t.Helper()
	got := ""
	testkit.Within(t, time.Minute, func() string { // a lease that could not be given back lasts 20 s
		if got = known(t, g); got != want {
			return fmt.Sprintf("known are %q, expected %q", got, want)
		}
		return ""
	})
}

func TestChangesAreFollowed(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	c.size = 2
	c.set(group("a", "10.0.0.1"), group("b", "10.0.0.2"), group("c", "10.0.0.3"), group("d", "10.0.0.4"), group("e", "10.0.0.5"))
	s, _ := run(t, c, g, quick)
	eventually(t, g, "a=10.0.0.1 b=10.0.0.2 c=10.0.0.3 d=10.0.0.4 e=10.0.0.5")
	list, err := g.List(t.Context())
	if err != nil || !list[0].CloudController || !list[0].RunningDefault || list[0].StagingDefault || !slices.Equal(list[0].RunningSpaces, []string{"s1", "s2"}) || list[0].Name != "name of a" {
		t.Errorf("%+v, %v", list[0], err)
	}
	c.set(group("a", "10.0.0.1"), group("c", "10.0.0.9"), group("f", "10.0.0.6"))
	eventually(t, g, "a=10.0.0.1 c=10.0.0.9 f=10.0.0.6")
	c.set()
	eventually(t, g, "")
	if st := s.Status(); !st.Active || st.Err != nil || time.Since(st.Last) > 10*time.Second || st.Replaced != 3 {
		t.Errorf("status %+v", st)
	}
	before := c.asked()
	testkit.Until(t, 10*time.Second, "it looks on", func() bool { return s.Status().Passes > 50 })
	if n := c.asked(); n != before {
		t.Errorf("%d lists were read though the stamp stayed", n-before)
	}
}

// TestAChangeIsKnownWithinTwoSeconds measures with the options of the product.
func TestAChangeIsKnownWithinTwoSeconds(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	var all []map[string]any
	for i := range 1000 {
		all = append(all, group(fmt.Sprintf("g%03d", i), "10.0.0.1"))
	}
	c.set(all...)
	s, _ := run(t, c, g, follow.Options{})
	testkit.Until(t, 30*time.Second, "all are known", func() bool { return g.Stats().Groups == 1000 && s.Status().Passes > 0 })
	var slowest time.Duration
	for i := range 3 {
		all[7] = group("g007", fmt.Sprintf("10.0.1.%d", i))
		start := time.Now()
		c.set(all...)
		at := g.Stats().Revision
		testkit.Until(t, 20*time.Second, "the change is known", func() bool { return g.Stats().Revision != at })
		slowest = max(slowest, time.Since(start))
	}
	t.Logf("the slowest took %v", slowest)
	if slowest > 10*time.Second { // less than two where nobody else works
		t.Errorf("a change took %v", slowest)
	}
}

// TestNothingIsReplacedByAListInDoubt has Cloud Controller answer in every wrong way; what is known stays, and the right answer is taken
// when it comes.
func TestNothingIsReplacedByAListInDoubt(t *testing.T) {
	for name, answer := range map[string]func(c *controller, w http.ResponseWriter, r *http.Request) bool{
		"500": status(500), "429": status(429), "403": status(403), "401": status(401), "404": func(_ *controller, w http.ResponseWriter, r *http.Request) bool {
			return strings.HasPrefix(r.URL.Path, "/v3/") && status(404)(nil, w, r)
		},
		"no list":         body(`{}`),
		"null":            body(`{"pagination":{"total_results":0,"total_pages":1},"resources":null}`),
		"short":           body(`{"pagination":{"total_results":3,"total_pages":1},"resources":[{"guid":"a","rules":[]}]}`),
		"no total":        body(`{"pagination":{"total_pages":1},"resources":[]}`),
		"twice":           body(`{"pagination":{"total_results":2,"total_pages":1},"resources":[{"guid":"a","rules":[]},{"guid":"a","rules":[]}]}`),
		"without guid":    body(`{"pagination":{"total_results":1,"total_pages":1},"resources":[{"name":"a","rules":[]}]}`),
		"torn":            body(`{"pagination":{"total_results":1,"total_pages":1},"resources":[{"guid":`),
		"html":            body(`<html>`),
		"a strange stamp": stamped(`{"last_update":"yesterday"}`),
		"no stamp in it":  stamped(`{}`),
		"a change meanwhile": func(c *controller, _ http.ResponseWriter, r *http.Request) bool {
			c.stamp += len(r.URL.Path) % 2
			return false
		},
		"cut off": func(_ *controller, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", "1000")
			w.Write([]byte(`{"pagination":`))
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
			c.set(group("a", "10.0.0.1"), group("b", "10.0.0.2"))
			s, _ := run(t, c, g, quick)
			eventually(t, g, "a=10.0.0.1 b=10.0.0.2")
			c.with(func() {
				c.answer = func(w http.ResponseWriter, r *http.Request) bool { return answer(c, w, r) }
				c.groups = c.groups[:1]
				c.stamp++
			})
			failed := s.Status().Failed
			testkit.Until(t, 20*time.Second, "it fails and tries again", func() bool { return s.Status().Failed >= failed+2 })
			if got := known(t, g); got != "a=10.0.0.1 b=10.0.0.2" || s.Status().Err == nil {
				t.Errorf("known are %q, error %v", got, s.Status().Err)
			}
			c.with(func() { c.answer = nil })
			eventually(t, g, "a=10.0.0.1")
		})
	}
}

func status(code int) func(*controller, http.ResponseWriter, *http.Request) bool {
	return func(_ *controller, w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(code)
		return true
	}
}

// body answers for lists.
func body(text string) func(*controller, http.ResponseWriter, *http.Request) bool {
	return func(_ *controller, w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/v3/") {
			return false
		}
		w.Write([]byte(text))
		return true
	}
}

func stamped(text string) func(*controller, http.ResponseWriter, *http.Request) bool {
	return func(_ *controller, w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v3/") {
			return false
		}
		w.Write([]byte(text))
		return true
	}
}

// TestAGroupThatCannotBeReadHarmsNoOther holds that it stays as it was, that a rule that is none is left out, and that one which cannot be
// enforced is passed on as it is.
func TestAGroupThatCannotBeReadHarmsNoOther(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	c.set(group("a", "10.0.0.1"), group("b", "10.0.0.2"))
	s, _ := run(t, c, g, quick)
	eventually(t, g, "a=10.0.0.1 b=10.0.0.2")
	bad, odd, rules := group("a", "10.0.0.9"), group("b", "10.0.0.3"), group("c", "10.0.0.4")
	bad["relationships"] = map[string]any{"running_spaces": map[string]any{"data": []any{map[string]string{}}}}
	odd["name"] = "a\nb" + strings.Repeat("x", 300)
	rules["rules"] = []any{map[string]any{"protocol": "all", "destination": "::/0"}, map[string]any{"ports": 7}, map[string]any{"protocol": "all", "destination": "10.0.0.5"}}
	c.set(bad, odd, rules)
	eventually(t, g, "a=10.0.0.1 b=10.0.0.3 c=10.0.0.5")
	list, err := g.List(t.Context())
	if err != nil || len(list[1].Name) != 255 || strings.Contains(list[1].Name, "\n") || !strings.Contains(list[2].Rules, "::/0") || strings.Count(list[2].Rules, "protocol") != 2 {
		t.Errorf("%+v, %v", list, err)
	}
	if n := s.Status().Unread; n != 3 { // the group, and two rules
		t.Errorf("%d are unread, expected 3", n)
	}
}

// TestWithoutAStamp follows a Cloud Controller that does not say when groups changed.
func TestWithoutAStamp(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	c.none = true
	c.set(group("a", "10.0.0.1"))
	o := quick
	o.Blind = 50 * time.Millisecond
	run(t, c, g, o)
	eventually(t, g, "a=10.0.0.1")
	c.with(func() { c.groups = []map[string]any{group("b", "10.0.0.2")} })
	eventually(t, g, "b=10.0.0.2")
}

// TestRefresh holds that what the stamp does not tell is found out in time.
func TestRefresh(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	c.set(group("a", "10.0.0.1"))
	o := quick
	o.Refresh = 200 * time.Millisecond
	run(t, c, g, o)
	eventually(t, g, "a=10.0.0.1")
	c.with(func() { c.groups = []map[string]any{group("a", "10.0.0.2")} })
	eventually(t, g, "a=10.0.0.2")
}

// TestOneOfSeveralFollows has two servers share a database: one follows, and when it ends the other one does.
func TestOneOfSeveralFollows(t *testing.T) {
	for _, engine := range testkit.Engines {
		t.Run(engine, func(t *testing.T) {
			db, c := testkit.Database(t, engine), newController(t)
			c.set(group("a", "10.0.0.1"))
			one, stop := run(t, c, openStore(t, db), quick)
			testkit.Until(t, 20*time.Second, "one follows", func() bool { return one.Status().Active })
			g := openStore(t, db)
			other, _ := run(t, c, g, quick)
			eventually(t, g, "a=10.0.0.1")
			testkit.Until(t, 20*time.Second, "one follows still", func() bool { return one.Status().Active }) // a database that is busy makes it try again
			if other.Status().Active {
				t.Errorf("one %+v, other %+v", one.Status(), other.Status())
			}
			stop()
			c.set(group("b", "10.0.0.2"))
			eventually(t, g, "b=10.0.0.2")
			testkit.Until(t, 20*time.Second, "the other one follows", func() bool { return other.Status().Active })
		})
	}
}

// TestOwnGroupsStay holds that what people made is nothing of Cloud Controller's.
func TestOwnGroupsStay(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	if _, err := g.Create(t.Context(), secgroup.Record{GUID: "own", Name: "own", Rules: policytest.RulesTo("10.9.9.9")}); err != nil {
		t.Fatal(err)
	}
	c.set(group("a", "10.0.0.1"))
	run(t, c, g, quick)
	eventually(t, g, "own=10.9.9.9 a=10.0.0.1")
	c.set()
	eventually(t, g, "own=10.9.9.9")
}

// TestMuchIsRemovedLate has Cloud Controller show few of its groups, as it does to a client that has lost an authority: others are added
// and changed at once, but what is missing stays until it has been missing for a while.
func TestMuchIsRemovedLate(t *testing.T) {
	c, g := newController(t), openStore(t, testkit.Database(t, sqldb.SQLite))
	var all []map[string]any
	for i := range 9 {
		all = append(all, group(fmt.Sprintf("g%d", i), "10.0.0.1"))
	}
	c.set(all...)
	o := quick
	o.Refresh, o.Brake = 50*time.Millisecond, 2*time.Second
	s, _ := run(t, c, g, o)
	testkit.Until(t, 20*time.Second, "all are known", func() bool { return g.Stats().Groups == 9 })
	start := time.Now()
	c.set(append([]map[string]any{group("new", "10.0.0.2")}, all[:6]...)...)
	testkit.Until(t, 20*time.Second, "the new one is known", func() bool { return g.Stats().Groups == 10 })
	testkit.Until(t, 20*time.Second, "three groups are held, or it is too late to see that", func() bool { return s.Status().Held == 3 || time.Since(start) > o.Brake })
	testkit.Until(t, 20*time.Second, "the missing ones go", func() bool { return g.Stats().Groups == 7 })
	if took := time.Since(start); took < o.Brake {
		t.Errorf("they went after %v, expected not before %v", took, o.Brake)
	}
	c.set(all[:5]...) // two of seven, and there are no more than eight
	testkit.Until(t, 20*time.Second, "a few go at once", func() bool { return g.Stats().Groups == 5 })
	testkit.Until(t, 20*time.Second, "no group is held", func() bool { return s.Status().Held == 0 })
}
