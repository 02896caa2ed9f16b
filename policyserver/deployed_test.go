package policyserver_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policyserver"
)

// deployed returns one of the deployed configurations, with files, a database and ports that are there.
func (w *world) deployed(t testing.TB, text, name string, more map[string]any) policyserver.Config {
	t.Helper()
	c := w.certs(t, "localhost")
	var keys map[string]any
	text = strings.NewReplacer(`"DIR/ca"`, `"`+c.CA+`"`, `"DIR/c"`, `"`+c.Cert+`"`, `"DIR/k"`, `"`+c.Key+`"`).Replace(text)
	if err := json.Unmarshal([]byte(text), &keys); err != nil {
		t.Fatal(err)
	}
	keys["listen_host"], keys["debug_server_port"], keys["database"] = "127.0.0.1", 0, w.db
	for k, v := range more {
		keys[k] = v
	}
	b, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := policyserver.Load(w.file(t, name, string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestTheDeployedPairServes starts both programs as deployments configure them, on one database, and has a developer, an agent of ours and one of the deployed
// kind use them.
func TestTheDeployedPairServes(t *testing.T) {
	for _, engine := range []string{sqldb.Postgres, sqldb.MySQL} {
		t.Run(engine, func(t *testing.T) {
			w, f := newWorld(t, engine), newFoundry(t)
			f.users["dev"] = map[string]any{"sub": "d", "user_name": "dev", "scope": []string{"openid"}} // self-service needs no scope
			f.apps["web"], f.apps["api"] = "s1", "s1"
			f.spaces["d"] = []string{"s1"}
			at := f.keys()
			at["listen_port"] = 0
			out := start(t, w.deployed(t, external, "external.json", at), discard)
			in := start(t, w.deployed(t, internal, "internal.json", map[string]any{"internal_listen_port": 0, "health_check_port": 0}), discard)
			if out.Internal != "" || out.Health != "" || in.External != "" || in.Health == "" {
				t.Errorf("addresses are %+v and %+v", out.Addresses, in.Addresses)
			}
			tc := w.client(t, "agent")
			dev, cell := person(t, "https://"+out.External, tc, "dev"), agent(t, in.Internal, tc)
			ask := policy.Ask{Host: "10.0.0.1", Groups: []identity.Group{"api"}}
			go func() { // takes everything into its kernel at once
				for t.Context().Err() == nil {
					if u, err := cell.Watch(t.Context(), ask); err == nil {
						ask.Since, ask.InForce = u.Revision, u.Revision
					}
				}
			}()
			p := []policy.Policy{of(t, "web api tcp 8080")}
			eventually(t, "it is in force on one host", func() bool { // of which one program has to tell the other first
				got, err := dev.CreateInForce(t.Context(), p, 20*time.Second)
				if err != nil || !got.InForce {
					t.Fatalf("%+v, %v, want it in force", got, err)
				}
				return got.Reporting == 1
			})
			old := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: tc, DisableKeepAlives: true}}
			poll := func(path string) string {
				t.Helper()
				resp, err := old.Get("https://" + in.Internal + "/networking/v1/internal/" + path)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				b, _ := io.ReadAll(resp.Body)
				return string(b)
			}
			const rule = `{"total_policies":1,"policies":[{"source":{"id":"web","tag":"0001"},"destination":{"id":"api","tag":"0002","protocol":"tcp","ports":{"start":8080,"end":8080}}}]}`
			eventually(t, "a deployed agent is told", func() bool { return poll("policies?id=api") == rule })
			if n := poll("policies_last_updated"); len(n) < 19 || strings.Trim(n, "0123456789") != "" {
				t.Errorf("the stamp is %q", n)
			}
			eventually(t, "nobody knows what the deployed agent has in force", func() bool {
				got, err := dev.DeleteInForce(t.Context(), p, 5*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				return !got.InForce && got.OldAgents
			})
		})
	}
}
