package cc_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policyserver/cc"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

// controller behaves as Cloud Controller does.
type controller struct {
	*httptest.Server

	mu         sync.Mutex
	apps       map[string]string          // guid -> space
	developers map[string]map[string]bool // user -> spaces
	noRoles    bool                       // it has no v3 roles
	page       int                        // at most so many resources on one page; 0: as asked
	answer     func(w http.ResponseWriter, r *http.Request) bool
	token      string // that it accepts; "" for any
	asked      []string
}

func newController(t testing.TB) *controller {
	c := &controller{apps: map[string]string{}, developers: map[string]map[string]bool{}}
	c.Server = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(c.Close)
	return c
}

// answering makes the controller answer otherwise.
func (c *controller) answering(f func(w http.ResponseWriter, r *http.Request) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = f
}

func (c *controller) serve(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, r.URL.RequestURI())
	if c.answer != nil && c.answer(w, r) {
		return
	}
	if c.token != "" && r.Header.Get("Authorization") != "bearer "+c.token {
		w.WriteHeader(401)
		w.Write([]byte(`{"errors":[{"title":"CF-InvalidAuthToken"}]}`))
		return
	}
	q := r.URL.Query()
	list := func(key string) []string { return strings.Split(q.Get(key), ",") }
	var out []any
	ref := func(guid string) any { return map[string]any{"data": map[string]string{"guid": guid}} }
	switch {
	case r.URL.Path == "/v3/apps":
		for _, g := range slices.Sorted(maps.Keys(c.apps)) {
			if q.Has("guids") && slices.Contains(list("guids"), g) || q.Has("space_guids") && slices.Contains(list("space_guids"), c.apps[g]) {
				out = append(out, map[string]any{"guid": g, "links": map[string]any{"space": map[string]string{"href": c.URL + "/v3/spaces/" + c.apps[g]}}})
			}
		}
	case r.URL.Path == "/v3/roles" && !c.noRoles:
		user := q.Get("user_guids")
		for _, s := range slices.Sorted(maps.Keys(c.developers[user])) {
			if !q.Has("space_guids") || slices.Contains(list("space_guids"), s) {
				out = append(out, map[string]any{"type": q.Get("types"), "relationships": map[string]any{"user": ref(user), "space": ref(s)}})
			}
		}
	case strings.HasPrefix(r.URL.Path, "/v2/users/"):
		c.serveV2(w, r)
		return
	default:
		http.NotFound(w, r)
		return
	}
	per, _ := strconv.Atoi(q.Get("per_page"))
	if c.page > 0 {
		per = c.page
	}
	page := 1
	fmt.Sscan(q.Get("page"), &page)
	pages, total := max(1, (len(out)+per-1)/per), len(out)
	out = out[min((page-1)*per, len(out)):min(page*per, len(out))]
	json.NewEncoder(w).Encode(map[string]any{"pagination": map[string]int{"total_pages": pages, "total_results": total}, "resources": append([]any{}, out...)})
}

func (c *controller) serveV2(w http.ResponseWriter, r *http.Request) {
	user := strings.Split(r.URL.Path, "/")[3]
	spaces, ok := c.developers[user]
	if !ok {
		http.NotFound(w, r)
		return
	}
	all := slices.Sorted(maps.Keys(spaces))
	page := 0
	fmt.Sscan(r.URL.Query().Get("page"), &page)
	var next any
	if page+1 < len(all) {
		next = fmt.Sprintf("%s?results-per-page=100&page=%d", r.URL.Path, page+1)
	}
	var out []any
	if page < len(all) {
		out = append(out, map[string]any{"metadata": map[string]string{"guid": all[page]}})
	}
	json.NewEncoder(w).Encode(map[string]any{"next_url": next, "resources": append([]any{}, out...)})
}

func client(c *controller, chunk int) *cc.Client {
	n := 0
	return cc.New(cc.Config{Base: c.URL, Chunk: chunk, Tokens: cc.Tokens{
		Token:  func(context.Context) (string, error) { return "token-" + strconv.Itoa(n), nil },
		Forget: func(string) { n++ },
	}}, outbound.New(nil, 300*time.Millisecond, "cloud controller"))
}

