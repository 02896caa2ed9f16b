// Package auth finds out who sends a request to policy-server's external API: by a token of UAA or of another OpenID issuer, by a client
// certificate, or by a token from a file.
//
// It says who somebody is and which scopes they have, not what they may do: policyhttp and policyserver/cc do. Whoever is
// away, such as UAA, is fault.Unavailable and never a denial.
//
// Use: m := auth.FirstOf(uaa.Authenticate, tokens.Authenticate); caller, err := m(request).
package auth

import (
	"errors"
	"net/http"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

// Method says who sends a request. It returns policyhttp.ErrNoCredentials when the request has none that the method knows, another
// fault.Denied for credentials that are not good, and fault.Unavailable when that cannot be found out at present.
type Method func(r *http.Request) (policyhttp.Caller, error)

// FirstOf asks methods in order until one knows the caller. When none does, whoever was not able to tell comes before whoever said no.
func FirstOf(methods ...Method) Method {
	return func(r *http.Request) (policyhttp.Caller, error) {
		worst := error(policyhttp.ErrNoCredentials)
		for _, m := range methods {
			c, err := m(r)
			if err == nil {
				return c, nil
			}
			switch {
			case errors.Is(worst, fault.Unavailable), errors.Is(err, policyhttp.ErrNoCredentials):
			case errors.Is(err, fault.Denied), errors.Is(err, fault.Unavailable):
				worst = err
			default:
				worst = fault.New(fault.Unavailable, err)
			}
		}
		return policyhttp.Caller{}, worst
	}
}

// maxToken bounds a token in bytes.
const maxToken = 16 << 10

// bearer returns the token of a request. As in the deployed server a value without the word "bearer" is a token too.
func bearer(r *http.Request) (string, error) {
	v := r.Header.Get("Authorization")
	if v == "" {
		return "", policyhttp.ErrNoCredentials
	}
	v = strings.TrimPrefix(strings.TrimPrefix(v, "Bearer "), "bearer ")
	if v == "" || len(v) > maxToken {
		return "", fault.Deniedf("token has %d bytes: expected 1 to %d", len(v), maxToken)
	}
	return v, nil
}
