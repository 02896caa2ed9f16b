package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"code.cloudfoundry.org/silk/fault"
)

const (
	keysKept  = 24 * time.Hour  // for which keys are used while the issuer is away
	keysPause = 5 * time.Second // between two questions for a key that is not known
	maxKeys   = 256             // of one issuer
)

// keySet is the public keys of an issuer of tokens. They are fetched from time to time by whoever calls refresh, and when a token names a key
// that is not known. Who asks for a known key never waits.
type keySet struct {
	fetch func(ctx context.Context) ([]byte, error) // a JSON Web Key Set (RFC 7517, section 5)
	slot  chan struct{}                             // of the one who fetches

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time // the last success
	asked   time.Time // the end of the last try
	failed  error     // of the last try
}

func newKeySet(fetch func(ctx context.Context) ([]byte, error)) *keySet {
	return &keySet{fetch: fetch, slot: make(chan struct{}, 1)}
}

// find returns the keys that may have signed a token with the given key id, which may be empty. No key is fault.Denied when
// the issuer said just now which keys it has, and fault.Unavailable when it could not be asked.
func (s *keySet) find(ctx context.Context, kid string) ([]jose.JSONWebKey, error) {
	found, _, _ := s.look(kid)
	if found != nil {
		return found, nil
	}
	if _, err := s.refresh(ctx, keysPause); err != nil {
		return nil, err
	}
	found, asked, failed := s.look(kid)
	switch {
	case found != nil:
		return found, nil
	case failed != nil || asked.IsZero():
		return nil, fault.New(fault.Unavailable, fmt.Errorf("keys of the issuer: %w", failed))
	}
	return nil, fault.Deniedf("the issuer has no key %.80q", kid)
}

func (s *keySet) look(kid string) (found []jose.JSONWebKey, asked time.Time, failed error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.fetched) < keysKept {
		found = s.named(kid)
	}
	return found, s.asked, s.failed
}

// refresh asks the issuer, unless that was done less than gap ago, and reports whether it did. The error is only that ctx ended before it
// was its turn; what the issuer answered is in failed.
func (s *keySet) refresh(ctx context.Context, gap time.Duration) (bool, error) {
	select {
	case s.slot <- struct{}{}:
		defer func() { <-s.slot }()
	case <-ctx.Done():
		return false, fault.New(fault.Unavailable, ctx.Err())
	}
	s.mu.Lock()
	asked := s.asked
	s.mu.Unlock()
	if time.Since(asked) < gap {
		return false, nil
	}
	// The request that happens to ask may be given up; the keys are for all.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	b, err := s.fetch(ctx)
	var keys []jose.JSONWebKey
	if err == nil {
		keys, err = parseKeys(b)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = time.Now()
	if s.failed = err; err == nil {
		s.keys, s.fetched = keys, s.asked
	}
	return err == nil, nil
}

// keep is a pass of a loop that keeps the keys fresh.
func (s *keySet) keep(ctx context.Context) error {
	if _, err := s.refresh(ctx, 0); err != nil {
		return err
	}
	if _, _, failed := s.look(""); failed != nil {
		return fmt.Errorf("fetch keys of the issuer: %w", failed)
	}
	return nil
}

// named returns the keys of an id, or all of them when the token names none; nil if there is none. The caller holds mu.
func (s *keySet) named(kid string) []jose.JSONWebKey {
	if kid == "" && len(s.keys) > 0 {
		return s.keys
	}
	var found []jose.JSONWebKey
	for _, k := range s.keys {
		if k.KeyID == kid {
			found = append(found, k)
		}
	}
	return found
}

// parseKeys reads a key set. Keys that are of no use for verifying with a public key (others' kinds, secrets, encryption) are left out; a set
// that is no set, or has nothing in it, is an error: nobody who signs tokens says that.
func parseKeys(b []byte) ([]jose.JSONWebKey, error) {
	var in struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fmt.Errorf("key set is not what was expected: %w", err)
	}
	if len(in.Keys) == 0 || len(in.Keys) > maxKeys {
		return nil, fmt.Errorf("key set is not what was expected: it has %d keys", len(in.Keys))
	}
	keys := []jose.JSONWebKey{}
	for _, raw := range in.Keys {
		var k jose.JSONWebKey
		if json.Unmarshal(raw, &k) != nil || k.Use != "" && k.Use != "sig" || !k.Valid() || !k.IsPublic() || algorithmsOf(k.Key) == nil {
			continue
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// algorithms are all that are accepted: signatures that only the holder of a private key can make. "none" and those with a shared secret, for
// which a public key could be taken, are not among them.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// algorithmsOf returns those that a key can be used with.
func algorithmsOf(key any) []jose.SignatureAlgorithm {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < 1024 {
			return nil
		}
		return algorithms[:6]
	case *ecdsa.PublicKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return algorithms[6:7]
		case 384:
			return algorithms[7:8]
		case 521:
			return algorithms[8:9]
		}
	case ed25519.PublicKey:
		return algorithms[9:]
	}
	return nil
}

// fits reports whether a token signed with alg may be verified with k.
func fits(k jose.JSONWebKey, alg string) bool {
	return (k.Algorithm == "" || k.Algorithm == alg) && slices.Contains(algorithmsOf(k.Key), jose.SignatureAlgorithm(alg))
}
