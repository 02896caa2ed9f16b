package policyhttp_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/revision"
)

func TestInternalRoutes(t *testing.T) {
	s := start(t).Server
	want(t, "create", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "8080"), item("b", "c", "udp", "1-2"))), 200, "{}")
	ab := `{"source":{"id":"a","tag":"0001"},"destination":{"id":"b","tag":"0002","protocol":"tcp","ports":{"start":8080,"end":8080}}}`
	bc := `{"source":{"id":"b","tag":"0002"},"destination":{"id":"c","tag":"0003","protocol":"udp","ports":{"start":1,"end":2}}}`
	empty := `{"next":0,"security_groups":[]}`
	for _, c := range []struct {
		line, body string
		code       int
		answer     string
	}{
		{"GET /networking/v1/internal/policies", "", 200, listed(ab, bc)},
		{"GET /networking/any/internal/policies?id=a", "", 200, listed(ab)},
		{"GET /networking/v1/internal/policies?id=c,x", "", 200, listed(bc)},
		{"GET /networking/v1/internal/policies?id=", "", 200, listed()},
		{"GET /networking/v1/internal/policies?source_id=b", "", 200, listed(ab, bc)}, // which is for people
		{"GET /networking/v1/internal/security_groups?per_page=5000&space_guids=s", "", 200, empty},
		{"GET /networking/v1/internal/security_groups?from=x", "", 500, `{"error": "invalid value for 'from' parameter"}`},
		{"GET /networking/v1/internal/security_groups?limit=1.5", "", 500, `{"error": "invalid value for 'limit' parameter"}`},
		{"PUT /networking/v1/internal/tags", `{"id":"r","type":"router"}`, 200, `{"id":"r","tag":"0004","type":"router"}`},
		{"PUT /networking/v1/internal/tags", `{"id":"r","type":"router"}`, 200, `{"id":"r","tag":"0004","type":"router"}`},
		{"PUT /networking/v1/internal/tags", `{"id":"r","type":"other"}`, 500, `{"error": "database create failed"}`},
		{"PUT /networking/v1/internal/tags", `{"id":"a","type":"app"}`, 200, `{"id":"a","tag":"0001","type":"app"}`},
		{"PUT /networking/v1/internal/tags", `{`, 400, `{"error": "failed parsing request body"}`},
		{"PUT /networking/v1/internal/tags", strings.Repeat(" ", 1<<20), 400, `{"error": "failed reading request body"}`},
		{"PUT /networking/v2/internal/tags", `{}`, 404, "404 page not found\n"},
		{"POST /networking/v1/internal/policies", "", 405, "Method Not Allowed\n"},
		{"OPTIONS /networking/v1/internal/policies", "", 405, "Method Not Allowed\n"},
		{"GET /networking/v1/internal/healthcheck", "", 404, "404 page not found\n"},
	} {
		got := ask(t, s, "", c.line, c.body)
		want(t, c.line, got, c.code, c.answer)
		if served := got.code != 404 && got.code != 405; served != (got.header.Get("Strict-Transport-Security") != "") || served != (got.header.Get("X-Vcap-Request-Id") != "") {
			t.Errorf("%s: %d with headers %v", c.line, got.code, got.header)
		}
	}
	if got := ask(t, s, "", "PUT /networking/v1/internal/tags", `{"id":"","type":"router"}`); got.code != 400 {
		t.Errorf("tag for nobody: %d %s, want 400", got.code, got.body)
	}
}

