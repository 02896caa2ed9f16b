package authority

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/registration"
)

// Intermediate is what a host signs with. It is safe for concurrent use.
type Intermediate struct {
	cert        *x509.Certificate
	key         crypto.Signer
	constraints Constraints
}

// NewIntermediate returns the intermediate of a certificate and its key. One that is not what Root.Intermediate makes is fault.Invalid. Whether
// it is valid now, and who signed it, is not asked.
func NewIntermediate(cert *x509.Certificate, key crypto.Signer) (*Intermediate, error) {
	if !same(key.Public(), cert.PublicKey) {
		return nil, fault.Invalidf("the key is not that of the intermediate %v", cert.Subject)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fault.Invalidf("%v is not an authority", cert.Subject)
	}
	c, err := constraintsOf(cert)
	if err != nil {
		return nil, err
	}
	return &Intermediate{cert, key, c}, nil
}

// TrustedBy reports, as fault.Denied, that none of the roots signed the intermediate, directly or by another one.
func (i *Intermediate) TrustedBy(roots Bundle) error {
	if roots.IsZero() {
		return fault.Deniedf("there is no root to verify the intermediate %v with", i.cert.Subject)
	}
	_, err := i.cert.Verify(x509.VerifyOptions{Roots: roots.pool, CurrentTime: i.cert.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return fault.New(fault.Denied, err)
}

// Certificate returns the intermediate's certificate.
func (i *Intermediate) Certificate() *x509.Certificate { return i.cert }

// Key returns the intermediate's key.
func (i *Intermediate) Key() crypto.Signer { return i.key }

// Constraints returns what the intermediate may sign for. The lists are shared.
func (i *Intermediate) Constraints() Constraints { return i.constraints }

// Covers reports whether the intermediate may sign for a container with these addresses, at least one.
func (i *Intermediate) Covers(addrs ...netip.Addr) bool {
	return len(addrs) > 0 && !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !i.constraints.covers(a) })
}

// Spec is what a leaf says of a container.
type Spec struct {
	Names     []string       // by which it is found, in full, in any case; wildcards in the first label
	Addresses []netip.Addr   // at least one
	Group     identity.Group // its policy group
}

// MaxNames bounds the names in a leaf: all of it is sent with each handshake.
const MaxNames = 100

// Leaf is a container's certificate and its key.
type Leaf struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
	LeftOut     []string // names of the Spec that are not in it: the intermediate does not permit them, they are no names, or there are too many

	issuer *x509.Certificate
}

// TLS returns the leaf with its intermediate for crypto/tls.
func (l *Leaf) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{l.Certificate.Raw, l.issuer.Raw}, PrivateKey: l.Key, Leaf: l.Certificate}
}

// Chain returns the leaf and its intermediate.
func (l *Leaf) Chain() []*x509.Certificate { return []*x509.Certificate{l.Certificate, l.issuer} }

// Leaf makes a leaf with a key of its own, for both ends of TLS. It begins Skew before now and lasts LeafLife, not longer than the intermediate. By a clock
// that stands before the intermediate began, which went back or lags, it begins with the intermediate. An address that is not covered is fault.Denied, a
// group that is none fault.Invalid, an intermediate that has expired fault.Unavailable. Names that are not permitted are left out.
func (i *Intermediate) Leaf(s Spec, now time.Time) (*Leaf, error) {
	if err := s.Group.Validate(); err != nil {
		return nil, err
	}
	if !i.Covers(s.Addresses...) {
		return nil, fault.Deniedf("the addresses %v are not within %v, which the intermediate is for", s.Addresses, i.constraints.Subnets)
	}
	if now.Before(i.cert.NotBefore) {
		now = i.cert.NotBefore
	}
	from, to, err := life(i.cert, LeafLife, now)
	if err != nil {
		return nil, err
	}
	l := &Leaf{issuer: i.cert}
	t := &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"Silk"}}, NotBefore: from, NotAfter: to, // no common name: openssl would take it for a DNS name
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{i.constraints.TrustDomain.ID(s.Group)},
	}
	for _, a := range s.Addresses {
		t.IPAddresses = append(t.IPAddresses, a.AsSlice())
	}
	t.DNSNames, l.LeftOut = i.names(s.Names)
	if l.Key, err = NewKey(); err != nil {
		return nil, err
	}
	l.Certificate, err = sign(t, i.cert, l.Key.Public(), i.key)
	return l, err
}

// names splits names into those that go into a leaf and those that do not.
func (i *Intermediate) names(given []string) (in, out []string) {
	for _, s := range given {
		n, err := registration.ParseName(s)
		switch {
		case err != nil || !i.constraints.permits(n):
			out = append(out, s)
		case slices.Contains(in, string(n)):
		case len(in) == MaxNames:
			out = append(out, s)
		default:
			in = append(in, string(n))
		}
	}
	return in, out
}
