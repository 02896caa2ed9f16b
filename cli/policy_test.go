package cli_test

import (
	"context"
	"crypto/sha256"
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
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policyserver"
)

var localhost = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// policyServer runs a policy-server until the test ends and tells silk by the environment how to reach it, as its admin.
func policyServer(t *testing.T) (url string, ca *pki.CA) {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.OpenCA(filepath.Join(dir, "pki"))
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("policy-server", localhost)
	if err != nil {
		t.Fatal(err)
	}
	token := func(name, secret string, more string) string {
		sum := sha256.Sum256([]byte(secret))
		return fmt.Sprintf(`{"name": %q, "sha256": %q, %s}`, name, hex.EncodeToString(sum[:]), more)
	}
	file := filepath.Join(dir, "tokens.json")
	text := `{"tokens": [` + token("ada", "secret", `"admin": true`) + "," + token("ci", "little", `"groups": ["shop-*"]`) + `]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := policyserver.Defaults()
	zero, started := 0, make(chan policyserver.Addresses, 1)
	c.ListenHost, c.ListenPort, c.EnableTLS, c.ServerCertFile, c.ServerKeyFile = "127.0.0.1", &zero, true, cert, key
	c.DebugServerPort, c.TokenFile, c.MaxPolicies = &zero, file, 3
	c.Auth = []string{"tokens"}
	c.Database = &sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(dir, "policy.db")}
	c.Started = func(a policyserver.Addresses) { started <- a }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- policyserver.Run(ctx, c, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case a := <-started:
		url = "https://" + a.External
	case err := <-done:
		done <- err
		t.Fatal(err)
	}
	t.Setenv("SILK_POLICY_SERVER", url)
	t.Setenv("SILK_POLICY_TOKEN", "bearer secret")
	t.Setenv("SILK_POLICY_CA", ca.CertFile())
	return url, ca
}

// silk runs a command and wants it to end with a status; it returns all that was printed.
func silk(t *testing.T, status int, args ...string) string {
	t.Helper()
	code, out, errs := run(t, args...)
	if code != status {
		t.Errorf("silk %q: status %d, want %d:\n%s%s", args, code, status, out, errs)
	}
	return out + errs
}

func wantText(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Errorf("no %q in\n%s", p, got)
		}
	}
}

func TestPoliciesAreAddedListedAndRemoved(t *testing.T) {
	policyServer(t)
	wantText(t, silk(t, 0, "policy", "add", "web", "api", "--ports", "8080,9000-9100"), "added web -> api tcp 8080\n", "added web -> api tcp 9000-9100\n")
	silk(t, 0, "policy", "add", "web", "dns", "--protocol", "udp", "--ports", "53")
	silk(t, 0, "policy", "add", "web", "dns", "--protocol", "udp", "--ports", "53") // it exists: no error
	list := silk(t, 0, "policy", "list")
	wantText(t, list, "SOURCE  DESTINATION  PROTOCOL  PORTS", "web     api          tcp       8080\n", "9000-9100", "udp       53")
	if got := silk(t, 0, "policy", "list", "--destination", "dns"); strings.Contains(got, "api") || !strings.Contains(got, "dns") {
		t.Errorf("only those to dns:\n%s", got)
	}
	var v struct {
		Policies []struct{ Source, Destination, Protocol, Ports string }
	}
	if err := json.Unmarshal([]byte(silk(t, 0, "policy", "list", "-o", "json")), &v); err != nil || len(v.Policies) != 3 || v.Policies[0].Ports != "8080" {
		t.Errorf("%v, %+v", err, v)
	}
	// No host reports: what is to be in force on all of them is.
	wantText(t, silk(t, 0, "policy", "remove", "web", "api", "--ports", "8080", "--wait", "--timeout", "5s"), "removed web -> api tcp 8080\n", "in force on 0 hosts")
	if got := silk(t, 0, "policy", "list"); strings.Contains(got, "8080") {
		t.Errorf("it is still there:\n%s", got)
	}
}

func TestPolicyMistakesAreExplained(t *testing.T) {
	url, _ := policyServer(t)
	absent := filepath.Join(t.TempDir(), "absent")
	for _, c := range []struct {
		env  map[string]string
		args string
		want []string
	}{
		{map[string]string{"SILK_POLICY_SERVER": ""}, "list", []string{"Give --server"}},
		{nil, "list --server policy:4002", []string{`--server "policy:4002": expected a URL`}},
		{map[string]string{"SILK_POLICY_TOKEN": ""}, "list", []string{"Give --token or --cert"}},
		{nil, "list --token wrong", []string{"401", "give --token"}},
		{nil, "list --token @" + absent, []string{"no such file"}},
		{map[string]string{"SILK_POLICY_CA": ""}, "list", []string{"certificate", "check --server and --ca"}},
		{nil, "list --ca " + absent, []string{"--ca"}},
		{nil, "list --cert x", []string{"--cert and --key go together"}},
		{nil, "list --server https://127.0.0.1:1", []string{"refused", "does not answer now"}},
		{nil, "list -o yaml", []string{`output "yaml": expected table or json`}},
		{nil, "add web api --ports 0", []string{"--ports", "within 1-65535"}},
		{nil, "add web api --protocol icmp", []string{"expected tcp or udp"}},
		{nil, "add web,x api", []string{"printable characters without commas"}},
		{nil, "add web", []string{"accepts 2 arg(s)"}},
		{map[string]string{"SILK_POLICY_TOKEN": "little"}, "add web api", []string{"--token"}},
		{nil, "list --server " + url + "/x", []string{"external API?"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			wantText(t, silk(t, 1, append([]string{"policy"}, strings.Fields(c.args)...)...), append(c.want, "silk: ")...)
		})
	}
}

// TestNamesOfAppsBecomeTheirGUIDs where Cloud Controller is behind the server.
func TestNamesOfAppsBecomeTheirGUIDs(t *testing.T) {
	const web, api = "0b6f9c1e-9e1c-4a3f-8d0e-111111111111", "0b6f9c1e-9e1c-4a3f-8d0e-222222222222"
	apps := map[string]string{
		"web":  `{"pagination":{"total_results":1},"resources":[{"guid":"` + web + `","name":"web"}]}`,
		"two":  `{"pagination":{"total_results":2},"resources":[{"guid":"g1","name":"two"},{"guid":"g2","name":"two"}]}`,
		"none": `{"pagination":{"total_results":0},"resources":[]}`,
	}
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "bearer t" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if name := r.URL.Query().Get("names"); r.URL.Path == "/v3/apps" {
			if name == "broken" {
				w.WriteHeader(http.StatusInternalServerError)
			}
			io.WriteString(w, apps[name])
			return
		}
		b, _ := io.ReadAll(r.Body)
		asked = append(asked, r.URL.Path+" "+string(b))
		io.WriteString(w, "{}")
	}))
	defer server.Close()
	t.Setenv("SILK_POLICY_SERVER", server.URL)
	t.Setenv("SILK_POLICY_TOKEN", "t")
	silk(t, 0, "policy", "add", "web", api)
	if len(asked) != 1 || !strings.Contains(asked[0], web) || !strings.Contains(asked[0], api) {
		t.Errorf("the server was asked %q", asked)
	}
	wantText(t, silk(t, 1, "policy", "add", "two", "web"), `2 apps are called "two"`, "g1, g2")
	wantText(t, silk(t, 1, "policy", "add", "none", "web"), `no app "none"`)
	// That Cloud Controller fails does not mean that there is none: a policy of the name itself would allow nothing, and say that it does.
	wantText(t, silk(t, 1, "policy", "add", "broken", "web"), `app "broken"`, "500")
	t.Setenv("SILK_POLICY_TOKEN", "expired")
	wantText(t, silk(t, 1, "policy", "add", "web", "web"), `app "web"`, "401", "give --token")
	if len(asked) != 1 {
		t.Errorf("the server was asked %q", asked)
	}
}

// TestAllWhoLagAreCounted though not all are named.
func TestAllWhoLagAreCounted(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v3/apps" {
			http.NotFound(w, r)
			return
		}
		w.WriteHeader(http.StatusAccepted)
		io.WriteString(w, `{"in_force":false,"revision":"e.1","known":500,"reporting":500,"unknown":0,"lagging":["10.0.0.1"],"behind":300,"old_agents":false}`)
	}))
	defer server.Close()
	t.Setenv("SILK_POLICY_SERVER", server.URL)
	t.Setenv("SILK_POLICY_TOKEN", "t")
	wantText(t, silk(t, 2, "policy", "add", "a", "b", "--wait"), "200 of 500 hosts", "10.0.0.1 lags", "299 hosts more lag")
	wantText(t, silk(t, 2, "policy", "add", "a", "b", "--wait", "-o", "json"), `"hosts_behind": 300`)
}
