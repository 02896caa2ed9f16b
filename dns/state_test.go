package dns_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestBrokenStateIsPutAside: cut short, another program's, or empty. The program starts without it and says so.
func TestBrokenStateIsPutAside(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	cfg := settings(t, natsAt(n))
	p := launch(t, cfg)
	p.counts(t, "silk_dns_nats_connected", "1")
	emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	p.End(t)
	n.Kill()
	file := filepath.Join(cfg["state_dir"].(string), "names")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"torn": whole[:len(whole)-5], "empty": {}, "foreign": []byte("{\"names\":[]}\n"), "longer": append(whole[:len(whole):len(whole)], 0)} {
		os.Remove(file + ".broken")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		p = launch(t, cfg)
		if got, err := ask(t.Context(), p.DNS[0], "api.apps.internal"); err != nil || got != "SERVFAIL" {
			t.Errorf("%s: answer %q, %v, want SERVFAIL: nothing is known", name, got, err)
		}
		kept, err := os.ReadFile(file + ".broken")
		if err != nil || string(kept) != string(b) || !strings.Contains(p.Log(), "saved names cannot be used") {
			t.Errorf("%s: put aside %q, %v\n%s", name, kept, err, p.Log())
		}
		p.Kill()
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	p = launch(t, cfg)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	p.answers(t, soon, "other.apps.internal", "NXDOMAIN")
}

// TestAFullDiskIsSurvived and said, and over when it is over.
func TestAFullDiskIsSurvived(t *testing.T) {
	if os.Getuid() != 0 {
		testkit.Require(t, "root", errors.New("not run by root"))
	}
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	dir := t.TempDir()
	mount := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k", "none", dir)
	if out, err := mount.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	cfg := settings(t, natsAt(n), object{"state_dir": filepath.Join(dir, "state")})
	p := launch(t, cfg)
	p.counts(t, "silk_dns_nats_connected", "1")
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 64<<10), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	testkit.Until(t, 2*soon, "a full disk is said", func() bool { return strings.Contains(p.Log(), "state could not be stored") })
	p.counts(t, "silk_dns_healthy", "0")
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	testkit.Until(t, 2*soon, "that it is over is said", func() bool { return strings.Contains(p.Log(), "state is stored again") })
	p.counts(t, "silk_dns_healthy", "1")
	p.Kill()
	n.Kill()
	p = launch(t, cfg)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
}

// TestNoStateDirectory: one that cannot be made, or that another process has, is no reason to answer nobody.
func TestNoStateDirectory(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	for _, dir := range []string{"/proc/silk", ""} {
		p := launch(t, settings(t, natsAt(n), object{"state_dir": dir}))
		p.counts(t, "silk_dns_nats_connected", "1")
		emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
		p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
		if said := strings.Contains(p.Log(), "state directory cannot be used"); said != (dir != "") {
			t.Errorf("directory %q: said %v", dir, said)
		}
		p.End(t)
	}
	cfg := settings(t, natsAt(n))
	launch(t, cfg)
	p := launch(t, cfg)
	if !strings.Contains(p.Log(), "is another silk-dns running with it?") {
		t.Errorf("a second process with the directory says nothing of it:\n%s", p.Log())
	}
	p.End(t)
}

// TestAnUnfinishedTableIsNotTakenForWhole: what a cold process saved makes no warm one.
func TestAnUnfinishedTableIsNotTakenForWhole(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	cfg := settings(t, natsAt(n), object{"warm_duration_seconds": 60})
	p := launch(t, cfg)
	p.counts(t, "silk_dns_nats_connected", "1")
	emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	p.End(t)
	p = launch(t, cfg)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	p.answers(t, soon, "other.apps.internal", "SERVFAIL")
	p.counts(t, "silk_dns_warm", "0")
}
