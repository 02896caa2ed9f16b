package policyhttp_test

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/revision"
)

const (
	policies = "/networking/v1/external/policies"
	remove   = policies + "/delete"
)

func TestRoutesAreThoseOfTheDeployedServer(t *testing.T) {
	s := start(t).Server
	for _, c := range []struct {
		line  string
		code  int
		body  string
		allow string
	}{
		{"GET /nowhere", 404, "404 page not found\n", ""},
		{"GET /networking/v1/external/policies/", 404, "404 page not found\n", ""},
		{"GET /networking/v1/external/destinations", 404, "404 page not found\n", ""},
		{"GET /networking//external/policies", 404, "404 page not found\n", ""},
		{"PUT " + policies, 405, "Method Not Allowed\n", "POST, GET, OPTIONS"},
		{"HEAD " + policies, 405, "", "POST, GET, OPTIONS"},
		{"POST /health", 405, "Method Not Allowed\n", "GET, OPTIONS"},
		{"GET /health", 200, "", ""},
		{"GET " + policies, 401, `{"error": "missing authorization header"}`, ""},
		{"GET /networking/v9/external/policies", 406, `{"error": "api version 'v9' not supported"}`, ""},
		{"GET /networking/v%22/external/tags", 406, `{"error": "api version 'v\"' not supported"}`, ""},
	} {
		got := ask(t, s, "", c.line, "")
		want(t, c.line, got, c.code, c.body)
		if a := got.header.Get("Allow"); a != c.allow {
			t.Errorf("%s: Allow %q, want %q", c.line, a, c.allow)
		}
		if got.code == 404 || got.code == 405 {
			if got.header.Get("X-Frame-Options") != "" || got.header.Get("X-Vcap-Request-Id") != "" {
				t.Errorf("%s: an answer of the router carries headers %v", c.line, got.header)
			}
		}
	}
	for _, path := range []string{"/", "/networking"} {
		if got := ask(t, s, "", "GET "+path, ""); got.code != 200 || !strings.HasPrefix(got.body, "Network policy server, up for ") || !strings.HasSuffix(got.body, "s\n") {
			t.Errorf("%s: %d %q", path, got.code, got.body)
		}
	}
}

func TestOrderOfChecks(t *testing.T) {
	s := start(t).Server
	scopes := `{"error": "provided scopes [openid cloud_controller.read] do not include allowed scopes [network.admin network.write]"}`
	for _, c := range []struct {
		as, line, body string
		code           int
		answer         string
	}{
		{"wrong", "GET /networking/v7/external/policies", "", 406, `{"error": "api version 'v7' not supported"}`},
		{"wrong", "POST " + policies, "{", 401, `{"error": "failed to verify token with uaa"}`},
		{"none", "POST " + policies, "{", 403, scopes},
		{"none", "GET " + policies, "", 403, scopes},
		{"none", "POST " + remove, "", 403, scopes},
		{"bare", "GET /networking/v0/external/tags", "", 403, `{"error": "provided scopes [] do not include allowed scopes [network.admin]"}`},
		{"dev", "GET /networking/v1/external/whoami", "", 403, `{"error": "provided scopes [network.write openid] do not include allowed scopes [network.admin]"}`},
		{"dev", "POST /networking/v1/external/policies/cleanup", "", 403, `{"error": "provided scopes [network.write openid] do not include allowed scopes [network.admin]"}`},
		{"admin", "GET /networking/v1/external/whoami", "", 200, `{"subject":"admin"}`},
	} {
		got := ask(t, s, c.as, c.line, c.body)
		want(t, c.as+" "+c.line, got, c.code, c.answer)
		if a := got.header.Get("WWW-Authenticate"); (a == "Bearer") != (c.code == 401) {
			t.Errorf("%s: %d with WWW-Authenticate %q", c.line, c.code, a)
		}
	}
	got := ask(t, s, "outage", "GET "+policies, "")
	if got.code != 503 || got.header.Get("Retry-After") == "" || got.header.Get("WWW-Authenticate") != "" {
		t.Errorf("while nobody can verify tokens: %d %v, want 503 with Retry-After", got.code, got.header)
	}
}

