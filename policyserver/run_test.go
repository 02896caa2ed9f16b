package policyserver_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policyserver"
	"code.cloudfoundry.org/silk/revision"
)

func TestBothAPIsServeOneDatabase(t *testing.T) {
	for _, engine := range []string{sqldb.SQLite, sqldb.Postgres} {
		t.Run(engine, func(t *testing.T) {
			w := newWorld(t, engine)
			r := start(t, w.load(t, w.both(t, nil)), quiet(t))
			tc := w.client(t, "agent")
			admin, shop, a := person(t, "https://"+r.External, tc, "admin"), person(t, "https://"+r.External, tc, "shop"), agent(t, r.Internal, tc)
			if err := shop.Create(t.Context(), []policy.Policy{of(t, "shop-web shop-db tcp 5432")}); err != nil {
				t.Fatal(err)
			}
			if err := shop.Create(t.Context(), []policy.Policy{of(t, "shop-web bank tcp 1")}); !errors.Is(err, fault.Denied) {
				t.Errorf("policy to a foreign group: %v, want denied", err)
			}
			if err := admin.Create(t.Context(), []policy.Policy{of(t, "bank shop-db tcp 5432")}); err != nil {
				t.Fatal(err)
			}
			if ps, err := shop.List(t.Context(), policy.Filter{}); err != nil || len(ps) != 1 {
				t.Errorf("shop sees %v, %v, want its own", ps, err)
			}
			if who, err := admin.WhoAmI(t.Context()); err != nil || who != "ada" {
				t.Errorf("whoami: %q, %v", who, err)
			}
			ask := policy.Ask{Host: "10.0.0.1", Groups: []identity.Group{"shop-db"}}
			var u policy.Update
			eventually(t, "the agent is told both", func() bool {
				var err error
				if u, err = a.Watch(t.Context(), ask); err != nil {
					t.Fatal(err)
				}
				return u.Count == 2
			})
			ask.Since, ask.InForce = u.Revision, u.Revision
			told := make(chan policy.Update, 1)
			go func() {
				u, err := a.Watch(t.Context(), ask)
				if err != nil {
					t.Error(err)
				}
				told <- u
			}()
			if err := admin.Delete(t.Context(), []policy.Policy{of(t, "bank shop-db tcp 5432")}); err != nil {
				t.Fatal(err)
			}
			if u := <-told; u.Full || len(u.Gone) != 1 || u.Count != 1 {
				t.Errorf("told %+v, want what ended", u)
			}
			if code, body := fetch(t, "http://"+r.Health+"/health"); code != 200 || body != "" {
				t.Errorf("health: %d %s", code, body)
			}
			for _, addr := range []string{r.Health, r.Debug} {
				_, text := fetch(t, "http://"+addr+"/metrics")
				for _, sample := range []string{"silk_policy_server_policies 1", `silk_policy_server_requests_total{api="external",code="200",route="policies"} 3`, `silk_policy_server_tags{state="used"}`} {
					if !strings.Contains(text, sample) {
						t.Errorf("metrics of %s lack %s", addr, sample)
					}
				}
			}
			// A person with a certificate only is nobody here, and an agent without one does not get in.
			if _, err := person(t, "https://"+r.External, tc, "").List(t.Context(), policy.Filter{}); !errors.Is(err, fault.Denied) {
				t.Errorf("without a token: %v, want denied", err)
			}
			bare := w.client(t, "bare")
			bare.GetClientCertificate = nil
			if _, err := agent(t, r.Internal, bare).Watch(t.Context(), policy.Ask{Host: "h"}); err == nil {
				t.Error("an agent without a certificate was served")
			}
		})
	}
}

