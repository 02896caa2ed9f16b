package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"code.cloudfoundry.org/silk/fault"
)

// errNoJWT says that a token is not one that could be verified here: no JSON Web Token, or one signed in a way that is not accepted.
var errNoJWT = errors.New("token is no signed JSON Web Token of a kind that is accepted")

// leeway is by how much clocks may differ.
const leeway = time.Minute

// verify returns the claims of a signed JSON Web Token (RFC 7519) whose signature fits a key of the set and which is valid now. What is
// no such token is errNoJWT; one that is not good fault.Denied; one whose key cannot be fetched fault.Unavailable.
func verify(ctx context.Context, keys *keySet, token string) (claims, error) {
	if strings.Count(token, ".") != 2 {
		return nil, errNoJWT
	}
	signed, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil || len(signed.Signatures) != 1 {
		return nil, errNoJWT
	}
	payload, err := open(ctx, keys, signed)
	if err != nil {
		return nil, err
	}
	c, err := parseClaims(payload)
	if err != nil {
		return nil, err
	}
	return c, c.validAt(time.Now())
}

// open returns the payload if the signature is good. A key that an issuer gave anew under an old name is fetched.
func open(ctx context.Context, keys *keySet, signed *jose.JSONWebSignature) ([]byte, error) {
	head := signed.Signatures[0].Protected
	for {
		found, err := keys.find(ctx, head.KeyID)
		if err != nil {
			return nil, err
		}
		for _, k := range found {
			if !fits(k, head.Algorithm) {
				continue
			}
			if payload, err := signed.Verify(k.Key); err == nil {
				return payload, nil
			}
		}
		if again, err := keys.refresh(ctx, keysPause); err != nil {
			return nil, err
		} else if _, _, failed := keys.look(head.KeyID); !again && failed != nil {
			return nil, fault.New(fault.Unavailable, fmt.Errorf("keys of the issuer: %w", failed))
		} else if !again {
			return nil, fault.Deniedf("signature of the token does not fit the issuer's key %.80q", head.KeyID)
		}
	}
}

// claims are what a token says.
type claims map[string]json.RawMessage

func parseClaims(payload []byte) (claims, error) {
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil || c == nil {
		return nil, fault.Deniedf("claims of the token are no JSON object")
	}
	return c, nil
}

// validAt reports, as fault.Denied, a token that has ended or has not begun. One that never ends is not accepted.
func (c claims) validAt(now time.Time) error {
	exp, ok := c.time("exp")
	if !ok {
		return fault.Deniedf("token does not say when it ends")
	}
	if !now.Before(exp.Add(leeway)) {
		return fault.Deniedf("token has ended at %v", exp.UTC())
	}
	for _, name := range []string{"nbf", "iat"} {
		if t, ok := c.time(name); ok && now.Add(leeway).Before(t) {
			return fault.Deniedf("token begins at %v", t.UTC())
		}
	}
	return nil
}

// time returns a NumericDate (RFC 7519, section 2); false if there is none that makes sense.
func (c claims) time(name string) (time.Time, bool) {
	var n float64
	if raw, ok := c[name]; !ok || json.Unmarshal(raw, &n) != nil || bytes.Equal(raw, []byte("null")) || math.Abs(n) > 1<<40 {
		return time.Time{}, false
	}
	return time.Unix(int64(n), 0), true
}

// text returns a string, "" if there is none.
func (c claims) text(name string) string {
	var s string
	if raw, ok := c[name]; !ok || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// list returns a list of strings, which may also be spelled as one string with spaces between (RFC 8693, section 4.2), and whether there is one.
// Dots in the name lead into objects: "realm_access.roles".
func (c claims) list(name string) ([]string, bool) {
	raw, ok := c[name]
	if first, rest, dotted := strings.Cut(name, "."); !ok && dotted {
		var inner claims
		if json.Unmarshal(c[first], &inner) != nil {
			return nil, false
		}
		return inner.list(rest)
	}
	var l []string
	var s string
	switch {
	case !ok || bytes.Equal(raw, []byte("null")):
		return nil, false
	case json.Unmarshal(raw, &l) == nil:
		return l, true
	case json.Unmarshal(raw, &s) == nil:
		return strings.Fields(s), true
	}
	return nil, false
}
