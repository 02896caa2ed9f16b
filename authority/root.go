package authority

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// Root is a root that issues, with the bundle of all that are trusted beside it. It is safe for concurrent use.
type Root struct {
	cert   *x509.Certificate
	key    crypto.Signer
	bundle Bundle
}

// NewRoot makes a root on P-256 that is called name and valid from now for validity: its certificate and its key in PEM form.
func NewRoot(name string, validity time.Duration, now time.Time) (cert, key []byte, err error) {
	if name == "" || len(name) > 64 {
		return nil, nil, fault.Invalidf("name of %d bytes: expected 1 to 64", len(name)) // RFC 5280 appendix A.1, ub-common-name
	}
	if validity < MaxIntermediate {
		return nil, nil, fault.Invalidf("validity %v: expected at least %v, the life of what it signs", validity, MaxIntermediate)
	}
	k, err := NewKey()
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-Skew), NotAfter: now.Add(validity),
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	c, err := sign(t, t, k.Public(), k)
	if err != nil {
		return nil, nil, fault.New(fault.Invalid, err)
	}
	if key, err = EncodeKey(k); err != nil {
		return nil, nil, err
	}
	return EncodeCertificates([]*x509.Certificate{c}), key, nil
}

// ParseRoot reads the certificates and the key of a root in PEM form. The first certificate issues and is the key's; all are trusted. So a root is
// rotated: the new one is added behind the old one, and some time later put before it. What cannot be used is fault.Invalid.
func ParseRoot(certs, key []byte) (*Root, error) {
	b, err := ParseBundle(certs)
	if err != nil {
		return nil, err
	}
	k, err := ParseKey(key)
	if err != nil {
		return nil, err
	}
	c := b.certs[0]
	switch {
	case !same(k.Public(), c.PublicKey):
		return nil, fault.Invalidf("the key is not that of the first certificate, %v", c.Subject)
	case c.MaxPathLenZero && c.MaxPathLen == 0:
		return nil, fault.Invalidf("root %v has a path length of 0: expected at least 1, for the intermediates of hosts", c.Subject)
	}
	return &Root{c, k, b}, nil
}

// Bundle returns all roots that are trusted.
func (r *Root) Bundle() Bundle { return r.bundle }

// Certificate returns the root that issues.
func (r *Root) Certificate() *x509.Certificate { return r.cert }

// Intermediate gives a host, known by its underlay address, an intermediate for the key of its request. It lasts for validity, at most MaxIntermediate and
// not longer than the root. Of the request only the key counts. Constraints that are not valid are fault.Invalid, a root that has expired is fault.Unavailable.
func (r *Root) Intermediate(host netip.Addr, q Request, c Constraints, validity time.Duration, now time.Time) (*x509.Certificate, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	from, to, err := life(r.cert, min(max(validity, MinIntermediate), MaxIntermediate), now)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"Silk"}, CommonName: "Silk host " + host.String()}, NotBefore: from, NotAfter: to,
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	c.apply(t)
	return sign(t, r.cert, q.key, r.key)
}

// Check issues an intermediate and a leaf under it for a trial and verifies them: what is wrong with the root then is found before hosts ask.
func (r *Root) Check(c Constraints, now time.Time) error {
	if err := c.Validate(); err != nil {
		return err
	}
	k, err := NewKey()
	if err != nil {
		return err
	}
	cert, err := r.Intermediate(netip.Addr{}, Request{k.Public()}, c, MinIntermediate, now)
	if err != nil {
		return err
	}
	i, err := NewIntermediate(cert, k)
	if err != nil {
		return err
	}
	l, err := i.Leaf(Spec{Names: []string{string(c.Domains[0])}, Addresses: []netip.Addr{c.Subnets[0].Addr()}, Group: "trial"}, now)
	if err != nil {
		return err
	}
	return Verify([]*x509.Certificate{l.Certificate, cert}, r.bundle, x509.ExtKeyUsageServerAuth, now)
}