func TestWhoComesWithACertificate(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	keys := w.both(t, map[string]any{
		"mtls":             map[string]any{"ca_file": w.ca.CertFile(), "admins": []string{"ops"}, "writers": map[string][]string{"ci": {"shop-*"}}},
		"internal_clients": []string{"agent"}, "bind_underlay_to_certificate": true,
	})
	r := start(t, w.load(t, keys), quiet(t))
	if who, err := person(t, "https://"+r.External, w.client(t, "ops"), "").WhoAmI(t.Context()); err != nil || who != "ops" {
		t.Errorf("whoami: %q, %v", who, err)
	}
	ci := person(t, "https://"+r.External, w.client(t, "ci"), "")
	if err := errors.Join(ci.Create(t.Context(), []policy.Policy{of(t, "shop-a shop-b tcp 1")})); err != nil {
		t.Error(err)
	}
	if err := ci.Create(t.Context(), []policy.Policy{of(t, "shop-a b tcp 1")}); !errors.Is(err, fault.Denied) {
		t.Errorf("policy to a foreign group: %v, want denied", err)
	}
	if _, err := person(t, "https://"+r.External, w.client(t, "other"), "").List(t.Context(), policy.Filter{}); !errors.Is(err, fault.Denied) {
		t.Errorf("another certificate: %v, want denied", err)
	}
	if _, err := person(t, "https://"+r.External, w.client(t, "other"), "admin").List(t.Context(), policy.Filter{}); err != nil {
		t.Errorf("another certificate with a token: %v", err)
	}
	if _, err := agent(t, r.Internal, w.client(t, "ops")).Watch(t.Context(), policy.Ask{Host: "127.0.0.1"}); !errors.Is(err, fault.Denied) {
		t.Errorf("internal api for a client that is not listed: %v, want denied", err)
	}
	if _, err := agent(t, r.Internal, w.client(t, "agent")).Watch(t.Context(), policy.Ask{Host: "127.0.0.1"}); err != nil {
		t.Errorf("internal api for a client that is listed: %v", err)
	}
}

// TestPlainTextOnATLSPort: scripts of deployments take an HTTP answer, whatever it says, for a server that is up.
func TestPlainTextOnATLSPort(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	r := start(t, w.load(t, w.both(t, nil)), quiet(t))
	for _, addr := range []string{r.External, r.Internal} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		c.Write([]byte("GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
		line, err := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if line != "HTTP/1.0 400 Bad Request\r\n" {
			t.Errorf("plain text is answered %q, %v", line, err)
		}
	}
}

func TestSpaceDevelopers(t *testing.T) {
	w, f := newWorld(t, sqldb.SQLite), newFoundry(t)
	f.users["admin"] = map[string]any{"sub": "a", "user_name": "admin", "scope": []string{"network.admin"}}
	f.users["dev"] = map[string]any{"sub": "d", "user_name": "dev", "scope": []string{"network.write"}}
	f.apps["web"], f.apps["db"], f.apps["bank"] = "s1", "s2", "s3"
	f.spaces["d"] = []string{"s1", "s2"}
	keys := w.both(t, f.keys())
	delete(keys, "token_file")
	r := start(t, w.load(t, keys), discard)
	tc := w.client(t, "x")
	admin, dev := person(t, "https://"+r.External, tc, "admin"), person(t, "https://"+r.External, tc, "dev")
	for text, may := range map[string]bool{"web db tcp 1": true, "web bank tcp 1": false, "bank db tcp 1": false, "web ghost tcp 1": false, "ghost ghost tcp 1": false} {
		if err := dev.Create(t.Context(), []policy.Policy{of(t, text)}); (err == nil) != may || err != nil && !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v, want it made: %v", text, err, may)
		}
	}
	if err := admin.Create(t.Context(), []policy.Policy{of(t, "web bank tcp 1"), of(t, "ghost db udp 1"), of(t, "x y tcp 1")}); err != nil {
		t.Fatal(err)
	}
	if ps, err := dev.List(t.Context(), policy.Filter{}); err != nil || len(ps) != 1 || ps[0] != of(t, "web db tcp 1") {
		t.Errorf("a developer sees %v, %v", ps, err)
	}
	if err := dev.Delete(t.Context(), []policy.Policy{of(t, "web bank tcp 1")}); err != nil {
		t.Errorf("the end of a policy from one's own app: %v", err)
	}
	if err := dev.Delete(t.Context(), []policy.Policy{of(t, "x y tcp 1")}); !errors.Is(err, fault.Denied) {
		t.Errorf("the end of others' policy: %v, want denied", err)
	}
	f.with(func() { f.fail = func(path string) int { return map[bool]int{true: 502}[path == "/v3/apps"] } })
	if err := dev.Create(t.Context(), []policy.Policy{of(t, "web db tcp 2")}); err == nil || !strings.Contains(err.Error(), "check access failed") {
		t.Errorf("without cloud controller: %v", err)
	}
	f.with(func() { f.fail = func(path string) int { return map[bool]int{true: 503}[path == "/check_token"] } })
	if err := person(t, "https://"+r.External, tc, "unknown").Create(t.Context(), []policy.Policy{of(t, "web db tcp 2")}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without uaa: %v, want unavailable", err)
	}
}

