package policyhttp_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/revision"
)

func TestMain(m *testing.M) { testkit.Main(m) }

var discard = slog.New(slog.DiscardHandler)

// openStore runs a store over SQLite until the test ends.
func openStore(t testing.TB, maxTag identity.Tag) *policysql.Store {
	t.Helper()
	s, err := policysql.Open(t.Context(), policysql.Config{DB: testkit.Database(t, sqldb.SQLite), MaxTag: maxTag}, discard)
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
	return s
}

// backendOf is a store as handlers want it.
func backendOf(s *policysql.Store) policyhttp.Backend {
	return policyhttp.Backend{
		Create: func(ctx context.Context, ps []policy.Policy, quota int) (revision.Revision, error) {
			at, err := s.CreateWithin(ctx, ps, quota)
			if errors.Is(err, policysql.ErrQuota) {
				err = fault.New(fault.Exhausted, errors.Join(policyhttp.ErrQuota, err))
			}
			return at, err
		},
		Remove: s.Remove,
		Rules: func(ctx context.Context, f policy.Filter) (iter.Seq[policy.Rule], int, error) {
			rules, err := s.Rules(ctx, f)
			return slices.Values(rules), len(rules), err
		},
		Tags: s.Tags, Tag: s.Tag, Stamp: s.Stamp, Watch: s.WatchFor, Polled: s.DeployedPoll, Ping: s.Ping,
		Force: func(ctx context.Context, at revision.Revision, groups []identity.Group, wait time.Duration) (policyhttp.Force, error) {
			f, err := s.Force(ctx, at, groups, wait)
			return policyhttp.Force(f), err
		},
		GroupPage: func(ctx context.Context, spaces []string, from int64, limit int) (policyhttp.GroupPage, error) {
			p, err := s.SecurityGroups().Page(ctx, spaces, from, limit)
			return policyhttp.GroupPage(p), err
		},
		WatchGroups: s.SecurityGroups().WatchFor, Groups: s.SecurityGroups(),
		TagLength: 2,
	}
}

// callers are who sends what token.
var callers = map[string]policyhttp.Caller{
	"admin": {Name: "admin", Subject: "admin-id", Scopes: []string{"network.admin"}},
	"dev":   {Name: "dev", Subject: "dev-id", Scopes: []string{"network.write", "openid"}},
	"none":  {Subject: "none-id", Scopes: []string{"openid", "cloud_controller.read"}},
	"bare":  {Name: "bare"},
}

// authenticate knows callers by the names of their tokens.
func authenticate(r *http.Request) (policyhttp.Caller, error) {
	token := strings.TrimPrefix(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), "bearer ")
	switch c, ok := callers[token]; {
	case token == "":
		return c, policyhttp.ErrNoCredentials
	case token == "outage":
		return c, fault.Unavailablef("uaa does not answer")
	case !ok:
		return c, fault.Deniedf("failed to verify token with uaa")
	default:
		return c, nil
	}
}

// access lets everybody write the groups that begin with "my-".
func access(_ context.Context, _ policyhttp.Caller, groups []identity.Group) (map[identity.Group]bool, error) {
	mine := map[identity.Group]bool{}
	for _, g := range groups {
		if g == "broken" {
			return nil, errors.New("cloud controller is away")
		}
		if strings.HasPrefix(string(g), "my-") {
			mine[g] = true
		}
	}
	return mine, nil
}

// externalOptions are those of most tests.
func externalOptions() policyhttp.ExternalOptions {
	return policyhttp.ExternalOptions{Authenticate: authenticate, Access: access, MaxPolicies: 3}
}

// api is both APIs on one server.
type api struct {
	*httptest.Server
	store *policysql.Store
}

func serve(t testing.TB, b policyhttp.Backend, e policyhttp.ExternalOptions, i policyhttp.InternalOptions) *httptest.Server {
	t.Helper()
	external, internal := policyhttp.ExternalHandler(b, discard, e), policyhttp.InternalHandler(b, discard, i)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/internal/") {
			internal.ServeHTTP(w, r)
			return
		}
		external.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// start serves a new store.
func start(t testing.TB) *api {
	t.Helper()
	s := openStore(t, 0)
	return &api{serve(t, backendOf(s), externalOptions(), policyhttp.InternalOptions{}), s}
}

// answer is what came back.
type answer struct {
	code   int
	body   string
	header http.Header
}

// ask sends a request, "METHOD path", as a caller, "" for nobody.
func ask(t testing.TB, s *httptest.Server, as, line, body string) answer {
	t.Helper()
	method, path, _ := strings.Cut(line, " ")
	req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if as != "" {
		req.Header.Set("Authorization", "bearer "+as)
	}
	return send(t, s, req)
}

func send(t testing.TB, s *httptest.Server, req *http.Request) answer {
	t.Helper()
	resp, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, string(b), resp.Header}
}

// want compares an answer.
func want(t testing.TB, what string, got answer, code int, body string) {
	t.Helper()
	if got.code != code || got.body != body {
		t.Errorf("%s: %d %s\nwant %d %s", what, got.code, got.body, code, body)
	}
}

// item is a policy in the shape of v1.
func item(source, destination, protocol string, ports string) string {
	first, last, ok := strings.Cut(ports, "-")
	if !ok {
		last = first
	}
	return `{"source":{"id":"` + source + `"},"destination":{"id":"` + destination + `","protocol":"` + protocol + `","ports":{"start":` + first + `,"end":` + last + `}}}`
}

func body(items ...string) string { return `{"policies":[` + strings.Join(items, ",") + `]}` }

func listed(items ...string) string {
	return `{"total_policies":` + string(rune('0'+len(items))) + `,"policies":[` + strings.Join(items, ",") + `]}`
}
