// Package authority makes and checks the certificates by which containers prove to each other who they are.
//
// There are three levels. A root is made by the operator; its key lies with the controllers. An intermediate is given to one host, for at
// most a week, and can sign only for what runs there: its name constraints are the host's subnet, the configured domains and the trust
// domain. A leaf is one container's, for a day: its names, its addresses and, as a SPIFFE id, its policy group. What no certificate can
// constrain is which group a host names: as with tags on the wire, a host that was broken into speaks for any group, but only from its own
// addresses.
//
// The package is pure: it reads no file, asks nobody and has no clock (authority/authorityhttp is how an intermediate is asked for,
// authority/hostca how a host keeps one).
//
// Use: ParseRoot on a controller, Root.Intermediate for a ParseRequest; NewIntermediate on a host, Intermediate.Leaf for each container;
// Verify and PeerOf for what the other end of a connection shows.
package authority

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"math/big"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

const (
	MaxIntermediate = 7 * 24 * time.Hour // longest life of an intermediate, Skew included
	MinIntermediate = time.Hour          // shortest that can be asked for
	LeafLife        = 24 * time.Hour     // of a leaf, Skew included, unless its intermediate ends before
	Skew            = 5 * time.Minute    // by which a certificate begins before it is made: clocks of hosts differ
)

// Renewal returns when a certificate is to be replaced: at half of its life.
func Renewal(c *x509.Certificate) time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2)
}

// life returns the times of a certificate that is made now, within those of its issuer. An issuer that is not valid now is fault.Unavailable.
func life(issuer *x509.Certificate, want time.Duration, now time.Time) (from, to time.Time, err error) {
	if now.Before(issuer.NotBefore) || !now.Before(issuer.NotAfter) {
		return from, to, fault.Unavailablef("%v is valid from %v to %v, and now is %v", issuer.Subject,
			issuer.NotBefore.UTC().Format(time.RFC3339), issuer.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	from = now.Add(-Skew)
	to = from.Add(want)
	if from.Before(issuer.NotBefore) {
		from = issuer.NotBefore
	}
	if to.After(issuer.NotAfter) {
		to = issuer.NotAfter
	}
	return from, to, nil
}

// serial returns 128 random bits, never 0 (RFC 5280 section 4.1.2.2).
func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	n := new(big.Int).SetBytes(b)
	if n.Sign() == 0 {
		n.SetInt64(1)
	}
	return n
}

// keyID returns the subject key id of a public key: RFC 7093 section 2, method 1.
func keyID(public any) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	var info struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	sum := sha256.Sum256(info.Key.RightAlign())
	return sum[:20], nil
}

// sign makes a certificate from a template for a public key, by the issuer's key.
func sign(t, issuer *x509.Certificate, public, key any) (*x509.Certificate, error) {
	var err error
	t.SerialNumber = serial()
	if t.SubjectKeyId, err = keyID(public); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, issuer, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
