package controller_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
)

// rootFiles are the files of a container CA.
type rootFiles struct{ cert, key string }

type rootText struct{ cert, key []byte }

func makeRoot(t testing.TB, name string) rootText {
	t.Helper()
	cert, key, err := authority.NewRoot(name, 365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return rootText{cert, key}
}

func (f rootFiles) put(t testing.TB, key []byte, certs ...[]byte) {
	t.Helper()
	for path, b := range map[string][]byte{f.cert: slices.Concat(certs...), f.key: key} {
		if err := os.WriteFile(path+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
}

// withRoot adds a container CA to the configuration.
func withRoot(t testing.TB, cfg *controller.Config) (rootFiles, rootText) {
	t.Helper()
	dir, root := t.TempDir(), makeRoot(t, "first")
	f := rootFiles{filepath.Join(dir, "roots.crt"), filepath.Join(dir, "root.key")}
	f.put(t, root.key, root.cert)
	cfg.ContainerCA.CertFile, cfg.ContainerCA.KeyFile = f.cert, f.key
	return f, root
}

// authorityClient speaks for a host.
func authorityClient(t testing.TB, c *certs, addr string, speaksFor netip.Addr) *authorityhttp.Client {
	t.Helper()
	cert, key, err := c.ca.Issue("host-"+speaksFor.String(), speaksFor)
	if err != nil {
		t.Fatal(err)
	}
	tc, err := service.Certificates{CA: c.ca.CertFile(), Cert: cert, Key: key}.Client()
	if err != nil {
		t.Fatal(err)
	}
	k := authorityhttp.NewClient("https://"+addr, tc, authorityhttp.ClientOptions{})
	t.Cleanup(k.Close)
	return k
}

// intermediate asks for one and returns what it may sign for.
func intermediate(t testing.TB, c *authorityhttp.Client, underlay netip.Addr) (authority.Constraints, error) {
	t.Helper()
	k, err := authority.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := authority.NewRequest(k)
	if err != nil {
		t.Fatal(err)
	}
	g, err := c.Intermediate(t.Context(), underlay, csr)
	if err != nil {
		return authority.Constraints{}, err
	}
	i, err := authority.NewIntermediate(g.Certificate, k)
	if err != nil || i.TrustedBy(g.Roots) != nil {
		t.Fatalf("%v, %v", err, i.TrustedBy(g.Roots))
	}
	return i.Constraints(), nil
}

// TestContainerCA asks two controllers that share a database and a root.
func TestContainerCA(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		withRoot(t, &cfg)
		one, two := start(t, c, cfg, quiet(t)), start(t, c, cfg, quiet(t))
		leases := one.client(t)
		ask1, ask2 := authorityClient(t, c, one.API, host(1)), authorityClient(t, c, two.API, host(1))
		if _, err := intermediate(t, ask1, host(1)); !errors.Is(err, fault.Denied) {
			t.Errorf("before there is a lease: %v", err)
		}
		l := acquire(t, leases, 1, lease.Block)
		other := acquire(t, leases, 2, lease.Single)
		got, err := intermediate(t, ask1, host(1))
		if err != nil || !slices.Equal(got.Subnets, []netip.Prefix{l.Subnet}) || got.TrustDomain != "silk.internal" {
			t.Fatalf("%+v, %v, want %v", got, err, l)
		}
		// The other controller sees it within a second.
		seen := dial(t, c, two.API)
		eventually(t, "the other controller has no lease", func() bool {
			ls, err := seen.Leases(t.Context())
			return err == nil && slices.Contains(ls, other)
		})
		if got, err := intermediate(t, ask2, host(1)); err != nil || !slices.Equal(got.Subnets, []netip.Prefix{l.Subnet}) {
			t.Errorf("%+v, %v", got, err)
		}
		// A host speaks for itself alone, though bind_underlay_to_certificate is off.
		if _, err := intermediate(t, ask1, host(2)); !errors.Is(err, fault.Denied) {
			t.Errorf("for another host: %v", err)
		}
		if got, err := intermediate(t, authorityClient(t, c, one.API, host(2)), host(2)); err != nil || !slices.Equal(got.Subnets, []netip.Prefix{other.Subnet}) {
			t.Errorf("a single address: %+v, %v", got, err)
		}
		if err := leases.Release(t.Context(), host(1)); err != nil {
			t.Fatal(err)
		}
		if _, err := intermediate(t, ask1, host(1)); !errors.Is(err, fault.Denied) {
			t.Errorf("after the release: %v", err)
		}
		for sample, want := range map[string]float64{`{outcome="issued"}`: 2, `{outcome="no_lease"}`: 2, `{outcome="foreign"}`: 1, `{outcome="too_often"}`: 0} {
			if got := metric(t, one, "silk_controller_container_ca_intermediates_total"+sample); got != want {
				t.Errorf("%s %v, want %v", sample, got, want)
			}
		}
		if metric(t, one, "silk_controller_container_ca_up") != 1 || metric(t, one, "silk_controller_container_ca_root_expiry_timestamp_seconds") < float64(time.Now().Unix()) {
			t.Error("the root is not shown")
		}
	})
}

func TestAnExpiredLeaseIsNone(t *testing.T) {
	c := issue(t)
	cfg := c.config(testkit.Database(t, sqldb.SQLite))
	withRoot(t, &cfg)
	cfg.LeaseExpiration = 2
	r := start(t, c, cfg, quiet(t))
	k := r.client(t)
	acquire(t, k, 1, lease.Block)
	eventually(t, "the lease does not expire", func() bool { return len(leases(t, k)) == 0 })
	if _, err := intermediate(t, authorityClient(t, c, r.API, host(1)), host(1)); !errors.Is(err, fault.Denied) {
		t.Errorf("of an expired lease: %v", err)
	}
}

func TestWithoutAContainerCA(t *testing.T) {
	c := issue(t)
	r := start(t, c, c.config(testkit.Database(t, sqldb.SQLite)), quiet(t))
	k := authorityClient(t, c, r.API, host(1))
	if _, err := k.Roots(t.Context()); !errors.Is(err, fault.NotFound) {
		t.Errorf("roots: %v", err)
	}
	if _, err := intermediate(t, k, host(1)); !errors.Is(err, fault.NotFound) {
		t.Errorf("intermediate: %v", err)
	}
	if got := metric(t, r, "silk_controller_container_ca_up"); got != -1 {
		t.Errorf("container_ca_up is %v", got)
	}
}

// TestTheRootIsReplacedUnderTheController: old, old and new, new and old, new, with a broken file between each.
func TestTheRootIsReplacedUnderTheController(t *testing.T) {
	c := issue(t)
	cfg := c.config(testkit.Database(t, sqldb.SQLite))
	files, old := withRoot(t, &cfg)
	next := makeRoot(t, "second")
	r := start(t, c, cfg, slog.New(slog.DiscardHandler))
	k := authorityClient(t, c, r.API, host(1))
	bundle := func() string {
		b, err := k.Roots(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return string(b.PEM())
	}
	up := func() float64 { return metric(t, r, "silk_controller_container_ca_up") }
	for _, step := range []struct {
		key   []byte
		certs [][]byte
	}{{old.key, [][]byte{old.cert, next.cert}}, {next.key, [][]byte{next.cert, old.cert}}, {next.key, [][]byte{next.cert}}} {
		before := bundle()
		files.put(t, []byte("-----BEGIN PRIVATE KEY-----\n"), step.certs...)
		eventually(t, "the broken file is not noticed", func() bool { return up() == 0 })
		if bundle() != before {
			t.Error("a broken file changed the roots")
		}
		files.put(t, step.key, step.certs...)
		eventually(t, "the new file is not read", func() bool { return up() == 1 })
		if bundle() != string(slices.Concat(step.certs...)) {
			t.Errorf("roots %s", bundle())
		}
	}
}

// TestARootThatCannotBeUsed: hosts get leases all the same, and nothing is signed.
func TestARootThatCannotBeUsed(t *testing.T) {
	for name, spoil := range map[string]func(*certs, rootFiles) error{
		"no file":      func(_ *certs, f rootFiles) error { return os.Remove(f.cert) },
		"torn":         func(_ *certs, f rootFiles) error { return os.Truncate(f.cert, 100) },
		"readable key": func(_ *certs, f rootFiles) error { return os.Chmod(f.key, 0o644) },
		"the authority of hosts as well": func(c *certs, f rootFiles) error {
			ca, err1 := os.ReadFile(c.ca.CertFile())
			root, err2 := os.ReadFile(f.cert)
			return errors.Join(err1, err2, os.WriteFile(c.ca.CertFile(), append(ca, root...), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := issue(t)
			cfg := c.config(testkit.Database(t, sqldb.SQLite))
			files, _ := withRoot(t, &cfg)
			if err := spoil(c, files); err != nil {
				t.Fatal(err)
			}
			r := start(t, c, cfg, slog.New(slog.DiscardHandler))
			acquire(t, r.client(t), 1, lease.Block)
			k := authorityClient(t, c, r.API, host(1))
			if _, err := intermediate(t, k, host(1)); !errors.Is(err, fault.Unavailable) {
				t.Errorf("intermediate: %v", err)
			}
			if _, err := k.Roots(t.Context()); !errors.Is(err, fault.Unavailable) {
				t.Errorf("roots: %v", err)
			}
			if got := metric(t, r, "silk_controller_container_ca_up"); got != 0 {
				t.Errorf("container_ca_up is %v", got)
			}
		})
	}
}

// TestARootThatEnds: it is told of, and nothing is signed any more.
func TestARootThatEnds(t *testing.T) {
	c := issue(t)
	cfg := c.config(testkit.Database(t, sqldb.SQLite))
	files, _ := withRoot(t, &cfg)
	key, err := authority.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "short"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(4 * time.Second),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := authority.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	files.put(t, text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	r := start(t, c, cfg, slog.New(slog.DiscardHandler))
	eventually(t, "the end is not told", func() bool { return metric(t, r, "silk_controller_container_ca_up") == 0 })
	acquire(t, r.client(t), 1, lease.Block)
	if _, err := intermediate(t, authorityClient(t, c, r.API, host(1)), host(1)); !errors.Is(err, fault.Unavailable) {
		t.Errorf("of a root that has ended: %v", err)
	}
}