func TestTheStampOnlyGrows(t *testing.T) {
	s := start(t).Server
	last := int64(0)
	stamp := func() int64 {
		got := ask(t, s, "", "GET "+policyhttp.PathLastUpdated, "")
		n, err := strconv.ParseInt(got.body, 10, 64)
		if err != nil || got.code != 200 || n <= 0 {
			t.Fatalf("stamp: %d %q", got.code, got.body)
		}
		return n
	}
	last = stamp()
	for i, change := range []string{"POST " + policies, "POST " + remove, "POST " + policies} {
		want(t, change, ask(t, s, "admin", change, body(item("a", "b", "tcp", "1"))), 200, "{}")
		if n := stamp(); n <= last {
			t.Errorf("stamp %d after change %d, was %d", n, i, last)
		} else {
			last = n
		}
	}
	want(t, "what changes nothing", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "1"))), 200, "{}")
	if n := stamp(); n != last {
		t.Errorf("stamp %d after nothing changed, was %d", n, last)
	}
}

// setOf is what docs/api/policies.md says that a set is.
func setOf(groups ...string) string {
	h := sha256.New()
	for _, g := range groups {
		h.Write([]byte(g + "\n"))
	}
	return hex.EncodeToString(h.Sum(nil))
}

func watchBody(more string, groups ...string) string {
	b, _ := json.Marshal(groups)
	return `{"host":"10.0.0.1","set":"` + setOf(groups...) + `","groups":` + string(b) + more + `}`
}

func TestWatchOnTheWire(t *testing.T) {
	s := start(t).Server
	const line = "POST " + policyhttp.PathWatch
	known := `{"host":"10.0.0.1","set":"` + setOf("a", "b") + `","since":"","wait":0}`
	got := ask(t, s, "", line, known)
	if got.code != 428 || !strings.Contains(got.body, setOf("a", "b")) {
		t.Fatalf("unknown set: %d %s, want 428", got.code, got.body)
	}
	got = ask(t, s, "", line, watchBody(`,"wait":0`, "a", "b"))
	if got.code != 200 || !strings.Contains(got.body, `"full":true,"set":[],"gone":[],"count":0`) {
		t.Fatalf("first watch: %d %s", got.code, got.body)
	}
	if got := ask(t, s, "", line, known); got.code != 200 {
		t.Errorf("known set: %d %s", got.code, got.body)
	}
	if got := ask(t, s, "", line, `{"host":"h","set":"`+setOf()+`","wait":0}`); got.code != 200 {
		t.Errorf("no groups: %d %s", got.code, got.body)
	}
	want(t, "create", ask(t, s, "admin", "POST "+policies, body(item("a", "b", "tcp", "1"))), 200, "{}")
	var u struct {
		Revision string
		Full     bool
		Set      []json.RawMessage
		Gone     []json.RawMessage
		Count    int
		Sum      string
	}
	policytest.Eventually(t, "the policy is told", func() bool {
		got = ask(t, s, "", line, known)
		if err := json.Unmarshal([]byte(got.body), &u); err != nil {
			t.Fatal(err)
		}
		return u.Count == 1
	})
	rule := policy.Rule{Policy: policytest.Of(t, "a b tcp 1"), SourceTag: 1, DestinationTag: 2}
	if !u.Full || len(u.Set) != 1 || string(u.Set[0]) != `{"source":{"id":"a","tag":"0001"},"destination":{"id":"b","tag":"0002","protocol":"tcp","ports":{"start":1,"end":1}}}` ||
		u.Sum != policy.Sum([]policy.Rule{rule}).String() {
		t.Errorf("told %s", got.body)
	}
	want(t, "delete", ask(t, s, "admin", "POST "+remove, body(item("a", "b", "tcp", "1"))), 200, "{}")
	got = ask(t, s, "", line, watchBody(`,"since":"`+u.Revision+`","wait":5`, "a", "b"))
	if !strings.Contains(got.body, `"full":false,"set":[],"gone":[`+item("a", "b", "tcp", "1")+`],"count":0`) {
		t.Errorf("after the end: %s", got.body)
	}
	for _, bad := range []string{
		``, `{}`, `[]`, watchBody(`,"wait":-1`, "a"), watchBody(`,"since":"x"`, "a"), watchBody(``, "b", "a"), watchBody(``, "a", "a"), watchBody(``, ""),
		strings.Replace(watchBody(``, "a"), `"groups":["a"]`, `"groups":["b"]`, 1), `{"host":"h","set":"xy"}`, `{"host":"","set":"` + setOf() + `"}`,
		`{"host":"` + strings.Repeat("h", 256) + `","set":"` + setOf() + `"}`, strings.Repeat(" ", 5<<20),
	} {
		if got := ask(t, s, "", line, bad); got.code != 400 {
			t.Errorf("%.100s: %d %.200s, want 400", bad, got.code, got.body)
		}
	}
}

