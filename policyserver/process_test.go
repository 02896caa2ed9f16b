package policyserver_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policyserver"
)

// program builds policy-server and returns its path.
func program(t testing.TB) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "policy-server")
	cmd := exec.Command("go", "build", "-o", bin, "code.cloudfoundry.org/silk/cmd/policy-server")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

func code(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	return 0
}

// launch runs the program until it serves.
func launch(t testing.TB, bin, config string) (*exec.Cmd, policyserver.Addresses) {
	t.Helper()
	cmd := exec.Command(bin, "--config-file="+config)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var line struct {
			Msg string
			policyserver.Addresses
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "serving" {
			go func() {
				for lines.Scan() {
				}
			}()
			return cmd, line.Addresses
		}
	}
	t.Fatal("policy-server ended before it served")
	return nil, policyserver.Addresses{}
}

func TestTheProgramEndsAsDeployedOnesDo(t *testing.T) {
	bin, w := program(t), newWorld(t, sqldb.SQLite)
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
	cmd, _ := launch(t, bin, w.file(t, "config.json", string(b)))
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit code 0", err)
	}
}

// TestNothingAcknowledgedIsLostWhenKilled kills the server again and again while policies are made.
func TestNothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	bin, w := program(t), newWorld(t, sqldb.Postgres)
	b, err := json.Marshal(w.both(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	config, tc := w.file(t, "config.json", string(b)), w.client(t, "agent")
	made := map[policy.Policy]bool{}
	for round := range 4 {
		cmd, at := launch(t, bin, config)
		c := person(t, "https://"+at.External, tc, "admin")
		killed := time.AfterFunc(time.Duration(50+100*round)*time.Millisecond, func() { cmd.Process.Kill() })
		for n := 1; ; n++ {
			p := policy.Policy{Source: "web", Destination: identity.Group("api"), Protocol: policy.TCP, Ports: policy.Ports{First: uint16(round + 1), Last: uint16(1000 + n)}}
			if c.Create(t.Context(), []policy.Policy{p}) != nil {
				break
			}
			made[p] = true
		}
		killed.Stop()
		cmd.Wait()
	}
	_, at := launch(t, bin, config)
	ps, err := person(t, "https://"+at.External, tc, "admin").List(t.Context(), policy.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		delete(made, p)
	}
	if len(made) > 0 || len(ps) == 0 {
		t.Errorf("%d policies that were acknowledged are lost; %d are there", len(made), len(ps))
	}
	u, err := agent(t, at.Internal, tc).Watch(t.Context(), policy.Ask{Host: "h", Groups: []identity.Group{"api"}})
	if err != nil || u.Count != len(ps) {
		t.Errorf("an agent is told %d policies, %v, want %d", u.Count, err, len(ps))
	}
}