func TestSelfServiceNeedsNoScope(t *testing.T) {
	o := externalOptions()
	o.SelfService = true
	s := serve(t, backendOf(openStore(t, 0)), o, policyhttp.InternalOptions{})
	want(t, "create", ask(t, s, "none", "POST "+policies, body(item("my-a", "my-b", "tcp", "1"))), 200, "{}")
	want(t, "list", ask(t, s, "none", "GET "+policies, ""), 200, listed(item("my-a", "my-b", "tcp", "1")))
	want(t, "delete", ask(t, s, "none", "POST "+remove, body(item("my-a", "my-b", "tcp", "1"))), 200, "{}")
	if got := ask(t, s, "none", "GET /networking/v1/external/tags", ""); got.code != 403 {
		t.Errorf("tags: %d, want 403", got.code)
	}
}

func TestHeaders(t *testing.T) {
	o := externalOptions()
	o.HSTS, o.CORS = true, []string{"https://one.example", "*"}
	s := serve(t, backendOf(openStore(t, 0)), o, policyhttp.InternalOptions{})
	get := func(line, origin string) http.Header {
		method, path, _ := strings.Cut(line, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		req.Header.Set("X-VCAP-Request-ID", "given")
		return send(t, s, req).header
	}
	h := get("GET /networking", "https://one.example")
	for k, v := range map[string]string{
		"X-Xss-Protection": "1; mode=block", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "deny",
		"Content-Security-Policy": "frame-ancestors 'none'", "Strict-Transport-Security": "max-age=31536000", "Access-Control-Allow-Origin": "https://one.example",
	} {
		if h.Get(k) != v {
			t.Errorf("%s is %q, want %q", k, h.Get(k), v)
		}
	}
	if id := h.Get("X-Vcap-Request-Id"); !strings.HasPrefix(id, "given::") || len(id) != len("given::")+36 {
		t.Errorf("X-Vcap-Request-Id is %q", id)
	}
	if o := get("GET /", "https://two.example").Get("Access-Control-Allow-Origin"); o != "*" {
		t.Errorf("another origin is allowed as %q, want *", o)
	}
	if get("GET /", "").Values("Access-Control-Allow-Origin") != nil {
		t.Error("a request without an origin is answered about origins")
	}
	for path, verbs := range map[string]string{
		policies: "POST,GET,OPTIONS", remove: "POST,OPTIONS", "/": "GET,OPTIONS", "/networking/v0/external/tags": "GET,OPTIONS", "/health": "GET,OPTIONS",
	} {
		h := get("OPTIONS "+path, "https://one.example")
		if got := h.Get("Access-Control-Allow-Methods"); got != verbs || h.Get("Access-Control-Allow-Headers") != "authorization" || h.Get("X-Vcap-Request-Id") != "" {
			t.Errorf("OPTIONS %s: %v, want methods %s", path, h, verbs)
		}
	}
}

func TestValidationOfV1(t *testing.T) {
	s := start(t).Server
	ok := item("a", "b", "tcp", "1")
	bad := func(text string) string { return `{"error": "mapper: validate policies: ` + text + `"}` }
	for _, c := range []struct{ body, answer string }{
		{`{}`, bad("missing policies")},
		{`null`, bad("missing policies")},
		{`{"policies":[]}`, bad("missing policies")},
		{`{"policies":null,"total_policies":7}`, bad("missing policies")},
		{body(`{}`), bad("missing source id")},
		{body(`null`), bad("missing source id")},
		{body(ok, item("", "", "x", "0")), bad("missing source id")},
		{body(item("a", "", "x", "0")), bad("missing destination id")},
		{body(item("a", "b", "TCP", "0")), bad("invalid destination protocol, specify either udp or tcp")},
		{body(item("a", "b", "icmp", "9-8")), bad("invalid destination protocol, specify either udp or tcp")},
		{body(item("a", "b", "tcp", "9-8")), bad("invalid port range 9-8, start must be less than or equal to end")},
		{body(`{"source":{"id":"a"},"destination":{"id":"b","protocol":"udp","ports":{"start":-2,"end":-1}}}`), bad("invalid start port -2, must be in range 1-65535")},
		{body(item("a", "b", "udp", "0-70000")), bad("missing start port")},
		{body(`{"source":{"id":"a"},"destination":{"id":"b","protocol":"udp"}}`), bad("missing start port")},
		{body(item("a", "b", "udp", "1-65536")), bad("invalid end port 65536, must be in range 1-65535")},
		{body(`{"source":{"id":"a","tag":"0001"},"destination":{"id":"b","protocol":"udp","ports":{"start":1,"end":1}}}`), bad("tags may not be specified")},
		{body(strings.Replace(ok, `"protocol"`, `"tag":"x","protocol"`, 1)), bad("tags may not be specified")},
		{body(item("a,b", "b", "tcp", "1")), bad(`source: policy group \"a,b\": expected printable characters without commas`)},
	} {
		for _, line := range []string{"POST " + policies, "POST " + remove} {
			want(t, line+" "+c.body, ask(t, s, "admin", line, c.body), 400, c.answer)
		}
	}
	for _, text := range []string{
		``, `{`, `[]`, body(ok) + `x`, `{"policies":{}}`, body(`7`), body(`{}`, `{"source":7}`),
		body(`{"source":{"id":"a"},"destination":{"id":"b","protocol":"tcp","ports":{"start":8080.0,"end":"8080"}}}`),
	} {
		got := ask(t, s, "admin", "POST "+policies, text)
		if got.code != 400 || !strings.HasPrefix(got.body, `{"error": "mapper: unmarshal json: `) {
			t.Errorf("%s: %d %s, want 400 mapper: unmarshal json", text, got.code, got.body)
		}
	}
	// Keys match in any case, what is not known is ignored, and the last of a key counts.
	loose := `{"Policies":[{"SOURCE":{"Id":"x","ID":"a","type":"app"},"destination":{"id":"b","ips":[],"Protocol":"udp","ports":{"Start":5,"END":6}}}],"else":1}`
	want(t, loose, ask(t, s, "admin", "POST "+policies, loose), 200, "{}")
	want(t, "list", ask(t, s, "admin", "GET "+policies, ""), 200, listed(item("a", "b", "udp", "5-6")))
	if got := ask(t, s, "admin", "POST "+policies, body(item(strings.Repeat("x", 256), "b", "tcp", "1"))); got.code != 400 {
		t.Errorf("a name of 256 bytes: %d %s, want 400", got.code, got.body)
	}
}

func TestV0(t *testing.T) {
	s := start(t).Server
	const path = "/networking/v0/external/policies"
	port := func(p string) string {
		return `{"source":{"id":"a"},"destination":{"id":"b","protocol":"tcp","port":` + p + `}}`
	}
	for p, text := range map[string]string{
		"0": "missing port", "-1": "invalid port -1, must be in range 1-65535", "65536": "invalid port 65536, must be in range 1-65535",
	} {
		want(t, p, ask(t, s, "admin", "POST "+path, body(port(p))), 400, `{"error": "mapper: validate policies: `+text+`"}`)
	}
	want(t, "create", ask(t, s, "admin", "POST "+path, body(port("8080"))), 200, "{}")
	want(t, "create a range", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "1-2"))), 200, "{}")
	want(t, "list hides ranges", ask(t, s, "admin", "GET "+path, ""), 200, listed(port("8080")))
	want(t, "list of v1", ask(t, s, "admin", "GET "+policies, ""), 200, listed(item("a", "b", "tcp", "1-2"), item("a", "b", "tcp", "8080")))
	want(t, "delete", ask(t, s, "admin", "POST "+path+"/delete", body(port("8080"))), 200, "{}")
	want(t, "empty list", ask(t, s, "admin", "GET "+path, ""), 200, `{"total_policies":0,"policies":[]}`)
}

