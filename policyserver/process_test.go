package policyserver_test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policyserver"
)

func code(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	return 0
}

// process is the server in a process of its own.
type process struct {
	*testkit.Process
	policyserver.Addresses
}

// launch runs the program until it serves.
func launch(t testing.TB, bin, config string) process {
	t.Helper()
	var at policyserver.Addresses
	return process{testkit.Launch(t, exec.Command(bin, "--config-file="+config), nil, &at), at}
}

func TestTheProgramEndsAsDeployedOnesDo(t *testing.T) {
	bin, w := testkit.Program(t, "policy-server"), newWorld(t, sqldb.SQLite)
	for _, c := range []struct {
		args []string
		code int
		text string
	}{
		{nil, 1, "-config-file"},
		{[]string{"-nonsense"}, 2, "Usage"},
		{[]string{"-config-file", "x.json", "import"}, 2, "Usage"},
		{[]string{"-config-file", filepath.Join(w.dir, "none.json")}, 1, "read configuration"},
		{[]string{"--config-file=" + w.file(t, "bad.json", `{"listen_port":1,"log_level":"loud"}`)}, 1, "log_level"},
		{[]string{"import", "-config-file", w.file(t, "worse.json", `{`)}, 1, "not a JSON object"},
	} {
		out, err := exec.Command(bin, c.args...).CombinedOutput()
		if code(err) != c.code || !strings.Contains(string(out), c.text) {
			t.Errorf("%q: %d %s, want %d and %q", c.args, code(err), out, c.code, c.text)
		}
	}
	b, err := json.Marshal(w.both(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	launch(t, bin, w.file(t, "config.json", string(b))).End(t)
}

// TestNothingAcknowledgedIsLostWhenKilled kills the server again and again while policies are made.
func TestNothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	bin, w := testkit.Program(t, "policy-server"), newWorld(t, sqldb.Postgres)
	b, err := json.Marshal(w.both(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	config, tc := w.file(t, "config.json", string(b)), w.client(t, "agent")
	made := map[policy.Policy]bool{}
	for round := range 4 {
		server := launch(t, bin, config)
		c := person(t, "https://"+server.External, tc, "admin")
		killed := time.AfterFunc(time.Duration(50+100*round)*time.Millisecond, func() { server.Cmd.Process.Kill() })
		for n := 1; ; n++ {
			p := policy.Policy{Source: "web", Destination: identity.Group("api"), Protocol: policy.TCP, Ports: policy.Ports{First: uint16(round + 1), Last: uint16(1000 + n)}}
			if c.Create(t.Context(), []policy.Policy{p}) != nil {
				break
			}
			made[p] = true
		}
		killed.Stop()
		server.Wait()
	}
	server := launch(t, bin, config)
	ps, err := person(t, "https://"+server.External, tc, "admin").List(t.Context(), policy.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		delete(made, p)
	}
	if len(made) > 0 || len(ps) == 0 {
		t.Errorf("%d policies that were acknowledged are lost; %d are there", len(made), len(ps))
	}
	u, err := agent(t, server.Internal, tc).Watch(t.Context(), policy.Ask{Host: "h", Groups: []identity.Group{"api"}})
	if err != nil || u.Count != len(ps) {
		t.Errorf("an agent is told %d policies, %v, want %d", u.Count, err, len(ps))
	}
}
