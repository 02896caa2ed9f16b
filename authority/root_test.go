package authority_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
)

func pemKey(t testing.TB, kind string, der []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// selfSigned returns a root of a key in PEM form.
func selfSigned(t testing.TB, k crypto.Signer, change func(*x509.Certificate)) []byte {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: serialOne, Subject: pkix.Name{CommonName: "root"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(1000 * time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: -1,
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	return pemKey(t, "CERTIFICATE", der, err)
}

func unchanged(*x509.Certificate) {}

func TestRootsOfEveryKind(t *testing.T) {
	p256, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, err2 := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p224, err3 := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	long, err4 := rsa.GenerateKey(rand.Reader, 2048)
	short, err5 := rsa.GenerateKey(rand.Reader, 1024)
	_, ed, err6 := ed25519.GenerateKey(rand.Reader)
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		t.Fatal(err)
	}
	sec1 := func(k *ecdsa.PrivateKey) []byte {
		der, err := x509.MarshalECPrivateKey(k)
		return pemKey(t, "EC PRIVATE KEY", der, err)
	}
	pkcs8 := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		return pemKey(t, "PRIVATE KEY", der, err)
	}
	parameters := pemKey(t, "EC PARAMETERS", []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}, nil)
	for name, c := range map[string]struct {
		key  crypto.Signer
		text []byte
		good bool
	}{
		"P-256, SEC1":              {p256, sec1(p256), true},
		"P-256, SEC1 as openssl":   {p256, append(parameters, sec1(p256)...), true},
		"P-384, PKCS#8":            {p384, pkcs8(p384), true},
		"RSA, PKCS#1":              {long, pemKey(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(long), nil), true},
		"RSA, PKCS#8":              {long, pkcs8(long), true},
		"Ed25519, PKCS#8":          {ed, pkcs8(ed), true},
		"RSA of 1024 bits":         {short, pkcs8(short), false},
		"P-224":                    {p224, pkcs8(p224), false},
		"another's key":            {p256, pkcs8(p384), false},
		"no key":                   {p256, parameters, false},
		"encrypted":                {p256, pemKey(t, "ENCRYPTED PRIVATE KEY", []byte{1}, nil), false},
		"garbage in a block":       {p256, pemKey(t, "PRIVATE KEY", []byte{1}, nil), false},
		"EC key in an RSA's block": {p256, pemKey(t, "RSA PRIVATE KEY", []byte{48, 0}, nil), false},
	} {
		root, err := authority.ParseRoot(selfSigned(t, c.key, unchanged), c.text)
		if c.good != (err == nil) || err != nil && !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.good {
			if err := root.Check(constraints(), now); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestRootsThatCannotBeUsed(t *testing.T) {
	k := newKey(t)
	key, err := authority.EncodeKey(k)
	if err != nil {
		t.Fatal(err)
	}
	good := selfSigned(t, k, unchanged)
	for name, text := range map[string][]byte{
		"nothing":              nil,
		"a key":                key,
		"no authority":         selfSigned(t, k, func(c *x509.Certificate) { c.IsCA = false }),
		"may not sign":         selfSigned(t, k, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }),
		"path length 0":        selfSigned(t, k, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }),
		"not self-signed":      authority.EncodeCertificates([]*x509.Certificate{intermediate(t, newRoot(t, "x"), constraints()).Certificate()}),
		"cut off":              append(slices.Clone(good), good[:len(good)-40]...),
		"garbled, then a good": append([]byte("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"), good...),
	} {
		if _, err := authority.ParseRoot(text, key); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What only a trial finds.
	for name, change := range map[string]func(*x509.Certificate){
		"expired":           func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) },
		"for other domains": func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"example.com"} },
		"for clients alone": func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
	} {
		root, err := authority.ParseRoot(selfSigned(t, k, change), key)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if err := root.Check(constraints(), now); err == nil {
			t.Errorf("%s: nothing was found", name)
		}
	}
}

// TestRotation: leaves of the old and the new root verify with the bundle of both, whichever comes first.
func TestRotation(t *testing.T) {
	oldCert, oldKey, err1 := authority.NewRoot("root", 10*365*24*time.Hour, now)
	newCert, newKey, err2 := authority.NewRoot("root", 10*365*24*time.Hour, now)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	parse := func(key []byte, certs ...[]byte) *authority.Root {
		r, err := authority.ParseRoot(slices.Concat(certs...), key)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	steps := []*authority.Root{parse(oldKey, oldCert), parse(oldKey, oldCert, newCert), parse(newKey, newCert, oldCert), parse(newKey, newCert)}
	var leaves []*authority.Leaf
	for _, r := range steps {
		l, err := intermediate(t, r, constraints()).Leaf(authority.Spec{Addresses: []netip.Addr{inside}, Group: "g"}, now)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, l)
	}
	for n, want := range [][]bool{{true, true, false, false}, {true, true, true, true}, {true, true, true, true}, {false, false, true, true}} {
		for m, l := range leaves {
			if err := authority.Verify(l.Chain(), steps[n].Bundle(), x509.ExtKeyUsageClientAuth, now); (err == nil) != want[m] {
				t.Errorf("leaf of step %d at step %d: %v", m, n, err)
			}
		}
	}
	if _, err := authority.ParseRoot(slices.Concat(newCert, oldCert), oldKey); err == nil {
		t.Error("the key of the second root was taken")
	}
}