func TestSpacesOfApps(t *testing.T) {
	c := newController(t)
	var guids []string
	for n := range 25 {
		g := fmt.Sprintf("app-%02d", n)
		guids = append(guids, g)
		if n%5 != 0 {
			c.apps[g] = "space-" + strconv.Itoa(n%3)
		}
	}
	for _, page := range []int{0, 2} {
		c.page, c.asked = page, nil
		got, err := client(c, 10).Spaces(t.Context(), guids)
		if err != nil || !maps.Equal(got, c.apps) {
			t.Fatalf("pages of %d: %v, %v, want %v", page, got, err, c.apps)
		}
		if page == 0 && (len(c.asked) != 3 || !strings.HasSuffix(c.asked[0], "&per_page=9") || !strings.HasPrefix(c.asked[0], "/v3/apps?guids=app-00%2Capp-01")) {
			t.Errorf("asked %q", c.asked)
		}
	}
	c.asked = nil
	if got, err := client(c, 10).Spaces(t.Context(), nil); err != nil || len(got) != 0 || c.asked != nil {
		t.Errorf("without apps: %v, %v, asked %q", got, err, c.asked)
	}
}

func TestDevelopers(t *testing.T) {
	c := newController(t)
	c.developers["ada"] = map[string]bool{"s1": true, "s2": true, "s3": true}
	for _, old := range []bool{false, true} {
		c.noRoles = old
		k := client(c, 2)
		got, err := k.DevelopedOf(t.Context(), "ada", []string{"s0", "s1", "s3", "s9"})
		if err != nil || !got["s1"] || !got["s3"] || got["s0"] || got["s9"] {
			t.Errorf("without roles %v: %v, %v", old, got, err)
		}
		if all, err := k.Developed(t.Context(), "ada"); err != nil || !maps.Equal(all, c.developers["ada"]) {
			t.Errorf("without roles %v: %v, %v", old, all, err)
		}
		if got, err := k.DevelopedOf(t.Context(), "nobody", []string{"s1"}); err != nil || len(got) != 0 {
			t.Errorf("nobody, without roles %v: %v, %v", old, got, err)
		}
	}
	c.noRoles = false
	c.apps["a"], c.apps["b"], c.apps["c"] = "s1", "s2", "s9"
	if apps, err := client(c, 2).Apps(t.Context(), []string{"s1", "s2", "s3"}); err != nil || !maps.Equal(apps, map[string]bool{"a": true, "b": true}) {
		t.Errorf("apps: %v, %v", apps, err)
	}
}

func TestATokenThatIsNotAcceptedIsReplacedOnce(t *testing.T) {
	c := newController(t)
	c.apps["a"], c.token = "s", "token-1"
	if got, err := client(c, 0).Spaces(t.Context(), []string{"a"}); err != nil || got["a"] != "s" {
		t.Errorf("%v, %v", got, err)
	}
	c.token = "another"
	if _, err := client(c, 0).Spaces(t.Context(), []string{"a"}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without a good token: %v, want unavailable", err)
	}
}

