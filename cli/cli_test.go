package cli_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/cli"
)

func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = cli.Run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestVersion(t *testing.T) {
	if code, out, _ := run(t, "version"); code != 0 || !strings.HasPrefix(out, "silk ") || !strings.Contains(out, "go1.") {
		t.Errorf("status %d, output %q", code, out)
	}
}

func TestMistakesAreExplained(t *testing.T) {
	config := filepath.Join(t.TempDir(), "daemon.json")
	if err := os.WriteFile(config, []byte(`{"connectivity_server_url": "https://127.0.0.1:1", "ca_cert_file": "/nowhere/ca.crt"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.json")
	if err := os.WriteFile(broken, []byte(`{`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want string
	}{
		{"nonsense", "unknown command"},
		{"status --port 1", "is it running"},
		{"lab nonsense", `unknown command "nonsense" for "silk lab"`},
		{"leases --config /nowhere/daemon.json", "name it with --config"},
		{"leases --config " + broken, "broken.json"},
		{"leases --config " + config, "/nowhere/ca.crt"},
		{"lab --dir /nowhere/lab status", "silk lab up makes one"},
		{"lab --name Bad up", "lower-case letter"},
		{"lab exec host1", "requires at least 2"},
		{"lab up --hosts 1000", "1 to 100"},
	} {
		code, out, errs := run(t, strings.Fields(c.args)...)
		if code != 1 || !strings.Contains(errs, c.want) || !strings.HasPrefix(errs, "silk: ") {
			t.Errorf("silk %s: status %d, output %q, errors %q, want %q among them", c.args, code, out, errs, c.want)
		}
	}
}

// TestLeasesReadsTheDaemonsConfigurationWhereItIs: where the unit file of silk-daemon has it.
func TestLeasesReadsTheDaemonsConfigurationWhereItIs(t *testing.T) {
	unit, err := os.ReadFile("../packaging/systemd/silk-daemon.service")
	if err != nil {
		t.Fatal(err)
	}
	_, file, ok := strings.Cut(string(unit), "silk-daemon -config ")
	file, _, _ = strings.Cut(file, "\n")
	if _, out, _ := run(t, "leases", "--help"); !ok || !strings.Contains(out, `"`+file+`"`) {
		t.Errorf("the unit says %q; help says\n%s", file, out)
	}
}

func TestHelpNamesTheCommandsAndNotTheHiddenOnes(t *testing.T) {
	code, out, _ := run(t, "lab", "--help")
	if code != 0 {
		t.Errorf("status %d", code)
	}
	for _, name := range []string{"up", "down", "status", "exec", "add", "add-host", "rm", "kill", "partition", "heal"} {
		if !strings.Contains(out, "\n  "+name+" ") {
			t.Errorf("help does not name %s:\n%s", name, out)
		}
	}
	for _, name := range []string{"supervise", "keep", "launch", "respond"} {
		if strings.Contains(out, "\n  "+name+" ") {
			t.Errorf("help names %s", name)
		}
	}
}
