package auth

import (
	"crypto/x509"
	"net/http"
	"slices"
	"strconv"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

// Certificates knows callers by the names in their client certificates, which the listener has verified: common name and DNS names.
// "*" in a name of Admins and Writers stands for any text.
type Certificates struct {
	CAFile  string              `json:"ca_file"` // authorities of these certificates
	Admins  []string            `json:"admins"`  // names of those who may do everything
	Writers map[string][]string `json:"writers"` // names, and the groups that each may write; "*" in them stands for any text
}

// Authenticate is a Method. A request with an Authorization header is left to the other methods.
func (c *Certificates) Authenticate(r *http.Request) (policyhttp.Caller, error) {
	if r.Header.Get("Authorization") != "" || r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return policyhttp.Caller{}, policyhttp.ErrNoCredentials
	}
	names := namesOf(r.TLS.PeerCertificates[0])
	for _, n := range names {
		if slices.ContainsFunc(c.Admins, func(p string) bool { return policyhttp.Matches(p, n) }) {
			scopes, groups := rights(true, nil)
			return policyhttp.Caller{Name: n, Subject: n, Scopes: scopes, Groups: groups}, nil
		}
	}
	var groups []string
	found := false
	for pattern, gs := range c.Writers {
		for _, n := range names {
			if policyhttp.Matches(pattern, n) {
				groups, found = append(groups, gs...), true
				break
			}
		}
	}
	if !found {
		return policyhttp.Caller{}, fault.Deniedf("the client certificate of %s is neither one of mtls.admins nor of mtls.writers", strconv.Quote(names[0]))
	}
	slices.Sort(groups)
	scopes, groups := rights(false, groups)
	return policyhttp.Caller{Name: names[0], Subject: names[0], Scopes: scopes, Groups: groups}, nil
}

// namesOf returns the names of a certificate, the common name first if it has one; at least one, perhaps "".
func namesOf(c *x509.Certificate) []string {
	var names []string
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	for _, n := range c.DNSNames {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	if names == nil {
		return []string{""}
	}
	return names
}
