package authority

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"

	"code.cloudfoundry.org/silk/fault"
)

const requestBlock = "CERTIFICATE REQUEST"

// Request is what a host asks an intermediate for: a public key, whose owner it has proved to be. The zero Request is none.
type Request struct{ key crypto.PublicKey }

// NewRequest returns a certificate request (RFC 2986) for a key in PEM form. It names nothing: what a host may sign for is not its to say.
func NewRequest(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: requestBlock, Bytes: der}), nil
}

// ParseRequest reads a certificate request in PEM form. A weak key, and a signature that is weak or not by the key, are fault.Invalid.
// Names and extensions in it are ignored.
func ParseRequest(text []byte) (Request, error) {
	b, _ := pem.Decode(text)
	if b == nil || b.Type != requestBlock && b.Type != "NEW "+requestBlock {
		return Request{}, fault.Invalidf("certificate request: expected one in PEM form")
	}
	q, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return Request{}, fault.Invalidf("certificate request: %v", err)
	}
	if err := checkKey(q.PublicKey); err != nil { // before it is used
		return Request{}, fault.Invalidf("certificate request: %v", err)
	}
	switch q.SignatureAlgorithm {
	case x509.SHA1WithRSA, x509.ECDSAWithSHA1:
		return Request{}, fault.Invalidf("certificate request: signed with %v, expected SHA-256 or better", q.SignatureAlgorithm)
	}
	if err := q.CheckSignature(); err != nil {
		return Request{}, fault.Invalidf("certificate request: %v", err)
	}
	return Request{q.PublicKey}, nil
}
