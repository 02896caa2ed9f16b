package policyagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

func TestPoliciesAreEnforcedAndRemoved(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	for _, m := range []*member{web, api} {
		if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + m.key.Container); status != 200 || text != "" {
			t.Fatalf("wait for %v: %d %s", m.key, status, text)
		}
	}
	if web.reaches(api, 8080) {
		t.Fatal("no policy, and it passes")
	}
	p := tcpPolicy("web", "api", 8080)
	w.allow(r, p)
	c, err := web.dial(api, 8080)
	if err != nil || !echoes(c) {
		t.Fatalf("a policy in force, and it does not pass: %v", err)
	}
	defer c.Close()
	w.forbid(r, p)
	if web.reaches(api, 8080) {
		t.Error("a removed policy still lets new connections through")
	}
	eventually(t, "the connection of the removed policy ends", patience, func() bool { return !echoes(c) })
}

// TestTheTableComesFirst: before certificates, the server, or anything else that may fail.
func TestTheTableComesFirst(t *testing.T) {
	w := newWorld(t)
	api, web := w.attach("api"), w.attach("web")
	api.listen(8080)
	eventually(t, "without an agent the network works", 10*time.Second, func() bool { return web.reaches(api, 8080) })
	r := w.start(deaf{})
	if web.reaches(api, 8080) {
		t.Error("nothing is known, and it passes")
	}
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 || text != "" {
		t.Errorf("a cycle without the server: %d %q, want it to succeed: the kernel has what is known", status, text)
	}
	status, text := r.force("/force-policy-poll-cycle?container=" + web.key.Container)
	if status != 503 || !hasText(text, "its policies are not known") {
		t.Errorf("a wait without the server: %d %q", status, text)
	}
	if status, _ := r.get(r.cfg.debugAddress(), "/ready"); status != 503 {
		t.Errorf("ready without any policies: %d", status)
	}
	r.stop()
	if web.reaches(api, 8080) {
		t.Error("the agent stopped, and it passes")
	}
}

// deaf is a feed whose server does not answer.
type deaf struct{}

func (deaf) Watch(context.Context, policy.Ask) (policy.Update, error) {
	return policy.Update{}, fault.Unavailablef("connection refused")
}

func (deaf) Tag(context.Context, identity.Group, string) (identity.Tag, error) {
	return 0, fault.Unavailablef("connection refused")
}