// TestADeveloperAmongManyApps: with more apps than Cloud Controller is asked about one by one, the answer is the same.
func TestADeveloperAmongManyApps(t *testing.T) {
	w, f := newWorld(t, sqldb.SQLite), newFoundry(t)
	f.users["admin"] = map[string]any{"sub": "a", "scope": []string{"network.admin"}}
	f.users["dev"] = map[string]any{"sub": "d", "scope": []string{"network.write"}}
	f.apps["web"], f.apps["db"] = "s1", "s2"
	f.spaces["d"] = []string{"s1", "s2"}
	all := []policy.Policy{of(t, "web db tcp 1"), of(t, "web ghost tcp 1")}
	for n := range 600 {
		app := fmt.Sprintf("foreign-%d", n)
		f.apps[app] = "s3"
		all = append(all, of(t, "web "+app+" tcp 1"), of(t, app+" db tcp 1"))
	}
	r := start(t, w.load(t, w.both(t, f.keys())), discard)
	tc := w.client(t, "x")
	if err := person(t, "https://"+r.External, tc, "admin").Create(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	dev := person(t, "https://"+r.External, tc, "dev")
	if ps, err := dev.List(t.Context(), policy.Filter{}); err != nil || len(ps) != 1 || ps[0] != all[0] {
		t.Errorf("a developer sees %d policies, %v, want the first", len(ps), err)
	}
	if err := dev.Delete(t.Context(), all); err != nil { // each has one end that is theirs
		t.Errorf("delete: %v", err)
	}
	if err := dev.Create(t.Context(), all); !errors.Is(err, fault.Denied) {
		t.Errorf("create: %v, want denied", err)
	}
}

func TestAnUnknownHistoryEndsWithTheDatabase(t *testing.T) {
	w := newWorld(t, sqldb.SQLite)
	cfg := w.load(t, w.both(t, nil))
	r := start(t, cfg, discard)
	a := agent(t, r.Internal, w.client(t, "agent"))
	before, err := a.Watch(t.Context(), policy.Ask{Host: "h"})
	if err != nil {
		t.Fatal(err)
	}
	if err := policyserver.RenewEpoch(t.Context(), cfg, discard); err != nil {
		t.Fatal(err)
	}
	ask := policy.Ask{Host: "h", Since: before.Revision}
	eventually(t, "agents hear of the new epoch", func() bool {
		u, err := a.Watch(t.Context(), ask)
		if err != nil {
			t.Fatal(err)
		}
		return u.Full && u.Revision.Epoch != before.Revision.Epoch && u.Revision != (revision.Revision{})
	})
}

func TestStalePoliciesAreCleanedUp(t *testing.T) {
	w, f := newWorld(t, sqldb.SQLite), newFoundry(t)
	f.users["admin"] = map[string]any{"sub": "a", "scope": []string{"network.admin"}}
	var all []policy.Policy
	for _, dst := range []string{"b", "c", "d", "e", "f", "g", "h", "gone1", "gone2", "gone3"} {
		all = append(all, of(t, "a "+dst+" tcp 1"))
		if !strings.HasPrefix(dst, "gone") {
			f.apps[dst] = "s"
		}
	}
	f.apps["a"] = "s"
	keys := w.both(t, f.keys())
	keys["cleanup_max_share"] = 0.2
	r := start(t, w.load(t, keys), discard)
	c := person(t, "https://"+r.External, w.client(t, "x"), "admin")
	if err := c.Create(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	clean := func(query string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+r.External+"/networking/v0/external/policies/cleanup"+query, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "bearer admin")
		resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: w.client(t, "x"), DisableKeepAlives: true}}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := new(bytes.Buffer)
		b.ReadFrom(resp.Body)
		return resp.StatusCode, b.String()
	}
	left := func() int {
		t.Helper()
		ps, err := c.List(t.Context(), policy.Filter{})
		if err != nil {
			t.Fatal(err)
		}
		return len(ps)
	}
	// Whatever is wrong with Cloud Controller, nothing is removed.
	for name, fail := range map[string]func(path string) int{
		"error":  func(path string) int { return map[bool]int{true: 500}[path == "/v3/apps"] },
		"denied": func(path string) int { return map[bool]int{true: 403}[path == "/v3/apps"] },
		"uaa":    func(path string) int { return map[bool]int{true: 503}[path == "/v3/apps"] },
	} {
		f.with(func() { f.fail = fail })
		if code, body := clean(""); code != 500 || body != `{"error": "policies cleanup failed"}` || left() != 10 {
			t.Errorf("%s: %d %s, %d left", name, code, body, left())
		}
	}
	f.with(func() { f.fail, f.hide = nil, true })
	if code, body := clean(""); code != 500 || left() != 10 {
		t.Errorf("cloud controller shows no app: %d %s, %d left", code, body, left())
	}
	f.with(func() { f.hide = false })
	// A share at a time, and the rest by force.
	if code, body := clean(""); code != 200 || !strings.HasPrefix(body, `{"total_policies":2,`) || !strings.Contains(body, `"gone1"`) || left() != 8 {
		t.Errorf("clean up: %d %s, %d left", code, body, left())
	}
	if code, body := clean("?force=true"); code != 200 || !strings.HasPrefix(body, `{"total_policies":1,`) || left() != 7 {
		t.Errorf("clean up by force: %d %s, %d left", code, body, left())
	}
	if code, body := clean(""); code != 200 || body != `{"total_policies":0,"policies":[]}` {
		t.Errorf("nothing to clean up: %d %s", code, body)
	}
	// It also happens by itself.
	keys["cleanup_interval"] = 1
	f.with(func() { delete(f.apps, "b") })
	start(t, w.load(t, keys), discard)
	eventually(t, "the stale policy goes", func() bool { return left() == 6 })
}

// TestSecretsAreToldToNobody: neither the log nor an error has them.
func TestSecretsAreToldToNobody(t *testing.T) {
	w, f := newWorld(t, sqldb.SQLite), newFoundry(t)
	var out bytes.Buffer
	keys := w.both(t, f.keys())
	keys["uaa_client_secret"] = "hidden-secret"
	maps.Copy(keys, map[string]any{"auth": []string{"tokens", "uaa"}})
	r := start(t, w.load(t, keys), slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
	f.with(func() { f.fail = func(string) int { return 500 } })
	c := person(t, "https://"+r.External, w.client(t, "x"), "hidden-token")
	if _, err := c.List(t.Context(), policy.Filter{}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("%v, want unavailable", err)
	}
	if _, err := person(t, "https://"+r.External, w.client(t, "x"), "admin").List(t.Context(), policy.Filter{}); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	for _, secret := range []string{"hidden-secret", "hidden-token", "bearer admin"} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("the log has %s:\n%s", secret, out.String())
		}
	}
}
