package authority_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// now is the clock of these tests.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var (
	hostAddr = netip.MustParseAddr("10.0.16.5")
	inside   = netip.MustParseAddr("10.255.30.7")
	outside  = netip.MustParseAddr("10.255.31.7")
)

func constraints() authority.Constraints {
	return authority.Constraints{
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.255.30.0/24")}, Domains: []registration.Name{"apps.internal"}, TrustDomain: "silk.internal",
	}
}

func newRoot(t testing.TB, name string) *authority.Root {
	t.Helper()
	cert, key, err := authority.NewRoot(name, 10*365*24*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	r, err := authority.ParseRoot(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := authority.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t testing.TB, k crypto.Signer) authority.Request {
	t.Helper()
	text, err := authority.NewRequest(k)
	if err != nil {
		t.Fatal(err)
	}
	q, err := authority.ParseRequest(text)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func intermediate(t testing.TB, r *authority.Root, c authority.Constraints) *authority.Intermediate {
	t.Helper()
	k := newKey(t)
	cert, err := r.Intermediate(hostAddr, request(t, k), c, authority.MaxIntermediate, now)
	if err != nil {
		t.Fatal(err)
	}
	i, err := authority.NewIntermediate(cert, k)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestAnIntermediateIsBound(t *testing.T) {
	root := newRoot(t, "root")
	i := intermediate(t, root, constraints())
	c := i.Certificate()
	switch {
	case !c.IsCA || !c.MaxPathLenZero || c.MaxPathLen != 0 || c.KeyUsage != x509.KeyUsageCertSign:
		t.Errorf("CA %v, path length %d (%v), key usage %v", c.IsCA, c.MaxPathLen, c.MaxPathLenZero, c.KeyUsage)
	case !c.PermittedDNSDomainsCritical || !slices.Equal(c.PermittedDNSDomains, []string{"apps.internal"}) || !slices.Equal(c.PermittedURIDomains, []string{"silk.internal"}) ||
		len(c.PermittedIPRanges) != 1 || c.PermittedIPRanges[0].String() != "10.255.30.0/24":
		t.Errorf("constraints %v %v %v, critical %v", c.PermittedIPRanges, c.PermittedDNSDomains, c.PermittedURIDomains, c.PermittedDNSDomainsCritical)
	case c.NotAfter.Sub(c.NotBefore) != authority.MaxIntermediate || !c.NotBefore.Equal(now.Add(-authority.Skew)):
		t.Errorf("valid from %v to %v", c.NotBefore, c.NotAfter)
	case c.SerialNumber.BitLen() < 64 || len(c.SubjectKeyId) != 20 || string(c.AuthorityKeyId) != string(root.Certificate().SubjectKeyId):
		t.Errorf("serial %v, key id %x, authority key id %x", c.SerialNumber, c.SubjectKeyId, c.AuthorityKeyId)
	case !c.BasicConstraintsValid || !critical(c, "2.5.29.19") || !critical(c, "2.5.29.30") || !critical(c, "2.5.29.15"):
		t.Error("an extension is not critical")
	}
	if other := intermediate(t, root, constraints()).Certificate(); other.SerialNumber.Cmp(c.SerialNumber) == 0 {
		t.Error("two certificates have one serial number")
	}
}

func critical(c *x509.Certificate, oid string) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == oid && e.Critical })
}

func TestNothingOutlivesItsIssuer(t *testing.T) {
	cert, key, err := authority.NewRoot("short", authority.MaxIntermediate, now)
	if err != nil {
		t.Fatal(err)
	}
	root, err := authority.ParseRoot(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	late := now.Add(6 * 24 * time.Hour)
	k := newKey(t)
	ic, err := root.Intermediate(hostAddr, request(t, k), constraints(), 30*24*time.Hour, late)
	if err != nil || ic.NotAfter.After(root.Certificate().NotAfter) {
		t.Fatalf("%v, %v", ic, err)
	}
	i, err := authority.NewIntermediate(ic, k)
	if err != nil {
		t.Fatal(err)
	}
	s := authority.Spec{Addresses: []netip.Addr{inside}, Group: "g"}
	l, err := i.Leaf(s, late.Add(20*time.Hour))
	if err != nil || !l.Certificate.NotAfter.Equal(ic.NotAfter) {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := i.Leaf(s, ic.NotAfter); !errors.Is(err, fault.Unavailable) {
		t.Errorf("leaf of an intermediate that has expired: %v", err)
	}
	for _, when := range []time.Time{root.Certificate().NotAfter, root.Certificate().NotBefore.Add(-time.Second)} {
		if _, err := root.Intermediate(hostAddr, request(t, k), constraints(), time.Hour, when); !errors.Is(err, fault.Unavailable) {
			t.Errorf("intermediate of a root that is not valid: %v", err)
		}
	}
	// A clock that went back before the intermediate began.
	l, err = i.Leaf(s, ic.NotBefore.Add(-48*time.Hour))
	if err != nil || l.Certificate.NotBefore.Before(ic.NotBefore) || !l.Certificate.NotAfter.After(late) {
		t.Errorf("%v, %v", l, err)
	}
}

func TestLeaf(t *testing.T) {
	root := newRoot(t, "root")
	i := intermediate(t, root, constraints())
	given := []string{"API.apps.internal.", "api.apps.internal", "0.api.apps.internal", "*.web.apps.internal", "evil.example", "*.apps.internal", "*.internal", "", "apps.internal", "xapps.internal", "a b"}
	l, err := i.Leaf(authority.Spec{Names: given, Addresses: []netip.Addr{inside}, Group: "my group/é"}, now)
	if err != nil {
		t.Fatal(err)
	}
	c := l.Certificate
	if want := []string{"api.apps.internal", "0.api.apps.internal", "*.web.apps.internal", "apps.internal"}; !slices.Equal(c.DNSNames, want) {
		t.Errorf("names %q, want %q", c.DNSNames, want)
	}
	if want := []string{"evil.example", "*.apps.internal", "*.internal", "", "xapps.internal", "a b"}; !slices.Equal(l.LeftOut, want) {
		t.Errorf("left out %q, want %q", l.LeftOut, want)
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://silk.internal/group/my%20group%2F%C3%A9" {
		t.Errorf("URIs %v", c.URIs)
	}
	if k, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() || c.KeyUsage != x509.KeyUsageDigitalSignature || c.IsCA || len(c.SubjectKeyId) != 20 ||
		!slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("%+v", c)
	}
	if c.NotAfter.Sub(c.NotBefore) != authority.LeafLife || !authority.Renewal(c).Equal(c.NotBefore.Add(12*time.Hour)) {
		t.Errorf("valid from %v to %v, renewal %v", c.NotBefore, c.NotAfter, authority.Renewal(c))
	}
	for _, u := range c.ExtKeyUsage {
		if err := authority.Verify(l.Chain(), root.Bundle(), u, now); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"api.apps.internal", "x.web.apps.internal", "10.255.30.7"} {
		if err := c.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	p, err := authority.PeerOf(c, "silk.internal")
	if err != nil || p.Is(inside, "my group/é") != nil || p.Is(netip.MustParseAddr("::ffff:10.255.30.7"), "my group/é") != nil {
		t.Errorf("%+v, %v", p, err)
	}
	if err := p.Is(outside, "my group/é"); !errors.Is(err, fault.Denied) {
		t.Errorf("another address: %v", err)
	}
	if err := p.Is(inside, "other"); !errors.Is(err, fault.Denied) {
		t.Errorf("another group: %v", err)
	}
	tc := l.TLS()
	if len(tc.Certificate) != 2 || tc.Leaf != c {
		t.Errorf("%d certificates for TLS", len(tc.Certificate))
	}
	for _, bad := range []authority.Spec{
		{Addresses: []netip.Addr{outside}, Group: "g"}, {Addresses: []netip.Addr{inside, outside}, Group: "g"}, {Group: "g"},
		{Addresses: []netip.Addr{netip.MustParseAddr("::ffff:10.255.30.7")}, Group: "g"}, {Addresses: []netip.Addr{{}}, Group: "g"},
	} {
		if _, err := i.Leaf(bad, now); !errors.Is(err, fault.Denied) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := i.Leaf(authority.Spec{Addresses: []netip.Addr{inside}}, now); !errors.Is(err, fault.Invalid) {
		t.Errorf("without a group: %v", err)
	}
}

// TestSubnetsOfBothFamilies: a host with several leases, one of them IPv6.
func TestSubnetsOfBothFamilies(t *testing.T) {
	root, c := newRoot(t, "root"), constraints()
	c.Subnets = append(c.Subnets, netip.MustParsePrefix("10.255.0.9/32"), netip.MustParsePrefix("fd00:7::/64"))
	i := intermediate(t, root, c)
	for _, a := range []string{"10.255.30.255", "10.255.0.9", "fd00:7::1"} {
		l, err := i.Leaf(authority.Spec{Addresses: []netip.Addr{netip.MustParseAddr(a)}, Group: "g"}, now)
		if err != nil {
			t.Error(err)
		} else if err := authority.Verify(l.Chain(), root.Bundle(), x509.ExtKeyUsageServerAuth, now); err != nil {
			t.Error(err)
		}
	}
	for _, a := range []string{"10.255.0.8", "10.255.31.0", "fd00:8::1", "fd00:7::1%eth0"} {
		if i.Covers(netip.MustParseAddr(a)) {
			t.Errorf("it covers %s", a)
		}
	}
	for _, ip := range []string{"10.255.0.8", "fd00:8::1"} {
		f := forge(t, i, func(c *x509.Certificate) { c.IPAddresses = []net.IP{netip.MustParseAddr(ip).AsSlice()} })
		if err := authority.Verify([]*x509.Certificate{f, i.Certificate()}, root.Bundle(), x509.ExtKeyUsageServerAuth, now); err == nil {
			t.Errorf("a leaf for %s verifies", ip)
		}
	}
}

func TestNamesOfALeafAreBounded(t *testing.T) {
	var names []string
	for n := range authority.MaxNames + 3 {
		names = append(names, strings.Repeat("x", n/26+1)+string(rune('a'+n%26))+".apps.internal")
	}
	l, err := intermediate(t, newRoot(t, "root"), constraints()).Leaf(authority.Spec{Names: names, Addresses: []netip.Addr{inside}, Group: "g"}, now)
	if err != nil || len(l.Certificate.DNSNames) != authority.MaxNames || len(l.LeftOut) != 3 {
		t.Errorf("%d names, %d left out, %v", len(l.Certificate.DNSNames), len(l.LeftOut), err)
	}
}

// forge signs what a host that was broken into would sign: the template as it is.
func forge(t testing.TB, i *authority.Intermediate, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	k := newKey(t)
	return forgeFor(t, i.Certificate(), i.Key(), k.Public(), change)
}

func forgeFor(t testing.TB, issuer *x509.Certificate, key crypto.Signer, public any, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, issuer.SerialNumber)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		Subject: pkix.Name{Organization: []string{"Silk"}},
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, public, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// forgeries are leaves that no intermediate may sign; the first is a good one.
func forgeries(t testing.TB, i *authority.Intermediate) map[string][]*x509.Certificate {
	one := func(change func(*x509.Certificate)) []*x509.Certificate {
		return []*x509.Certificate{forge(t, i, change), i.Certificate()}
	}
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	all := map[string][]*x509.Certificate{
		"good": one(func(c *x509.Certificate) {
			c.IPAddresses, c.DNSNames, c.URIs = []net.IP{inside.AsSlice()}, []string{"a.apps.internal"}, uri("spiffe://silk.internal/group/g")
		}),
		"foreign address":            one(func(c *x509.Certificate) { c.IPAddresses = []net.IP{outside.AsSlice()} }),
		"own and foreign address":    one(func(c *x509.Certificate) { c.IPAddresses = []net.IP{inside.AsSlice(), outside.AsSlice()} }),
		"IPv6 address":               one(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP("fd00::1")} }),
		"foreign name":               one(func(c *x509.Certificate) { c.DNSNames = []string{"api.example.com"} }),
		"name that ends the same":    one(func(c *x509.Certificate) { c.DNSNames = []string{"xapps.internal"} }),
		"wildcard above":             one(func(c *x509.Certificate) { c.DNSNames = []string{"*.internal"} }),
		"foreign trust domain":       one(func(c *x509.Certificate) { c.URIs = uri("spiffe://other.internal/group/g") }),
		"trust domain as an address": one(func(c *x509.Certificate) { c.URIs = uri("spiffe://10.0.0.1/group/g") }),
	}
	k, leaf := newKey(t), newKey(t)
	below := forgeFor(t, i.Certificate(), i.Key(), k.Public(), func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.Subject.CommonName, c.MaxPathLen = true, x509.KeyUsageCertSign, "below", -1
	})
	all["path length"] = []*x509.Certificate{forgeFor(t, below, k, leaf.Public(), func(c *x509.Certificate) { c.IPAddresses = []net.IP{inside.AsSlice()} }), below, i.Certificate()}
	return all
}

func TestConstraintsAreEnforced(t *testing.T) {
	root := newRoot(t, "root")
	for name, chain := range forgeries(t, intermediate(t, root, constraints())) {
		err := authority.Verify(chain, root.Bundle(), x509.ExtKeyUsageServerAuth, now)
		if good := name == "good"; good != (err == nil) || err != nil && !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	root, other := newRoot(t, "root"), newRoot(t, "root")
	i := intermediate(t, root, constraints())
	l, err := i.Leaf(authority.Spec{Addresses: []netip.Addr{inside}, Group: "g"}, now)
	if err != nil {
		t.Fatal(err)
	}
	server := x509.ExtKeyUsageServerAuth
	for name, err := range map[string]error{
		"no certificate":         authority.Verify(nil, root.Bundle(), server, now),
		"no root":                authority.Verify(l.Chain(), authority.Bundle{}, server, now),
		"another root":           authority.Verify(l.Chain(), other.Bundle(), server, now),
		"no intermediate":        authority.Verify(l.Chain()[:1], root.Bundle(), server, now),
		"the intermediate alone": authority.Verify(l.Chain()[1:], root.Bundle(), server, now),
		"too late":               authority.Verify(l.Chain(), root.Bundle(), server, now.Add(25*time.Hour)),
		"too early":              authority.Verify(l.Chain(), root.Bundle(), server, now.Add(-time.Hour)),
		"another use":            authority.Verify(l.Chain(), root.Bundle(), x509.ExtKeyUsageCodeSigning, now),
	} {
		if !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v, want denied", name, err)
		}
	}
}

func TestConstraintsThatLeaveSomethingFree(t *testing.T) {
	for name, change := range map[string]func(*authority.Constraints){
		"no subnet":       func(c *authority.Constraints) { c.Subnets = nil },
		"unmasked subnet": func(c *authority.Constraints) { c.Subnets = []netip.Prefix{netip.MustParsePrefix("10.255.30.1/24")} },
		"mapped subnet": func(c *authority.Constraints) {
			c.Subnets = []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:10.0.0.0"), 120)}
		},
		"zero subnet":         func(c *authority.Constraints) { c.Subnets = make([]netip.Prefix, 1) },
		"too many subnets":    func(c *authority.Constraints) { c.Subnets = make([]netip.Prefix, 65) },
		"no domain":           func(c *authority.Constraints) { c.Domains = nil },
		"empty domain":        func(c *authority.Constraints) { c.Domains = []registration.Name{""} },
		"domain of dots":      func(c *authority.Constraints) { c.Domains = []registration.Name{".apps.internal"} },
		"wildcard domain":     func(c *authority.Constraints) { c.Domains = []registration.Name{"*.internal"} },
		"no trust domain":     func(c *authority.Constraints) { c.TrustDomain = "" },
		"address as a domain": func(c *authority.Constraints) { c.TrustDomain = "10.0.0.1" },
		"upper case":          func(c *authority.Constraints) { c.TrustDomain = "Silk.internal" },
	} {
		c := constraints()
		change(&c)
		if _, err := newRoot(t, "root").Intermediate(hostAddr, request(t, newKey(t)), c, time.Hour, now); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRequestsAreChecked(t *testing.T) {
	p224, err1 := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	short, err2 := rsa.GenerateKey(rand.Reader, 1024)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	weak := func(k crypto.Signer) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
		return pemKey(t, "CERTIFICATE REQUEST", der, err)
	}
	k := newKey(t)
	good, err := authority.NewRequest(k)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := pem.Decode(good)
	forged := slices.Clone(b.Bytes)
	forged[len(forged)-1] ^= 1
	for name, text := range map[string][]byte{
		"P-224": weak(p224), "RSA of 1024 bits": weak(short), "garbage": []byte("x"), "empty": nil, "another block": pemKey(t, "CERTIFICATE", b.Bytes, nil),
		"forged signature": pemKey(t, "CERTIFICATE REQUEST", forged, nil),
	} {
		if _, err := authority.ParseRequest(text); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a host asks for by name is not given.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"api.example.com"}, IPAddresses: []net.IP{outside.AsSlice()},
	}, k)
	q, perr := authority.ParseRequest(pemKey(t, "CERTIFICATE REQUEST", der, err))
	if perr != nil {
		t.Fatal(perr)
	}
	c, err := newRoot(t, "root").Intermediate(hostAddr, q, constraints(), time.Hour, now)
	if err != nil || len(c.DNSNames)+len(c.IPAddresses) != 0 || c.Subject.CommonName != "Silk host 10.0.16.5" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestNewIntermediateChecks(t *testing.T) {
	root := newRoot(t, "root")
	i := intermediate(t, root, constraints())
	leaf := forge(t, i, func(c *x509.Certificate) { c.IPAddresses = []net.IP{inside.AsSlice()} })
	for name, err := range map[string]error{
		"another key": second(authority.NewIntermediate(i.Certificate(), newKey(t))),
		"a leaf":      second(authority.NewIntermediate(leaf, i.Key())),
		"the root":    second(authority.NewIntermediate(root.Certificate(), newKey(t))),
	} {
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	unconstrained, err := authority.ParseRoot(selfSigned(t, i.Key(), unchanged), mustKey(t, i.Key()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := authority.NewIntermediate(unconstrained.Certificate(), i.Key()); !errors.Is(err, fault.Invalid) {
		t.Errorf("without constraints: %v", err)
	}
	for name, c := range map[string]struct {
		roots authority.Bundle
		good  bool
	}{"its root": {root.Bundle(), true}, "another root": {newRoot(t, "root").Bundle(), false}, "no root": {authority.Bundle{}, false}} {
		if err := i.TrustedBy(c.roots); c.good != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func mustKey(t testing.TB, k crypto.Signer) []byte {
	t.Helper()
	text, err := authority.EncodeKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func second[T any](_ T, err error) error { return err }