func TestSetsAreForgottenWhenTheyAreManyAndSentAgain(t *testing.T) {
	store := openStore(t, 0)
	s := serve(t, backendOf(store), externalOptions(), policyhttp.InternalOptions{SetBytes: 4096})
	c := client(t, s.URL)
	for round := range 2 {
		for n := range 200 {
			g := identity.Group("group-" + strconv.Itoa(n))
			if u, err := c.Watch(t.Context(), policy.Ask{Host: "h", Groups: []identity.Group{g}}); err != nil || !u.Full {
				t.Fatalf("round %d, %s: %+v, %v", round, g, u, err)
			}
		}
	}
	if got := ask(t, s, "", "POST "+policyhttp.PathWatch, `{"host":"h","set":"`+setOf("group-0")+`","wait":0}`); got.code != 428 {
		t.Errorf("a set used long ago: %d, want 428", got.code)
	}
}

// TestOtherServersSetIsSentAfterAFailure: a client that goes to another server, which knows nothing, gets along.
func TestClientGoesToTheNextServer(t *testing.T) {
	store := openStore(t, 0)
	a, b := serve(t, backendOf(store), externalOptions(), policyhttp.InternalOptions{}), serve(t, backendOf(store), externalOptions(), policyhttp.InternalOptions{})
	c := client(t, a.URL, b.URL)
	ask := policy.Ask{Host: "h", Groups: []identity.Group{"a"}}
	first, err := c.Watch(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	a.CloseClientConnections()
	a.Close()
	if err := c.Create(t.Context(), []policy.Policy{policytest.Of(t, "a b tcp 1")}); err != nil {
		t.Fatal(err)
	}
	ask.Since = first.Revision
	u, err := c.Watch(t.Context(), ask)
	if rules, aerr := u.Apply(first.Set); err != nil || aerr != nil || len(rules) != 1 {
		t.Errorf("told %+v, %v, %v", u, err, aerr)
	}
	b.Close()
	if _, err := c.Watch(t.Context(), ask); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without servers: %v, want unavailable", err)
	}
}