func TestARestartWithoutTheServerChangesNothing(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api, job := w.attach("web"), w.attach("api"), w.attach("job")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	c, err := web.dial(api, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before := w.table()
	r.stop()
	r = w.start(deaf{})
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	if !echoes(c) || !web.reaches(api, 8080) || job.reaches(api, 8080) {
		t.Errorf("after a restart without the server: connection %t, allowed %t, denied %t", echoes(c), web.reaches(api, 8080), job.reaches(api, 8080))
	}
	if after := w.table(); rulesOf(after) != rulesOf(before) {
		t.Errorf("the table is\n%s\nand was\n%s", after, before)
	}
	other := w.attach("web") // of a group whose policies are known
	if status, text := r.force("/force-policy-poll-cycle?container=" + other.key.Container); status != 200 || !other.reaches(api, 8080) {
		t.Errorf("a new member of a known group: %d %s", status, text)
	}
	fresh := w.attach("new")
	if status, text := r.force("/force-policy-poll-cycle?container=" + fresh.key.Container); status != 503 || !hasText(text, "connection refused") {
		t.Errorf("a member of an unknown group: %d %s", status, text)
	}
}

// rulesOf returns a table without its counters.
func rulesOf(table string) string {
	var b strings.Builder
	for line := range strings.Lines(table) {
		if !strings.Contains(line, "packets ") && !strings.Contains(line, "progname") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestWithoutAnyStateTheKernelKeepsItsRules: an agent that knows nothing takes nothing away.
func TestWithoutAnyStateTheKernelKeepsItsRules(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	r.stop()
	if err := os.RemoveAll(w.state); err != nil {
		t.Fatal(err)
	}
	r = w.start(deaf{})
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	if !web.reaches(api, 8080) {
		t.Error("an agent that knows nothing has cut what was allowed")
	}
	r.stop()
	r = w.start(w.store)
	w.forbid(r, tcpPolicy("web", "api", 8080))
	if web.reaches(api, 8080) {
		t.Error("a removed policy still lets through")
	}
}

// TestAStateThatCannotBeWrittenIsRead: after a reboot with a disk that has become read-only, and without policy-server.
func TestAStateThatCannotBeWrittenIsRead(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	r.stop()
	lock := filepath.Join(w.state, lockFile)
	if err := errors.Join(os.Remove(lock), os.Mkdir(lock, 0o700)); err != nil { // cannot be opened for writing
		t.Fatal(err)
	}
	w.onHost("nft delete table inet silk-policy")
	r = w.start(deaf{})
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	if !web.reaches(api, 8080) || api.reaches(web, 8080) {
		t.Errorf("allowed %t, denied %t", web.reaches(api, 8080), api.reaches(web, 8080))
	}
}

// TestATableIsThereWhateverIsKnown: where tables have no owners, somebody takes the table away from an agent that knows no policies yet and keeps the
// rules of an earlier one.
func TestATableIsThereWhateverIsKnown(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	r.force("/force-policy-poll-cycle")
	r.stop()
	if err := os.RemoveAll(w.state); err != nil {
		t.Fatal(err)
	}
	a, err := open(t.Context(), w.config(), w.ns, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	a.table.Close()
	if a.table, err = nft.Open(w.ns, nft.Options{Unowned: true}); err != nil {
		t.Fatal(err)
	}
	a.closers[0] = a.table.Close
	for _, sabotage := range []string{"nft flush ruleset", "nft flush table inet silk-policy", "nft flush chain inet silk-policy forward"} {
		w.onHost(sabotage)
		for range 2 {
			if _, err := a.enforce(t.Context()); err != nil {
				t.Fatal(err)
			}
			if web.reaches(api, 8080) {
				t.Fatalf("after %q everything passes", sabotage)
			}
		}
	}
}

// TestABadRecordIsSkippedAndNamed: it harms no other.
func TestABadRecordIsSkippedAndNamed(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api, broken, comma := w.attach("web"), w.attach("api"), w.attach("web"), w.attach("a,b")
	api.listen(8080)
	files, err := filepath.Glob(filepath.Join(w.dir.Path(), "*@"+broken.key.Container+"@*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.allow(r, tcpPolicy("web", "api", 8080))
	if !web.reaches(api, 8080) || broken.reaches(api, 8080) || comma.reaches(api, 8080) {
		t.Errorf("good %t, record broken %t, group impossible %t", web.reaches(api, 8080), broken.reaches(api, 8080), comma.reaches(api, 8080))
	}
	_, health := r.get(r.cfg.debugAddress(), "/health")
	for _, want := range []string{"skipped: record of " + broken.key.String(), "skipped: endpoint " + endpoint.Device(comma.address)} {
		if !hasText(health, want) {
			t.Errorf("health %s\ndoes not say %q", health, want)
		}
	}
	if status, text := r.force("/force-policy-poll-cycle?container=" + comma.key.Container); status != 422 || !hasText(text, "commas") {
		t.Errorf("wait for what can never be: %d %q", status, text)
	}
	if status, _ := r.force("/force-policy-poll-cycle?container=nobody"); status != 404 {
		t.Errorf("wait for nobody: %d", status)
	}
	if _, metrics := r.get(r.cfg.debugAddress(), "/metrics"); !hasText(metrics, "silk_policy_agent_skipped 2") {
		t.Error("they are not counted")
	}
}

func TestWhoeverComesAndGoesIsFollowed(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080), tcpPolicy("late", "api", 8080))
	late := w.attach("late") // nobody tells the agent
	eventually(t, "a new container's rules", 2*time.Second, func() bool { return late.reaches(api, 8080) })
	if !web.reaches(api, 8080) {
		t.Error("a new container took the rules of another")
	}
	late.detach()
	eventually(t, "a container that went is forgotten", 2*time.Second, func() bool { return !hasText(w.table(), late.address.String()) })
	ids, err := w.dir.Identities()
	if err != nil || len(ids) != 2 {
		t.Errorf("identities %+v, %v, want those of the two that are left", ids, err)
	}
	web.detach() // its address goes to another group at once
	heir := w.attachAs("heir", "job", web.address)
	if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=heir"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	if heir.reaches(api, 8080) {
		t.Error("an heir of an address has the rules of the container before")
	}
}

// TestIdentitiesOutliveTheAgent: who starts while it is away can see what the kernel takes its address for.
func TestIdentitiesOutliveTheAgent(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	w.allow(r, tcpPolicy("web", "api", 8080))
	r.stop()
	web.detach()
	ids, err := w.dir.Identities()
	if err != nil || len(ids) != 2 || !slices.ContainsFunc(ids, func(i endpoint.Identity) bool { return i.Address == web.address && i.Group == "web" }) {
		t.Fatalf("identities %+v, %v, want the one that is left behind among them", ids, err)
	}
	r = w.start(deaf{})
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	if ids, err := w.dir.Identities(); err != nil || len(ids) != 1 || ids[0].Address != api.address || hasText(w.table(), web.address.String()) {
		t.Errorf("identities %+v, %v, want what is left behind gone, as in\n%s", ids, err, w.table())
	}
}

// TestWhoCannotBeListedStaysClosed: an identity that the kernel has and the list has not would be given to whoever comes next. What was enforced goes on,
// and what is removed is removed.
func TestWhoCannotBeListedStaysClosed(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	list := filepath.Join(w.dir.Path(), ".identities")
	if err := os.Rename(list, list+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(list, 0o700); err != nil { // no file can take its place
		t.Fatal(err)
	}
	late := w.attach("web")
	if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + late.key.Container); status == 200 || !hasText(text, "write identities") {
		t.Errorf("wait for who cannot be listed: %d %q", status, text)
	}
	if late.reaches(api, 8080) || !web.reaches(api, 8080) {
		t.Errorf("not listed %t, listed %t", late.reaches(api, 8080), web.reaches(api, 8080))
	}
	w.forbid(r, tcpPolicy("web", "api", 8080))
	if web.reaches(api, 8080) {
		t.Error("a removed policy still lets through")
	}
	w.allow(r, tcpPolicy("web", "api", 8080))
	if err := os.Remove(list); err != nil {
		t.Fatal(err)
	}
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	eventually(t, "its rules", patience, func() bool { return late.reaches(api, 8080) })
}

func TestForeignChangesAreRepairedAndCounted(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	w.onHost("nft flush ruleset || true; nft delete table inet silk-policy || true") // refused where tables have owners
	eventually(t, "repair", patience, func() bool { return web.reaches(api, 8080) && !api.reaches(web, 8080) })
	if st, err := r.table.Stats(t.Context()); err != nil || !st.Owned {
		eventually(t, "the repair is counted", patience, func() bool {
			_, metrics := r.get(r.cfg.debugAddress(), "/metrics")
			return !hasText(metrics, "silk_policy_agent_drift_repairs_total 0")
		})
	}
}

func TestKeepEstablishedKeeps(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies(), func(c *Config) { c.KeepEstablished = true })
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	p := tcpPolicy("web", "api", 8080)
	w.allow(r, p)
	c, err := web.dial(api, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.forbid(r, p)
	if web.reaches(api, 8080) {
		t.Error("a removed policy lets a new connection through")
	}
	if !echoes(c) {
		t.Error("the established connection was cut")
	}
}

// TestWhatWasRemovedWhileTheAgentWasAwayIsCut at its start.
func TestWhatWasRemovedWhileTheAgentWasAwayIsCut(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	api.listen(8081)
	w.allow(r, tcpPolicy("web", "api", 8080), tcpPolicy("web", "api", 8081))
	stays, err1 := web.dial(api, 8080)
	goes, err2 := web.dial(api, 8081)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	defer stays.Close()
	defer goes.Close()
	r.stop()
	if err := w.store.Delete(t.Context(), []policy.Policy{tcpPolicy("web", "api", 8081)}); err != nil {
		t.Fatal(err)
	}
	w.start(w.store)
	eventually(t, "the connection of the removed policy ends", 2*time.Second, func() bool { return !echoes(goes) })
	if !echoes(stays) {
		t.Error("the other connection was cut")
	}
}

func TestDeployedContainersAreEnforced(t *testing.T) {
	w := newWorld(t)
	store := filepath.Join(t.TempDir(), "store.json")
	r := w.start(w.policies(), func(c *Config) { c.Datastore = store })
	web, api := w.attach("none"), w.attach("none")
	for _, m := range []*member{web, api} { // the deployed plugins know no records
		files, _ := filepath.Glob(filepath.Join(w.dir.Path(), "*@"+m.key.Container+"@*"))
		if len(files) != 1 || os.Remove(files[0]) != nil {
			t.Fatal(files)
		}
	}
	api.listen(8080)
	entry := func(m *member, group string) string {
		return fmt.Sprintf(`%q:{"handle":%q,"ip":%q,"metadata":{"policy_group_id":%q,"ports":"8080, x"}}`, m.key.Container, m.key.Container, m.address, group)
	}
	text := "{" + entry(web, "web") + "," + entry(api, "api") + `,"bad":{"ip":"nonsense"},"worse":7}` + "\n"
	if err := os.WriteFile(store, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 || text != "" {
		t.Fatalf("%d %s", status, text)
	}
	w.allow(r, tcpPolicy("web", "api", 8080))
	if !web.reaches(api, 8080) {
		t.Error("a policy does not hold for containers of the deployed store")
	}
	if err := os.WriteFile(store, []byte(text[:len(text)/2]), 0o600); err != nil { // its writer overwrites it in place
		t.Fatal(err)
	}
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 {
		t.Errorf("half a store: %d %s", status, text)
	}
	if !web.reaches(api, 8080) {
		t.Error("half a store has cut containers off")
	}
	_, health := r.get(r.cfg.debugAddress(), "/health")
	if !hasText(health, "skipped: store "+store) {
		t.Errorf("health %s", health)
	}
}

func TestForceAndDebugEndpointsAnswerAsDeployed(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies(), func(c *Config) { c.ASGSyncing = true })
	for _, c := range []struct {
		method, address, path, body string
		status                      int
		want                        string
	}{
		{"GET", r.cfg.forceAddress(), "/force-policy-poll-cycle", "", 200, ""},
		{"POST", r.cfg.forceAddress(), "/force-policy-poll-cycle", "", 200, ""},
		{"GET", r.cfg.forceAddress(), "/force-policy-poll-cycle?container=", "", 400, "no container specified"},
		{"GET", r.cfg.forceAddress(), "/force-asgs-for-container?container=x", "", 405, "ASG syncing has been disabled administratively"},
		{"GET", r.cfg.forceAddress(), "/force-orphaned-asgs-cleanup?container=x", "", 405, "ASG syncing has been disabled administratively"},
		{"GET", r.cfg.debugAddress(), "/iptables-c2c-logging", "", 200, `{"enabled":false}`},
		{"PUT", r.cfg.debugAddress(), "/iptables-c2c-logging", `{"enabled":true}`, 200, `{"enabled":true}`},
		{"POST", r.cfg.debugAddress(), "/iptables-c2c-logging", `{"enabled":false}`, 200, `{"enabled":true}`},
		{"PUT", r.cfg.debugAddress(), "/iptables-c2c-logging", `{`, 400, `{ "error": "decoding request body as json" }`},
		{"PUT", r.cfg.debugAddress(), "/iptables-c2c-logging", `{}`, 400, `{ "error": "missing required key 'enabled'" }`},
		{"GET", r.cfg.debugAddress(), "/log-level", "", 200, ""},
		{"GET", r.cfg.debugAddress(), "/ready", "", 200, `{"status":"ready"}`},
		{"GET", r.cfg.debugAddress(), "/health", "", 200, `{"status":"ready"}`},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+c.address+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || string(b) != c.want {
			t.Errorf("%s %s %s: %d %q, want %d %q", c.method, c.path, c.body, resp.StatusCode, b, c.status, c.want)
		}
	}
}

// patience bounds the wait for what takes a second at most on a machine that has time: the tests share two processors with others, and the
// benchmarks measure it. It is far less than the next look that needs no event.
const patience = 4 * time.Second