func TestFilters(t *testing.T) {
	s := start(t).Server
	ab, ac, bc := item("a", "b", "tcp", "1"), item("a", "c", "tcp", "1"), item("b", "c", "tcp", "1")
	want(t, "create", ask(t, s, "admin", "POST "+policies, body(bc, ab, ac)), 200, "{}")
	for query, answer := range map[string]string{
		"": listed(ab, ac, bc), "?id=b": listed(ab, bc), "?id=b,x": listed(ab, bc), "?id=b%2Ca": listed(ab, ac, bc), "?id=": listed(), "?id=,": listed(),
		"?source_id=a": listed(ab, ac), "?dest_id=c": listed(ac, bc), "?source_id=a,b&dest_id=b": listed(ab), "?source_id=a&dest_id=": listed(),
		"?id=x&source_id=a": listed(), "?id=b&id=a": listed(ab, bc), "?unknown=1": listed(ab, ac, bc),
	} {
		want(t, query, ask(t, s, "admin", "GET "+policies+query, ""), 200, answer)
	}
	if got := ask(t, s, "admin", "GET "+policies+"?id=a;x", ""); got.code != 400 {
		t.Errorf("a query that cannot be read: %d %s, want 400 and not everything", got.code, got.body)
	}
}

func TestWhoMayChangeWhat(t *testing.T) {
	s := start(t).Server
	denied := `{"error": "one or more applications cannot be found or accessed"}`
	mine, foreign, out, in := item("my-a", "my-b", "tcp", "1"), item("x", "y", "tcp", "1"), item("my-a", "y", "tcp", "1"), item("x", "my-b", "tcp", "1")
	for _, c := range []struct {
		line, body string
		code       int
		answer     string
	}{
		{"POST " + policies, body(mine), 200, "{}"},
		{"POST " + policies, body(mine, out), 403, denied},
		{"POST " + policies, body(in), 403, denied},
		{"POST " + policies, body(foreign), 403, denied}, // that nobody knows an app is no permission
		{"POST " + policies, body(item("broken", "my-a", "tcp", "1")), 500, `{"error": "check access failed"}`},
		{"POST " + remove, body(foreign), 403, denied},
		{"POST " + remove, body(mine, foreign), 403, denied},
		{"POST " + remove, body(out, in), 200, "{}"}, // being at home at one end is enough to close it
		{"POST " + remove, body(item("broken", "my-a", "tcp", "1")), 500, `{"error": "check access failed"}`},
	} {
		want(t, c.line+" "+c.body, ask(t, s, "dev", c.line, c.body), c.code, c.answer)
	}
	want(t, "admin", ask(t, s, "admin", "POST "+policies, body(foreign, out, in)), 200, "{}")
	want(t, "what a developer sees", ask(t, s, "dev", "GET "+policies, ""), 200, listed(mine))
	want(t, "what an admin sees", ask(t, s, "admin", "GET "+policies, ""), 200, listed(mine, in, out, foreign))
	want(t, "admin", ask(t, s, "admin", "POST "+policies, body(item("broken", "z", "tcp", "1"))), 200, "{}")
	want(t, "filter without cloud controller", ask(t, s, "dev", "GET "+policies, ""), 500, `{"error": "filter policies failed"}`)
}

