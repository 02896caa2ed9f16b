package service

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

// TestAPairIsReplaced by files whose times stay the same, as tools leave them that set all times alike.
func TestAPairIsReplaced(t *testing.T) {
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	at, dir := time.Unix(1_700_000_000, 0), t.TempDir()
	install := func(name string) {
		t.Helper()
		cert, key, err := ca.Issue(name, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		for from, to := range map[string]string{cert: dir + "/cert", key: dir + "/key"} {
			b, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(to, at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	p := &pair{cert: dir + "/cert", key: dir + "/key"}
	name := func() string {
		t.Helper()
		p.checked = time.Time{} // a minute later
		c, err := p.get()
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf.Subject.CommonName
	}
	install("first")
	if n := name(); n != "first" {
		t.Errorf("certificate of %s", n)
	}
	install("second")
	if n := name(); n != "second" {
		t.Errorf("certificate of %s after it was replaced", n)
	}
	if err := os.WriteFile(dir+"/key", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := name(); n != "second" {
		t.Errorf("certificate of %s while the files do not fit", n)
	}
}
