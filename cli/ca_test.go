package cli_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
)

func TestCA(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "root.crt"), filepath.Join(dir, "root.key")
	if code, out, errs := run(t, "ca", "init", "--cert", cert, "--key", key, "--name", "test root", "--years", "2"); code != 0 || !strings.Contains(out, cert) {
		t.Fatalf("status %d, output %q, errors %q", code, out, errs)
	}
	certText, err1 := os.ReadFile(cert)
	keyText, err2 := os.ReadFile(key)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	root, err := authority.ParseRoot(certText, keyText)
	if err != nil || root.Certificate().Subject.CommonName != "test root" {
		t.Fatalf("%v, %v", root, err)
	}
	if years := time.Until(root.Certificate().NotAfter).Hours() / 24 / 365; years < 1.9 || years > 2.1 {
		t.Errorf("it lasts %v years", years)
	}
	for path, mode := range map[string]os.FileMode{cert: 0o644, key: 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	code, out, errs := run(t, "ca", "show", cert)
	for _, want := range []string{"CN=test root", "authority, ECDSA P-256", "days left", "sha256"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("status %d, errors %q, output lacks %q:\n%s", code, errs, want, out)
		}
	}
	var all []struct {
		Subject   string
		Authority bool
	}
	code, out, _ = run(t, "ca", "show", "-o", "json", cert)
	if err := json.Unmarshal([]byte(out), &all); code != 0 || err != nil || len(all) != 1 || all[0].Subject != "CN=test root" || !all[0].Authority {
		t.Errorf("status %d, %v, %s", code, err, out)
	}
}

// TestCANeverOverwrites: neither file, and half a root is not left.
func TestCANeverOverwrites(t *testing.T) {
	for name, there := range map[string]string{"the certificate": "root.crt", "the key": "root.key"} {
		dir := t.TempDir()
		path := filepath.Join(dir, there)
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		code, _, errs := run(t, "ca", "init", "--cert", filepath.Join(dir, "root.crt"), "--key", filepath.Join(dir, "root.key"))
		files, err := os.ReadDir(dir)
		if b, rerr := os.ReadFile(path); code != 1 || !strings.Contains(errs, "not overwritten") || err != nil || len(files) != 1 || rerr != nil || string(b) != "precious" {
			t.Errorf("%s: status %d, errors %q, files %v", name, code, errs, files)
		}
	}
	dir := t.TempDir() // a certificate that cannot be written takes the key back
	code, _, errs := run(t, "ca", "init", "--cert", filepath.Join(dir, "no", "root.crt"), "--key", filepath.Join(dir, "root.key"))
	if files, err := os.ReadDir(dir); code != 1 || err != nil || len(files) != 0 {
		t.Errorf("status %d, errors %q, files %v", code, errs, files)
	}
}

func TestCAMistakesAreExplained(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ args, want string }{
		{"ca init --cert a", "key"}, {"ca init --cert /nowhere/a --key /nowhere/b", "/nowhere"}, {"ca init --cert a --key b --years 0", "1 to 50"},
		{"ca show /nowhere/a", "/nowhere/a"}, {"ca show " + garbage, "no certificate"},
	} {
		if code, _, errs := run(t, strings.Fields(c.args)...); code != 1 || !strings.Contains(errs, c.want) {
			t.Errorf("silk %s: status %d, errors %q, want %q", c.args, code, errs, c.want)
		}
	}
}