// TestAnswersThatDoNotAddUp: none of them makes an app unknown or somebody a developer.
func TestAnswersThatDoNotAddUp(t *testing.T) {
	c := newController(t)
	c.apps["a"], c.apps["b"] = "s", "s"
	for name, answer := range map[string]string{
		"short":           `{"pagination":{"total_pages":1,"total_results":2},"resources":[{"guid":"a","links":{"space":{"href":"/v3/spaces/s"}}}]}`,
		"one app twice":   `{"pagination":{"total_pages":1,"total_results":2},"resources":[{"guid":"a","links":{"space":{"href":"/v3/spaces/s"}}},{"guid":"a","links":{"space":{"href":"/v3/spaces/s"}}}]}`,
		"no total":        `{"pagination":{"total_pages":1},"resources":[{"guid":"a","links":{"space":{"href":"/v3/spaces/s"}}}]}`,
		"no pagination":   `{"resources":[]}`,
		"endless":         `{"pagination":{"total_pages":1000000,"total_results":1},"resources":[]}`,
		"no list":         `{"pagination":{"total_pages":1}}`,
		"garbage":         `<html>`,
		"another shape":   `{"resources":{}}`,
		"no space":        `{"pagination":{"total_pages":1,"total_results":1},"resources":[{"guid":"a"}]}`,
		"a list of words": `{"pagination":{"total_pages":1,"total_results":1},"resources":["a"]}`,
	} {
		c.answering(func(w http.ResponseWriter, _ *http.Request) bool { w.Write([]byte(answer)); return true })
		if got, err := client(c, 0).Spaces(t.Context(), []string{"a", "b"}); !errors.Is(err, fault.Unavailable) {
			t.Errorf("%s: %v, %v, want unavailable", name, got, err)
		}
	}
	for code, kind := range map[int]fault.Kind{500: fault.Unavailable, 503: fault.Unavailable, 403: fault.Unavailable, 302: fault.Unavailable} {
		c.answering(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true })
		if _, err := client(c, 0).Spaces(t.Context(), []string{"a"}); !errors.Is(err, kind) {
			t.Errorf("%d: %v, want %v", code, err, kind)
		}
	}
	c.answering(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	if _, err := client(c, 0).Spaces(t.Context(), []string{"a"}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("silence: %v, want unavailable", err)
	}
	// Roles and apps that were not asked for are nobody's.
	c.answering(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Write([]byte(`{"pagination":{"total_pages":1},"resources":[{"type":"space_developer","relationships":{"user":{"data":{"guid":"other"}},"space":{"data":{"guid":"s"}}}},` +
			`{"type":"space_auditor","relationships":{"user":{"data":{"guid":"ada"}},"space":{"data":{"guid":"s"}}}}]}`))
		return true
	})
	if got, err := client(c, 0).DevelopedOf(t.Context(), "ada", []string{"s"}); err != nil || len(got) != 0 {
		t.Errorf("others' roles: %v, %v", got, err)
	}
}

// TestAUserIsNoPath: a subject that leads elsewhere in a v2 path would be a developer of everything that policy-server may see.
func TestAUserIsNoPath(t *testing.T) {
	c := newController(t)
	c.noRoles = true
	c.answering(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v3/roles" {
			return false
		}
		w.Write([]byte(`{"next_url":null,"resources":[{"metadata":{"guid":"everything"}}]}`))
		return true
	})
	for _, user := range []string{".", "..", "a/../..", "../x", "a?b", "%2e%2e"} {
		if got, err := client(c, 0).Developed(t.Context(), user); err != nil || len(got) != 0 {
			t.Errorf("%s: %v, %v, want a developer of nothing", user, got, err)
		}
	}
	if got, err := client(c, 0).Developed(t.Context(), "0b6f9c1e-9e1c"); err != nil || len(got) != 1 {
		t.Errorf("a user: %v, %v", got, err)
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"pagination":{"total_pages":1,"total_results":1},"resources":[{"guid":"a","links":{"space":{"href":"/v3/spaces/s"}}}]}`))
	f.Add([]byte(`{"next_url":null,"resources":[{"metadata":{"guid":"s"}}]}`))
	c := newController(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c.mu.Lock()
		c.answer = func(w http.ResponseWriter, r *http.Request) bool {
			if c.noRoles = r.URL.Path == "/v3/roles" && len(b)%2 == 0; c.noRoles {
				w.WriteHeader(404)
				return true
			}
			w.Write(b)
			return true
		}
		c.mu.Unlock()
		got, err := client(c, 0).Spaces(t.Context(), []string{"a"})
		for app, space := range got {
			if app != "a" || space == "" || err != nil {
				t.Fatalf("took %v, %v", got, err)
			}
		}
		client(c, 0).DevelopedOf(t.Context(), "ada", []string{"s"})
	})
}