func TestQuota(t *testing.T) {
	s := start(t).Server
	one, two, three, four := item("my-a", "my-b", "tcp", "1"), item("my-a", "my-b", "tcp", "2"), item("my-a", "my-b", "tcp", "3"), item("my-a", "my-b", "tcp", "4")
	want(t, "up to the quota", ask(t, s, "dev", "POST "+policies, body(one, two, three)), 200, "{}")
	want(t, "again", ask(t, s, "dev", "POST "+policies, body(three, two)), 200, "{}")
	want(t, "beyond", ask(t, s, "dev", "POST "+policies, body(four)), 403, `{"error": "policy quota exceeded"}`)
	want(t, "another source", ask(t, s, "dev", "POST "+policies, body(item("my-b", "my-a", "tcp", "1"))), 200, "{}")
	want(t, "an admin", ask(t, s, "admin", "POST "+policies, body(four)), 200, "{}")
}

func TestTagsAreListed(t *testing.T) {
	s := start(t).Server
	want(t, "none", ask(t, s, "admin", "GET /networking/v1/external/tags", ""), 200, `{"tags":[]}`)
	want(t, "create", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "1"))), 200, "{}")
	want(t, "router", ask(t, s, "", "PUT "+policyhttp.PathTags, `{"ID":"INGRESS_ROUTER","Type":"router"}`), 200, `{"id":"INGRESS_ROUTER","tag":"0003","type":"router"}`)
	want(t, "tags", ask(t, s, "admin", "GET /networking/v0/external/tags", ""), 200,
		`{"tags":[{"id":"a","tag":"0001","type":"app"},{"id":"b","tag":"0002","type":"app"},{"id":"INGRESS_ROUTER","tag":"0003","type":"router"}]}`)
}