func TestWaitingForForce(t *testing.T) {
	a := start(t)
	c := client(t, a.URL)
	p := policytest.Of(t, "a b tcp 1")
	// Without an agent nothing has to be waited for.
	f, err := c.CreateInForce(t.Context(), []policy.Policy{p}, time.Second)
	if err != nil || !f.InForce {
		t.Fatalf("without agents: %+v, %v", f, err)
	}
	// An agent that has the change but says nothing of its kernel lags.
	follow := policy.Ask{Host: "10.0.0.1", Groups: []identity.Group{"a"}}
	u, err := c.Watch(t.Context(), follow)
	if err != nil {
		t.Fatal(err)
	}
	held, err := u.Apply(nil)
	if err != nil {
		t.Fatal(err)
	}
	follow.Since, follow.InForce = u.Revision, u.Revision
	told := make(chan policy.Update, 1)
	go func() {
		u, err := c.Watch(t.Context(), follow)
		if err != nil {
			t.Error(err)
		}
		told <- u
	}()
	got := ask(t, a.Server, "admin", "POST "+remove+"?wait=in-force&timeout=300ms", body(item("a", "b", "tcp", "1")))
	var answer struct {
		InForce                   bool `json:"in_force"`
		Known, Reporting, Unknown int
		Lagging                   []string
		Revision                  revision.Revision
	}
	if err := json.Unmarshal([]byte(got.body), &answer); err != nil {
		t.Fatal(err)
	}
	if got.code != 202 || answer.InForce || !slices.Equal(answer.Lagging, []string{"10.0.0.1"}) || answer.Known != 1 || answer.Reporting != 1 || answer.Revision.IsZero() {
		t.Errorf("with an agent that lags: %d %s, want 202 that names it", got.code, got.body)
	}
	// Once it reports, the change is in force.
	u = <-told
	if held, err = u.Apply(held); err != nil || len(held) != 0 {
		t.Fatalf("agent holds %v, %v", held, err)
	}
	follow.Since, follow.InForce = u.Revision, u.Revision
	go func() {
		u, err := c.Watch(t.Context(), follow)
		if err != nil {
			t.Error(err)
		}
		told <- u
	}()
	if f, err = c.DeleteInForce(t.Context(), []policy.Policy{p}, 20*time.Second); err != nil || !f.InForce || f.Reporting != 1 {
		t.Errorf("with an agent that reports: %+v, %v", f, err)
	}
	// What does not touch its groups does not wait for it.
	other := policytest.Of(t, "x y tcp 1")
	if f, err = c.CreateInForce(t.Context(), []policy.Policy{other}, 20*time.Second); err != nil || !f.InForce {
		t.Errorf("change of others: %+v, %v", f, err)
	}
	// Agents of the deployed kind say nothing.
	ask(t, a.Server, "", "GET "+policyhttp.PathLastUpdated, "")
	if f, err = c.CreateInForce(t.Context(), []policy.Policy{other}, 100*time.Millisecond); err != nil || f.InForce || !f.OldAgents {
		t.Errorf("beside a deployed agent: %+v, %v, want not in force", f, err)
	}
	if err := c.Create(t.Context(), []policy.Policy{p}); err != nil {
		t.Fatal(err)
	}
	<-told
	for _, q := range []string{"?wait=yes", "?wait=in-force&timeout=x", "?wait=in-force&timeout=-1s", "?wait=in-force;x"} {
		if got := ask(t, a.Server, "admin", "POST "+policies+q, body(item("a", "b", "tcp", "1"))); got.code != 400 {
			t.Errorf("%s: %d, want 400", q, got.code)
		}
	}
}

