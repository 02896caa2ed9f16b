package auth_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"code.cloudfoundry.org/silk/policyserver/auth"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

var discard = slog.New(slog.DiscardHandler)

// issuer is an HTTP server that behaves as UAA does, and as an OpenID issuer.
type issuer struct {
	*httptest.Server

	mu     sync.Mutex
	keys   []jose.JSONWebKey
	signer map[string]any            // by key id
	opaque map[string]map[string]any // what check_token knows
	calls  map[string]int            // by path
	fail   func(w http.ResponseWriter, r *http.Request) bool
	forms  []string
}

func newIssuer(t testing.TB) *issuer {
	i := &issuer{signer: map[string]any{}, opaque: map[string]map[string]any{}, calls: map[string]int{}}
	i.Server = httptest.NewServer(http.HandlerFunc(i.serve))
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) serve(w http.ResponseWriter, r *http.Request) {
	r.ParseForm() // before anything waits: only then a client that leaves ends the context
	i.mu.Lock()
	defer i.mu.Unlock()
	i.calls[r.URL.Path]++
	if i.fail != nil && i.fail(w, r) {
		return
	}
	reply := func(code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(v)
	}
	user, password, _ := r.BasicAuth()
	switch r.URL.Path {
	case "/token_keys", "/jwks":
		reply(200, map[string]any{"keys": i.keys})
	case "/.well-known/openid-configuration":
		reply(200, map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/jwks"})
	case "/check_token", "/oauth/token":
		if user != "network-policy" || password != "se&cret" {
			reply(401, map[string]any{"error": "unauthorized", "error_description": "Bad credentials"})
			return
		}
		i.forms = append(i.forms, r.Form.Encode())
		if r.URL.Path == "/oauth/token" {
			reply(200, map[string]any{"access_token": fmt.Sprintf("own-%d", i.calls[r.URL.Path]), "expires_in": 600, "token_type": "bearer"})
			return
		}
		if c, ok := i.opaque[r.Form.Get("token")]; ok {
			reply(200, c)
			return
		}
		reply(400, map[string]any{"error": "invalid_token", "error_description": "Invalid token"})
	default:
		http.NotFound(w, r)
	}
}

// rsaKey makes the key of an id one of the issuer's.
func (i *issuer) rsaKey(t testing.TB, kid string) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i.add(kid, k, &k.PublicKey, "RS256")
	return k
}

func (i *issuer) ecKey(t testing.TB, kid string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.add(kid, k, &k.PublicKey, "ES256")
}

func (i *issuer) add(kid string, private, public any, alg string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.signer[kid] = private
	i.keys = append(i.keys, jose.JSONWebKey{Key: public, KeyID: kid, Algorithm: alg, Use: "sig"})
}

// drop takes a key out of what the issuer publishes.
func (i *issuer) drop(kid string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var kept []jose.JSONWebKey
	for _, k := range i.keys {
		if k.KeyID != kid {
			kept = append(kept, k)
		}
	}
	i.keys = kept
}

func (i *issuer) failing(f func(w http.ResponseWriter, r *http.Request) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.fail = f
}

func (i *issuer) called(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls[path]
}

// sign returns a token with the claims.
func (i *issuer) sign(t testing.TB, alg jose.SignatureAlgorithm, kid string, claims map[string]any) string {
	t.Helper()
	return sign(t, alg, kid, i.signer[kid], claims)
}

func sign(t testing.TB, alg jose.SignatureAlgorithm, kid string, key any, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// with returns the claims of a good token of UAA with some of them changed; nil takes one away.
func with(changes map[string]any) map[string]any {
	c := map[string]any{
		"sub": "user-id", "user_name": "ada", "client_id": "cf", "scope": []string{"openid", "network.write"}, "jti": "abc",
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(), "aud": []string{"network", "cf"},
	}
	for k, v := range changes {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	return c
}

func newUAA(i *issuer, more ...func(*auth.UAAConfig)) *auth.UAA {
	cfg := auth.UAAConfig{Base: i.URL, Client: "network-policy", Secret: "se&cret"}
	for _, f := range more {
		f(&cfg)
	}
	return auth.NewUAA(cfg, outbound.New(nil, 300*time.Millisecond, "uaa"), discard)
}

func bearing(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	if token != "" {
		r.Header.Set("Authorization", "bearer "+token)
	}
	return r
}

func unsigned(alg string, claims map[string]any) string {
	b, _ := json.Marshal(claims)
	enc := base64.RawURLEncoding.EncodeToString
	return strings.Join([]string{enc([]byte(`{"alg":"` + alg + `","typ":"JWT","kid":"one"}`)), enc(b), ""}, ".")
}
