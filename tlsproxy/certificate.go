package tlsproxy

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/endpoint"
)

// credential is what a container shows its clients. It does not change.
type credential struct {
	pair    tls.Certificate
	expires time.Time
}

// certificates say what containers show, and whom they trust.
type certificates interface {
	// show returns what a handshake with the endpoint that begins now shows: the same pointer for the same certificate. The error says why there is
	// none, and what to do.
	show(endpoint.Record) (*credential, error)

	// trust returns whom to believe what clients say of themselves that must prove it.
	trust() (trust, error)

	// inspect returns what there is for the endpoint, nil for nothing, and what is wrong with it.
	inspect(endpoint.Record) (*credential, error)

	// keep forgets all endpoints but these.
	keep([]endpoint.Record)
}

// trust is the authorities of clients, and the domain of the SPIFFE ids in their certificates, "" for none.
type trust struct {
	roots  authority.Bundle
	domain authority.TrustDomain
}

// newCredential makes a credential of a certificate, those that lead to its authority, and its key, all in PEM form.
func newCredential(chain, key []byte) (*credential, error) {
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, err
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return nil, err
		}
	}
	return &credential{pair: pair, expires: pair.Leaf.NotAfter}, nil
}
