package authority

import (
	"crypto/x509"
	"slices"

	"code.cloudfoundry.org/silk/fault"
)

// Bundle is a list of roots that are trusted. It is not changed after it was made; the zero Bundle trusts nobody.
type Bundle struct {
	certs []*x509.Certificate
	pool  *x509.CertPool
}

// NewBundle returns the bundle of some roots. Each must be an authority that may sign certificates, and signed by itself or by another one
// of the bundle; anything else is fault.Invalid. Whether they are valid now is not asked.
func NewBundle(certs []*x509.Certificate) (Bundle, error) {
	if len(certs) == 0 {
		return Bundle{}, fault.Invalidf("there is no root certificate")
	}
	b := Bundle{pool: x509.NewCertPool()}
	for _, c := range certs {
		if slices.ContainsFunc(b.certs, c.Equal) {
			continue
		}
		switch err := checkKey(c.PublicKey); {
		case err != nil:
			return Bundle{}, fault.Invalidf("root %v: %v", c.Subject, err)
		case !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
			return Bundle{}, fault.Invalidf("root %v is not an authority: expected basic constraints CA:TRUE and the key usage keyCertSign", c.Subject)
		case !slices.ContainsFunc(certs, func(by *x509.Certificate) bool { return c.CheckSignatureFrom(by) == nil }):
			return Bundle{}, fault.Invalidf("root %v is signed by %v, which is not in the bundle: add it", c.Subject, c.Issuer)
		}
		b.certs = append(b.certs, c)
		b.pool.AddCert(c)
	}
	return b, nil
}

// ParseBundle is NewBundle of the certificates in a text in PEM form.
func ParseBundle(text []byte) (Bundle, error) {
	certs, err := ParseCertificates(text)
	if err != nil {
		return Bundle{}, err
	}
	return NewBundle(certs)
}

// PEM returns the roots as a file of them has them.
func (b Bundle) PEM() []byte { return EncodeCertificates(b.certs) }

// Certificates returns the roots, the issuing one first. The list is shared.
func (b Bundle) Certificates() []*x509.Certificate { return b.certs }

// Pool returns the roots as crypto/tls wants them. It is shared, and nil for the zero Bundle: what takes nil for the system's roots must not be given that.
func (b Bundle) Pool() *x509.CertPool { return b.pool }

// IsZero reports whether the bundle has no root.
func (b Bundle) IsZero() bool { return len(b.certs) == 0 }

// Equal reports whether both have the same roots in the same order.
func (b Bundle) Equal(o Bundle) bool {
	return slices.EqualFunc(b.certs, o.certs, (*x509.Certificate).Equal)
}
