package authority_test

import (
	"crypto/x509"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestOpenSSLAgrees is an independent view of what the certificates say: what containers verify with is mostly not Go.
func TestOpenSSLAgrees(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	testkit.Require(t, "tools", err)
	dir := t.TempDir()
	write := func(name string, certs ...*x509.Certificate) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, authority.EncodeCertificates(certs), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := newRoot(t, "root")
	roots := write("roots.pem", root.Bundle().Certificates()...)
	verify := func(chain []*x509.Certificate, args ...string) string {
		args = append([]string{"verify", "-attime", strconv.FormatInt(now.Unix(), 10), "-x509_strict", "-CAfile", roots, "-untrusted", write("between.pem", chain[1:]...)}, args...)
		out, err := exec.Command(openssl, append(args, write("leaf.pem", chain[0]))...).CombinedOutput()
		if (err == nil) != strings.Contains(string(out), ": OK") {
			t.Fatalf("%v: %s", err, out)
		}
		if err == nil {
			return ""
		}
		return string(out)
	}
	i := intermediate(t, root, constraints())
	for name, want := range map[string]string{
		"foreign address": "permitted subtree violation", "own and foreign address": "permitted subtree violation", "IPv6 address": "permitted subtree violation",
		"foreign name": "permitted subtree violation", "name that ends the same": "permitted subtree violation", "wildcard above": "permitted subtree violation",
		"foreign trust domain": "permitted subtree violation", "path length": "path length constraint exceeded",
	} {
		chain := forgeries(t, i)[name]
		if got := verify(chain); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	l, err := i.Leaf(authority.Spec{Names: []string{"api.apps.internal", "*.web.apps.internal"}, Addresses: []netip.Addr{inside}, Group: "a/b"}, now)
	if err != nil {
		t.Fatal(err)
	}
	nameless, err := i.Leaf(authority.Spec{Addresses: []netip.Addr{inside}, Group: "a.b"}, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-purpose", "sslserver", "-verify_hostname", "api.apps.internal"}, {"-purpose", "sslclient"}, {"-verify_ip", inside.String()}, {"-verify_hostname", "x.web.apps.internal"},
	} {
		if got := verify(l.Chain(), args...); got != "" {
			t.Errorf("%v: %s", args, got)
		}
	}
	if got := verify(nameless.Chain(), "-verify_ip", inside.String(), "-purpose", "sslserver"); got != "" {
		t.Errorf("without names: %s", got)
	}
	if got := verify(l.Chain(), "-verify_ip", outside.String()); got == "" {
		t.Error("verified for another address")
	}
}