// secure serves the internal API with mutual TLS and returns what makes clients of certificates.
func secure(t *testing.T, b policyhttp.Backend, o policyhttp.InternalOptions) (string, func(name string, addrs ...string) *tls.Config) {
	t.Helper()
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string, addrs ...string) service.Certificates {
		var as []netip.Addr
		for _, a := range addrs {
			as = append(as, netip.MustParseAddr(a))
		}
		cert, key, err := ca.Issue(name, as...)
		if err != nil {
			t.Fatal(err)
		}
		return service.Certificates{CA: ca.CertFile(), Cert: cert, Key: key}
	}
	tc, err := issue("server", "127.0.0.1").Server()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- service.Run(ctx, discard, service.HTTP("internal", ln, tc, policyhttp.InternalHandler(b, discard, o), service.DefaultLimits, discard))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "https://" + ln.Addr().String(), func(name string, addrs ...string) *tls.Config {
		c, err := issue(name, addrs...).Client()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

func TestCertificatesActForTheirHostOnly(t *testing.T) {
	s, cert := secure(t, backendOf(openStore(t, 0)), policyhttp.InternalOptions{BindHosts: true})
	c := policyhttp.NewClient([]string{s}, cert("cell", "10.0.0.1"), policyhttp.ClientOptions{})
	defer c.Close()
	for host, may := range map[string]bool{"10.0.0.1": true, "10.0.0.2": false, "cell": true, "other": false, "*": false, "c*": false, "c*ell": false} {
		_, err := c.Watch(t.Context(), policy.Ask{Host: host})
		if (err == nil) != may || err != nil && !errors.Is(err, fault.Denied) {
			t.Errorf("watch for %s: %v, want it served: %v", host, err, may)
		}
	}
	if _, err := c.Tag(t.Context(), identity.IngressRouter, identity.Router); err != nil {
		t.Errorf("tag of a router: %v", err)
	}
	if _, err := c.Tag(t.Context(), "g", "other"); !errors.Is(err, fault.Denied) {
		t.Errorf("tag of another kind: %v, want denied", err)
	}
	if _, err := c.Tag(t.Context(), "g", identity.Router); !errors.Is(err, fault.Denied) { // which nobody would ever free
		t.Errorf("tag of another router: %v, want denied", err)
	}
}

// TestAHostHasOneName: however an address is written, it is the same host.
func TestAHostHasOneName(t *testing.T) {
	var hosts []string
	b := backendOf(openStore(t, 0))
	b.Watch = func(_ context.Context, a policy.Ask, _ time.Duration) (policy.Update, error) {
		hosts = append(hosts, a.Host)
		return policy.Update{Revision: revision.Revision{Epoch: "e", Counter: 1}}, nil
	}
	s := serve(t, b, externalOptions(), policyhttp.InternalOptions{})
	for _, host := range []string{"10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "fe80:0::1", "cell-7"} {
		if got := ask(t, s, "", "POST "+policyhttp.PathWatch, `{"host":"`+host+`","set":"`+setOf()+`","wait":0}`); got.code != 200 {
			t.Errorf("%s: %d %s", host, got.code, got.body)
		}
	}
	if want := []string{"10.0.0.1", "10.0.0.1", "fe80::1", "fe80::1", "cell-7"}; !slices.Equal(hosts, want) {
		t.Errorf("hosts are %q, want %q", hosts, want)
	}
}

func TestOnlyListedClientsAreServed(t *testing.T) {
	s, cert := secure(t, backendOf(openStore(t, 0)), policyhttp.InternalOptions{BindHosts: true, Clients: []string{"agent-*", "ops"}})
	for name, may := range map[string]bool{"agent-7": true, "ops": true, "agent": false, "xagent-7": false, "opsx": false} {
		c := policyhttp.NewClient([]string{s}, cert(name, "10.0.0.1"), policyhttp.ClientOptions{})
		_, err := c.Watch(t.Context(), policy.Ask{Host: "10.0.0.1"})
		if (err == nil) != may && (may || !errors.Is(err, fault.Denied)) {
			t.Errorf("%s: %v, want it served: %v", name, err, may)
		}
		if _, err := c.Tag(t.Context(), identity.Group("g-"+name), "other"); (err == nil) != may {
			t.Errorf("tag for %s: %v, want it given: %v", name, err, may)
		}
		c.Close()
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"a", "a", true}, {"a", "b", false}, {"", "", false}, {"*", "", false}, {"*", "x", true}, {"a*", "a", true}, {"*a", "ba", true}, {"a*b*c", "a1b2c", true},
		{"a*b*c", "ac", false}, {"a*a", "a", false}, {"*.x", "y.x", true}, {"*b*", "abc", true}, {"a**b", "ab", true},
	} {
		if got := policyhttp.Matches(c.pattern, c.name); got != c.want {
			t.Errorf("%q matches %q: %v", c.pattern, c.name, got)
		}
	}
}

func TestHealthHandler(t *testing.T) {
	store := openStore(t, 0)
	s := httptest.NewServer(policyhttp.HealthHandler(store.Ping, discard))
	defer s.Close()
	want(t, "health", ask(t, s, "", "GET /health", ""), 200, "")
	if got := ask(t, s, "", "GET /", ""); got.code != 200 || !strings.HasPrefix(got.body, "Network policy server, up for ") {
		t.Errorf("uptime: %d %s", got.code, got.body)
	}
}