func TestNoTagLeftIsTold(t *testing.T) {
	s := serve(t, backendOf(openStore(t, 2)), externalOptions(), policyhttp.InternalOptions{})
	want(t, "first", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "1"))), 200, "{}")
	got := ask(t, s, "admin", "POST "+policies, body(item("a", "c", "tcp", "1")))
	if got.code != 409 || !strings.Contains(got.body, "tag") {
		t.Errorf("without a tag: %d %s, want 409 that speaks of tags", got.code, got.body)
	}
	want(t, "between known groups", ask(t, s, "admin", "POST "+policies, body(item("b", "a", "tcp", "1"))), 200, "{}")
}

func TestBodiesAreBounded(t *testing.T) {
	s := start(t).Server
	long := strings.Repeat(" ", 10<<20) + body(item("a", "b", "tcp", "1"))
	want(t, "create", ask(t, s, "admin", "POST "+policies, long), 400, `{"error": "failed reading request body"}`)
	want(t, "delete", ask(t, s, "admin", "POST "+remove, long), 400, `{"error": "invalid request body"}`)
	many := make([]string, 50000)
	for i := range many {
		many[i] = item("a", "b", "tcp", "1")
	}
	want(t, "many", ask(t, s, "admin", "POST "+policies, body(many...)), 200, "{}")
}

// TestAFailingDatabaseIsTold makes the real parts fail.
func TestAFailingDatabaseIsTold(t *testing.T) {
	b := backendOf(openStore(t, 0))
	away := fault.Unavailablef("database is away")
	b.Create = func(context.Context, []policy.Policy, int) (revision.Revision, error) {
		return revision.Revision{}, away
	}
	b.Remove = func(context.Context, []policy.Policy) (revision.Revision, error) { return revision.Revision{}, away }
	b.Tags = func(context.Context) ([]identity.Tagged, error) { return nil, away }
	b.Ping = func(context.Context) error { return away }
	s := serve(t, b, externalOptions(), policyhttp.InternalOptions{})
	for line, text := range map[string]string{
		"POST " + policies: "database create failed", "POST " + remove: "database delete failed",
		"GET /networking/v1/external/tags": "database read failed", "GET /health": "check database failed",
		"POST " + policies + "/cleanup": "policies cleanup failed",
	} {
		want(t, line, ask(t, s, "admin", line, body(item("a", "b", "tcp", "1"))), 500, `{"error": "`+text+`"}`)
	}
}

func TestCleanupAnswersInV1(t *testing.T) {
	o := externalOptions()
	var forced []bool
	o.Cleanup = func(_ context.Context, force bool) ([]policy.Policy, error) {
		if forced = append(forced, force); len(forced) == 1 {
			return nil, nil
		}
		if len(forced) == 4 {
			return nil, errors.New("cloud controller is away")
		}
		return []policy.Policy{{Source: "a", Destination: "b", Protocol: policy.UDP, Ports: policy.Ports{First: 1, Last: 2}}}, nil
	}
	s := serve(t, backendOf(openStore(t, 0)), o, policyhttp.InternalOptions{})
	const path = "POST /networking/v0/external/policies/cleanup"
	want(t, "nothing", ask(t, s, "admin", path, ""), 200, `{"total_policies":0,"policies":[]}`)
	want(t, "one", ask(t, s, "admin", path, ""), 200, listed(item("a", "b", "udp", "1-2")))
	want(t, "by force", ask(t, s, "admin", path+"?force=true", ""), 200, listed(item("a", "b", "udp", "1-2")))
	want(t, "failure", ask(t, s, "admin", path, ""), 500, `{"error": "policies cleanup failed"}`)
	if len(forced) != 4 || forced[0] || forced[1] || !forced[2] || forced[3] {
		t.Errorf("forced %v, want the third only", forced)
	}
}

