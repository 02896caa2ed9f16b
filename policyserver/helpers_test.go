package policyserver_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policyserver"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// quiet logs what a human must look at into the test's output.
func quiet(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
}

var discard = slog.New(slog.DiscardHandler)

// world is what a policy-server of a test lives in: files, an authority, a database.
type world struct {
	dir string
	ca  *pki.CA
	db  sqldb.Config
}

func newWorld(t testing.TB, engine string) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), db: testkit.Database(t, engine)}
	var err error
	if w.ca, err = pki.OpenCA(filepath.Join(w.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) certs(t testing.TB, name string) service.Certificates {
	t.Helper()
	cert, key, err := w.ca.Issue(name, netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	return service.Certificates{CA: w.ca.CertFile(), Cert: cert, Key: key}
}

func (w *world) client(t testing.TB, name string) *tls.Config {
	t.Helper()
	tc, err := w.certs(t, name).Client()
	if err != nil {
		t.Fatal(err)
	}
	return tc
}

// file writes a file and returns its path.
func (w *world) file(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tokens are those of the token file: admin may do everything, shop writes shop-*.
func (w *world) tokens(t testing.TB) string {
	hash := func(s string) string {
		h := sha256.Sum256([]byte(s))
		return hex.EncodeToString(h[:])
	}
	return w.file(t, "tokens.json", `{"tokens":[{"name":"ada","sha256":"`+hash("admin")+`","admin":true},{"name":"shop","sha256":"`+hash("shop")+`","groups":["shop-*"]}]}`)
}

// both returns the keys of a server of both APIs, with tokens, on free ports.
func (w *world) both(t testing.TB, more map[string]any) map[string]any {
	t.Helper()
	c := w.certs(t, "localhost")
	keys := map[string]any{
		"listen_host": "127.0.0.1", "listen_port": 0, "internal_listen_port": 0, "health_check_port": 0, "debug_server_port": 0,
		"ca_cert_file": c.CA, "server_cert_file": c.Cert, "server_key_file": c.Key, "enable_tls": true, "token_file": w.tokens(t), "database": w.db,
	}
	for k, v := range more {
		keys[k] = v
	}
	return keys
}

func (w *world) load(t testing.TB, keys map[string]any) policyserver.Config {
	t.Helper()
	b, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := policyserver.Load(w.file(t, "config.json", string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// running is a policy-server in this process.
type running struct {
	policyserver.Addresses
	stop func() error // ends it and returns what Run returned; safe to call again
}

func start(t testing.TB, cfg policyserver.Config, log *slog.Logger) *running {
	t.Helper()
	started := make(chan policyserver.Addresses, 1)
	cfg.Started = func(a policyserver.Addresses) { started <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- policyserver.Run(ctx, cfg, log) }()
	stopped := false
	r := &running{stop: func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("policy-server ended with %v", err)
		}
	})
	select {
	case r.Addresses = <-started:
	case err := <-done:
		stopped = true
		t.Fatalf("policy-server ended with %v before it served", err)
	case <-time.After(time.Minute):
		t.Fatal("policy-server does not serve")
	}
	return r
}

// person returns a client of the external API with a token.
func person(t testing.TB, url string, tc *tls.Config, token string) *policyhttp.Client {
	o := policyhttp.ClientOptions{Timeout: 15 * time.Second}
	if token != "" {
		o.Token = func(context.Context) (string, error) { return token, nil }
	}
	c := policyhttp.NewClient([]string{url}, tc, o)
	t.Cleanup(c.Close)
	return c
}

func agent(t testing.TB, addr string, tc *tls.Config) *policyhttp.Client {
	c := policyhttp.NewClient([]string{"https://" + addr}, tc, policyhttp.ClientOptions{Timeout: 15 * time.Second, Wait: 5 * time.Second})
	t.Cleanup(c.Close)
	return c
}

func fetch(t testing.TB, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	testkit.Until(t, 30*time.Second, what, ok)
}

// foundry is UAA and Cloud Controller in one: opaque tokens, apps in spaces, developers.
type foundry struct {
	*httptest.Server

	mu     sync.Mutex
	users  map[string]map[string]any // token -> what check_token says
	apps   map[string]string         // app -> space
	spaces map[string][]string       // user -> spaces
	fail   func(path string) int     // status to answer instead, 0 for none
	hide   bool                      // apps are not shown
	asgs   []string                  // GUIDs of security groups
	stamp  int                       // of them
}

func newFoundry(t testing.TB) *foundry {
	f := &foundry{users: map[string]map[string]any{}, apps: map[string]string{}, spaces: map[string][]string{}}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.Close)
	return f
}

func (f *foundry) with(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *foundry) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.ParseForm()
	if f.fail != nil {
		if code := f.fail(r.URL.Path); code != 0 {
			w.WriteHeader(code)
			return
		}
	}
	reply := func(v any) { json.NewEncoder(w).Encode(v) }
	list := func(out []any) {
		reply(map[string]any{"pagination": map[string]int{"total_pages": 1, "total_results": len(out)}, "resources": append([]any{}, out...)})
	}
	ref := func(guid string) any { return map[string]any{"data": map[string]string{"guid": guid}} }
	switch r.URL.Path {
	case "/oauth/token":
		reply(map[string]any{"access_token": "own", "expires_in": 600})
	case "/token_keys":
		reply(map[string]any{"keys": []any{}})
	case "/check_token":
		c, ok := f.users[r.Form.Get("token")]
		if !ok {
			w.WriteHeader(400)
			c = map[string]any{"error": "invalid_token"}
		}
		reply(c)
	case "/v3/apps":
		var out []any
		for g, s := range f.apps {
			if asked := slices.Contains(strings.Split(r.Form.Get("guids"), ","), g) || slices.Contains(strings.Split(r.Form.Get("space_guids"), ","), s); asked && !f.hide {
				out = append(out, map[string]any{"guid": g, "links": map[string]any{"space": map[string]string{"href": "/v3/spaces/" + s}}})
			}
		}
		list(out)
	case "/internal/v4/asg_latest_update":
		reply(map[string]string{"last_update": fmt.Sprintf("2026-01-01T00:00:00.%09dZ", f.stamp)})
	case "/v3/security_groups":
		var out []any
		for _, g := range f.asgs {
			out = append(out, map[string]any{"guid": g, "name": g, "rules": []any{map[string]string{"protocol": "all", "destination": "10.0.0.1"}}, "globally_enabled": map[string]bool{"running": true}})
		}
		list(out)
	case "/v3/roles":
		var out []any
		user := r.Form.Get("user_guids")
		for _, s := range f.spaces[user] {
			if !r.Form.Has("space_guids") || slices.Contains(strings.Split(r.Form.Get("space_guids"), ","), s) {
				out = append(out, map[string]any{"type": "space_developer", "relationships": map[string]any{"user": ref(user), "space": ref(s)}})
			}
		}
		list(out)
	default:
		http.NotFound(w, r)
	}
}

// keys are those of the deployed server's configuration.
func (f *foundry) keys() map[string]any {
	host, port, _ := strings.Cut(strings.TrimPrefix(f.URL, "http://"), ":")
	var n int
	fmt.Sscan(port, &n)
	return map[string]any{"uaa_client": "network-policy", "uaa_client_secret": "secret", "uaa_url": "http://" + host, "uaa_port": n, "cc_url": f.URL}
}

func of(t testing.TB, text string) policy.Policy {
	t.Helper()
	var p policy.Policy
	var proto, ports string
	if _, err := fmt.Sscan(text, &p.Source, &p.Destination, &proto, &ports); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.Protocol, err = policy.ParseProtocol(proto); err != nil {
		t.Fatal(err)
	}
	if p.Ports, err = policy.ParsePorts(ports); err != nil {
		t.Fatal(err)
	}
	return p
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
