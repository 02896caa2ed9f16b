package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"

	"code.cloudfoundry.org/silk/fault"
)

const (
	minRSA = 2048
	maxRSA = 8192 // crypto/tls refuses longer ones
)

// NewKey returns an ECDSA key on P-256, what hosts and containers have.
func NewKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// ParseKey reads the first private key of a text in PEM form: PKCS#8, SEC1 (EC) or PKCS#1 (RSA). Other blocks, such as certificates and
// EC parameters, are skipped. A key that is encrypted or weak is fault.Invalid.
func ParseKey(text []byte) (crypto.Signer, error) {
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			return nil, fault.Invalidf("no private key in PEM form was found")
		}
		if !strings.HasSuffix(b.Type, "PRIVATE KEY") {
			continue
		}
		if b.Type == "ENCRYPTED PRIVATE KEY" || b.Headers["DEK-Info"] != "" {
			return nil, fault.Invalidf("the private key is encrypted: expected one without a pass phrase")
		}
		k, err := parseKey(b)
		if err != nil {
			return nil, fault.Invalidf("private key: %v", err)
		}
		if err := checkKey(k.Public()); err != nil {
			return nil, err
		}
		return k, nil
	}
}

func parseKey(b *pem.Block) (crypto.Signer, error) {
	var k any
	var err error
	switch b.Type {
	case "EC PRIVATE KEY":
		k, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		k, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	default:
		k, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	}
	if err != nil {
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, errors.New("it is not for signatures")
	}
	return s, nil
}

// EncodeKey returns a key in PKCS#8 and PEM form.
func EncodeKey(k crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// checkKey refuses, as fault.Invalid, public keys that are weak or that nobody verifies with in reasonable time.
func checkKey(public any) error {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		}
		return fault.Invalidf("key on the curve %s: expected P-256, P-384 or P-521", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSA || n > maxRSA {
			return fault.Invalidf("RSA key of %d bits: expected %d to %d", n, minRSA, maxRSA)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fault.Invalidf("key of type %T: expected ECDSA, RSA or Ed25519", public)
}

// same reports whether two public keys are one. Every type that checkKey passes has Equal.
func same(a, b crypto.PublicKey) bool {
	e, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && e.Equal(b)
}

const certificateBlock = "CERTIFICATE"

// MaxChain bounds the certificates that ParseCertificates reads from one text.
const MaxChain = 64

// ParseCertificates reads the certificates of a text in PEM form, at least one and at most MaxChain, in their order. Other blocks and what
// stands between blocks are skipped; a certificate that cannot be read is fault.Invalid.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	begun := bytes.Count(text, []byte("-----BEGIN "+certificateBlock+"-----"))
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			break
		}
		if b.Type != certificateBlock {
			continue
		}
		if len(all) == MaxChain {
			return nil, fault.Invalidf("more than %d certificates", MaxChain)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fault.Invalidf("certificate %d: %v", len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fault.Invalidf("no certificate in PEM form was found")
	}
	if len(all) != begun { // one that was cut off or garbled is passed over by pem.Decode, and may be the newest root
		return nil, fault.Invalidf("%d certificates begin and %d can be read", begun, len(all))
	}
	return all, nil
}

// EncodeCertificates returns certificates in PEM form.
func EncodeCertificates(cs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range cs {
		pem.Encode(&b, &pem.Block{Type: certificateBlock, Bytes: c.Raw}) // to memory: never fails
	}
	return b.Bytes()
}
