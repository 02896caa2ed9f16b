// Package authorityhttp is how hosts ask the controller for their intermediates, over HTTP with mutual TLS: Handler answers, Client asks.
//
// An intermediate is given only to a client whose certificate has the host's underlay address as IP SAN, whatever the controller asks of
// other requests, and only while that host holds a lease. docs/api/certificates.md shows both routes with requests and answers. The package knows no
// database and no file.
//
// Use: Handler(Source{...}, log, HandlerOptions{}) on the one side, NewClient(url, tlsConfig, ClientOptions{}) on the other.
package authorityhttp

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/registration"
)

// The routes. Every path that is served begins with Prefix.
const (
	Prefix           = "/container-ca/"
	PathIntermediate = Prefix + "intermediate"
	PathRoots        = Prefix + "roots"
)

// Source is what a Handler issues from. All of it is required.
type Source struct {
	// Root returns the root that issues now. It is called for every request.
	Root func() (*authority.Root, error)

	// Subnets returns the subnets of the leases that a host holds now, none if it holds none.
	Subnets func(ctx context.Context, host netip.Addr) ([]netip.Prefix, error)

	Domains     []registration.Name
	TrustDomain authority.TrustDomain
	Validity    time.Duration // of an intermediate; see authority.Root.Intermediate
}

// request is the body of a POST to PathIntermediate.
type request struct {
	Underlay string `json:"underlay_ip"`
	CSR      string `json:"csr"` // PEM
}

// answer is what it is answered with.
type answer struct {
	Certificates string    `json:"certificates"` // PEM: the intermediate, then the root that signed it
	Roots        string    `json:"roots"`        // PEM: all that are trusted
	Expires      time.Time `json:"expires"`      // of the intermediate
}

// Grant is an intermediate that was given, and what to trust.
type Grant struct {
	Certificate *x509.Certificate
	Roots       authority.Bundle
}

// grant reads an answer. What is wrong with it has no kind: fault.Invalid would blame the request.
func (a answer) grant() (Grant, error) {
	chain, err := authority.ParseCertificates([]byte(a.Certificates))
	if err != nil {
		return Grant{}, fmt.Errorf("answer cannot be used: %v", err)
	}
	roots, err := authority.ParseBundle([]byte(a.Roots))
	if err != nil {
		return Grant{}, fmt.Errorf("answer cannot be used: roots: %v", err)
	}
	return Grant{chain[0], roots}, nil
}
