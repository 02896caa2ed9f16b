package authority_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"testing"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

var serialOne = big.NewInt(1)

func TestPeerOf(t *testing.T) {
	ids := func(texts ...string) []*url.URL {
		var all []*url.URL
		for _, s := range texts {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, u)
		}
		return all
	}
	units := func(ou ...string) pkix.Name { return pkix.Name{OrganizationalUnit: ou} }
	for name, c := range map[string]struct {
		cert   x509.Certificate
		domain authority.TrustDomain
		want   identity.Group // "" for a refusal
	}{
		"SPIFFE":                 {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web")}, "silk.internal", "web"},
		"SPIFFE, escaped":        {x509.Certificate{URIs: ids("spiffe://silk.internal/group/a%2Fb")}, "silk.internal", "a/b"},
		"SPIFFE before unit":     {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web"), Subject: units("app:other")}, "silk.internal", "web"},
		"Diego":                  {x509.Certificate{Subject: units("organization:o", "space:s", "app:8a-7")}, "", "8a-7"},
		"Diego in a domain":      {x509.Certificate{Subject: units("app:8a-7")}, "silk.internal", "8a-7"},
		"Diego, foreign id":      {x509.Certificate{Subject: units("app:8a-7"), URIs: ids("spiffe://x/y")}, "", "8a-7"},
		"two units":              {x509.Certificate{Subject: units("app:a", "app:b")}, "", ""},
		"empty unit":             {x509.Certificate{Subject: units("app:")}, "", ""},
		"nobody":                 {x509.Certificate{}, "silk.internal", ""},
		"other trust domain":     {x509.Certificate{URIs: ids("spiffe://silk.example/group/web"), Subject: units("app:a")}, "silk.internal", ""},
		"below the trust domain": {x509.Certificate{URIs: ids("spiffe://x.silk.internal/group/web")}, "silk.internal", ""},
		"with a port":            {x509.Certificate{URIs: ids("spiffe://silk.internal:443/group/web")}, "silk.internal", ""},
		"two ids":                {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web", "spiffe://silk.internal/group/db")}, "silk.internal", ""},
		"an id and another URI":  {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web", "https://silk.internal/")}, "silk.internal", ""},
		"another path":           {x509.Certificate{URIs: ids("spiffe://silk.internal/host/web")}, "silk.internal", ""},
		"longer path":            {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web/x")}, "silk.internal", ""},
		"no group":               {x509.Certificate{URIs: ids("spiffe://silk.internal/group/")}, "silk.internal", ""},
		"other spelling":         {x509.Certificate{URIs: ids("spiffe://silk.internal/group/%77eb")}, "silk.internal", ""},
		"with a query":           {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web?x")}, "silk.internal", ""},
		"with a fragment":        {x509.Certificate{URIs: ids("spiffe://silk.internal/group/web#x")}, "silk.internal", ""},
		"with a user":            {x509.Certificate{URIs: ids("spiffe://u@silk.internal/group/web")}, "silk.internal", ""},
		"opaque":                 {x509.Certificate{URIs: ids("spiffe:silk.internal/group/web")}, "silk.internal", ""},
	} {
		p, err := authority.PeerOf(&c.cert, c.domain)
		if p.Group != c.want || (c.want == "") != errors.Is(err, fault.Denied) {
			t.Errorf("%s: %+v, %v, want %q", name, p, err, c.want)
		}
	}
}

// TestMappedAddressesAreNobodys: name constraints do not see an IPv4 address in an IPv6 one.
func TestMappedAddressesAreNobodys(t *testing.T) {
	c := &x509.Certificate{Subject: pkix.Name{OrganizationalUnit: []string{"app:g"}}, IPAddresses: []net.IP{net.ParseIP("::ffff:10.255.31.7").To16(), {1, 2, 3}}}
	p, err := authority.PeerOf(c, "")
	if err != nil || len(p.Addresses) != 0 || p.Is(netip.MustParseAddr("10.255.31.7"), "g") == nil {
		t.Errorf("%+v, %v", p, err)
	}
	if p.Is(netip.Addr{}, "g") == nil {
		t.Error("no address is the peer's")
	}
}

func TestGroupsHaveOneSpelling(t *testing.T) {
	seen := map[string]identity.Group{}
	for _, g := range []identity.Group{"web", "a/b", "a%2Fb", "a b", "a+b", ".", "..", "%2E", "é", "?x", "#x", "a;b=c", "app:1", "~_-"} {
		id := authority.TrustDomain("silk.internal").ID(g)
		if other, ok := seen[id.String()]; ok {
			t.Errorf("%q and %q are both %v", g, other, id)
		}
		seen[id.String()] = g
		parsed, err := url.Parse(id.String())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := authority.TrustDomain("silk.internal").Group(parsed); got != g || err != nil {
			t.Errorf("%q came back as %q, %v", g, got, err)
		}
	}
}

func FuzzSPIFFE(f *testing.F) {
	for _, s := range []string{"spiffe://silk.internal/group/web", "spiffe://silk.internal/group/%2E", "spiffe://silk.internal:1/group/a%2fb?x#y", "spiffe:/group/", "%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		g, err := authority.TrustDomain("silk.internal").Group(u)
		if err != nil {
			return
		}
		if g.Validate() != nil {
			t.Fatalf("%q has the group %q", s, g)
		}
		if again, err := authority.TrustDomain("silk.internal").Group(authority.TrustDomain("silk.internal").ID(g)); again != g || err != nil {
			t.Fatalf("%q, spelled again, is %q, %v", g, again, err)
		}
	})
}

func FuzzCertificates(f *testing.F) {
	r := newRoot(f, "root")
	key, err := authority.EncodeKey(newKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(r.Bundle().PEM(), key)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"), []byte("-----BEGIN EC PRIVATE KEY-----\nAA==\n-----END EC PRIVATE KEY-----"))
	f.Fuzz(func(t *testing.T, certs, key []byte) {
		if k, err := authority.ParseKey(key); err == nil {
			if _, err := authority.EncodeKey(k); err != nil {
				t.Fatal(err)
			}
		} else if !errors.Is(err, fault.Invalid) {
			t.Fatal(err)
		}
		b, err := authority.ParseBundle(certs)
		if err != nil {
			return
		}
		if again, err := authority.ParseBundle(b.PEM()); err != nil || !again.Equal(b) {
			t.Fatalf("the bundle, written again, is %v, %v", again, err)
		}
		if root, err := authority.ParseRoot(certs, key); err == nil {
			root.Check(constraints(), root.Certificate().NotBefore)
		}
		for _, c := range b.Certificates() {
			authority.PeerOf(c, "silk.internal")
			authority.Verify([]*x509.Certificate{c}, b, x509.ExtKeyUsageAny, c.NotBefore)
		}
	})
}

func FuzzRequest(f *testing.F) {
	good, err := authority.NewRequest(newKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----"))
	r := newRoot(f, "root")
	f.Fuzz(func(t *testing.T, text []byte) {
		q, err := authority.ParseRequest(text)
		if err != nil {
			return
		}
		c, err := r.Intermediate(hostAddr, q, constraints(), authority.MaxIntermediate, now)
		if err != nil || !c.MaxPathLenZero || len(c.DNSNames)+len(c.URIs)+len(c.IPAddresses) > 0 {
			t.Fatalf("%+v, %v", c, err)
		}
	})
}