// TestCleanupMayTakeLong behind a listener whose limits are for short requests.
func TestCleanupMayTakeLong(t *testing.T) {
	o := externalOptions()
	o.Cleanup = func(ctx context.Context, _ bool) ([]policy.Policy, error) {
		select {
		case <-time.After(time.Second): // that Cloud Controller takes
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s := httptest.NewUnstartedServer(policyhttp.ExternalHandler(backendOf(openStore(t, 0)), discard, o))
	s.Config.ReadTimeout, s.Config.WriteTimeout = 300*time.Millisecond, 600*time.Millisecond
	s.Start()
	defer s.Close()
	want(t, "cleanup", ask(t, s, "admin", "POST "+policies+"/cleanup", ""), 200, `{"total_policies":0,"policies":[]}`)
}

// TestHealthIsAskedForByMany at once, who need no credentials for it: the database is asked once at a time, and each is told what is newer than the question.
func TestHealthIsAskedForByMany(t *testing.T) {
	b := backendOf(openStore(t, 0))
	var pings, now, most atomic.Int32
	begun, release := make(chan struct{}, 1000), make(chan struct{})
	b.Ping = func(context.Context) error {
		most.Store(max(most.Load(), now.Add(1)))
		defer now.Add(-1)
		begun <- struct{}{}
		<-release
		if pings.Add(1) == 1 {
			return errors.New("database is away")
		}
		return nil
	}
	s := serve(t, b, externalOptions(), policyhttp.InternalOptions{})
	var wg sync.WaitGroup
	codes := make(chan int, 100)
	for n := range 100 {
		wg.Go(func() { codes <- ask(t, s, "", "GET /health", "").code })
		if n == 0 {
			<-begun
		}
	}
	<-time.After(200 * time.Millisecond) // that they may come
	close(release)
	wg.Wait()
	close(codes)
	count := map[int]int{}
	for c := range codes {
		count[c]++
	}
	if most.Load() != 1 || count[500] != 1 || count[200] != 99 {
		t.Errorf("%d pings, %d at once, answers %v, want one at a time and the first to fail for the first alone", pings.Load(), most.Load(), count)
	}
}

// TestAGroupOfAnotherKind is no failure of the server, which a client would try again.
func TestAGroupOfAnotherKind(t *testing.T) {
	s := start(t).Server
	if got := ask(t, s, "", "PUT "+policyhttp.PathTags, `{"id":"INGRESS_ROUTER","type":"router"}`); got.code != 200 {
		t.Fatalf("tag: %d %s", got.code, got.body)
	}
	got := ask(t, s, "admin", "POST "+policies, body(item("INGRESS_ROUTER", "b", "tcp", "1")))
	if got.code != 409 || !strings.Contains(got.body, `has a tag of kind \"router\"`) {
		t.Errorf("policy of the router: %d %s, want 409 and why", got.code, got.body)
	}
}

// TestAFailureIsLoggedShortly, whatever was asked for.
func TestAFailureIsLoggedShortly(t *testing.T) {
	var out bytes.Buffer
	b := backendOf(openStore(t, 0))
	b.Rules = func(context.Context, policy.Filter) (iter.Seq[policy.Rule], int, error) {
		return nil, 0, errors.New("away")
	}
	h := policyhttp.InternalHandler(b, slog.New(slog.NewJSONHandler(&out, nil)), policyhttp.InternalOptions{})
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), "GET", "/networking/"+strings.Repeat("v", 100000)+"/internal/policies", http.NoBody))
	e := policyhttp.ExternalHandler(b, slog.New(slog.NewJSONHandler(&out, nil)), externalOptions())
	e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), "GET", policies, http.NoBody))
	for line := range strings.Lines(out.String()) {
		if len(line) > 1000 || strings.Count(line, `"path":`) != 1 {
			t.Errorf("line of %d bytes: %.300s", len(line), line)
		}
	}
	if strings.Count(out.String(), "\n") != 2 {
		t.Errorf("log: %s", out.String())
	}
}
