package auth_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policyserver/auth"
)

const refused = "failed to verify token with uaa"

func TestAValidTokenNeedsNoCall(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	u := newUAA(i)
	token := i.sign(t, jose.RS256, "one", with(nil))
	for range 5 {
		c, err := u.Authenticate(bearing(token))
		if err != nil || c.Name != "ada" || c.Subject != "user-id" || !slices.Equal(c.Scopes, []string{"openid", "network.write"}) || c.Groups != nil {
			t.Fatalf("caller %+v, %v", c, err)
		}
	}
	if n := i.called("/check_token"); n != 0 || i.called("/token_keys") != 1 {
		t.Errorf("check_token was called %d times, token_keys %d times, want none and one", n, i.called("/token_keys"))
	}
	// A client's own token has no user.
	c, err := u.Authenticate(bearing(i.sign(t, jose.RS256, "one", with(map[string]any{"user_name": nil, "sub": "client"}))))
	if err != nil || c.Name != "client" {
		t.Errorf("caller %+v, %v, want client", c, err)
	}
}

func TestAnOutageIsNoDenial(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	i.opaque["opaque"] = with(nil)
	token := i.sign(t, jose.RS256, "one", with(nil))
	other := sign(t, jose.RS256, "two", mustRSA(t), with(nil))
	for name, fail := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"500":     func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true },
		"404":     func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(404); return true },
		"garbage": func(w http.ResponseWriter, _ *http.Request) bool { w.Write([]byte("<html>")); return true },
		"empty":   func(w http.ResponseWriter, _ *http.Request) bool { w.Write([]byte("{}")); return true },
		"no keys": func(w http.ResponseWriter, _ *http.Request) bool { w.Write([]byte(`{"keys":[]}`)); return true },
		"redirect": func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
			return true
		},
		"silence": func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true },
		"cut off": func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			i.failing(nil)
			warm, cold := newUAA(i), newUAA(i)
			if _, err := warm.Authenticate(bearing(token)); err != nil {
				t.Fatal(err)
			}
			i.failing(fail)
			if _, err := warm.Authenticate(bearing(token)); err != nil {
				t.Errorf("with keys at hand: %v, want the caller", err)
			}
			for what, err := range map[string]error{
				"without keys": try(cold, token), "opaque": try(warm, "opaque"), "unknown key": try(cold, other),
			} {
				if !errors.Is(err, fault.Unavailable) || errors.Is(err, fault.Denied) {
					t.Errorf("%s: %v, want unavailable", what, err)
				}
			}
			if err := warm.KeepKeys(t.Context()); err == nil {
				t.Error("keys were kept fresh without the issuer")
			}
			if err := try(warm, token); err != nil {
				t.Errorf("after keys could not be fetched: %v, want the caller", err)
			}
		})
	}
	i.failing(nil)
}

func try(u *auth.UAA, token string) error {
	_, err := u.Authenticate(bearing(token))
	return err
}

func mustRSA(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestTokensThatAreNotGood(t *testing.T) {
	i := newIssuer(t)
	key := i.rsaKey(t, "one")
	u := newUAA(i, func(c *auth.UAAConfig) { c.Issuer = "https://uaa/oauth/token" })
	ours := map[string]any{"iss": "https://uaa/oauth/token"}
	and := func(k string, v any) map[string]any {
		return with(map[string]any{"iss": ours["iss"], k: v})
	}
	if err := try(u, i.sign(t, jose.RS256, "one", with(ours))); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	forged := i.sign(t, jose.RS256, "one", with(ours))
	for what, token := range map[string]string{
		"expired":                i.sign(t, jose.RS256, "one", and("exp", time.Now().Add(-2*time.Minute).Unix())),
		"without an end":         i.sign(t, jose.RS256, "one", and("exp", nil)),
		"not yet begun":          i.sign(t, jose.RS256, "one", and("nbf", time.Now().Add(time.Hour).Unix())),
		"of the future":          i.sign(t, jose.RS256, "one", and("iat", time.Now().Add(time.Hour).Unix())),
		"of another issuer":      i.sign(t, jose.RS256, "one", and("iss", "https://evil")),
		"another's signature":    sign(t, jose.RS256, "one", mustRSA(t), with(ours)),
		"unknown key":            sign(t, jose.RS256, "ninety", mustRSA(t), with(ours)),
		"public key as secret":   sign(t, jose.HS256, "one", public, with(ours)),
		"not signed":             unsigned("none", with(ours)),
		"empty signature":        unsigned("RS256", with(ours)),
		"changed":                forged[:len(forged)-5] + "AAAAA",
		"refresh token":          i.sign(t, jose.RS256, "one", and("jti", "abc-r")),
		"identity token":         i.sign(t, jose.RS256, "one", and("scope", []string{"openid"})),
		"no scope":               i.sign(t, jose.RS256, "one", and("scope", nil)),
		"revoked":                i.sign(t, jose.RS256, "one", and("revocable", true)),
		"opaque and not known":   "nonsense",
		"claims that are a list": i.sign(t, jose.RS256, "one", nil),
	} {
		if err := try(u, token); !errors.Is(err, fault.Denied) || errors.Is(err, fault.Unavailable) || err.Error() != refused {
			t.Errorf("%s: %v, want %q", what, err, refused)
		}
	}
	if err := try(u, ""); !errors.Is(err, policyhttp.ErrNoCredentials) {
		t.Errorf("without a token: %v", err)
	}
}

func TestOpaqueAndRevocableTokensAreChecked(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	u := newUAA(i)
	revocable := i.sign(t, jose.RS256, "one", with(map[string]any{"revocable": true}))
	odd := "a&b=c+d/e="
	i.opaque[odd], i.opaque[revocable] = with(map[string]any{"user_name": "opaque"}), with(nil)
	for _, token := range []string{odd, revocable} {
		for range 3 {
			if err := try(u, token); err != nil {
				t.Errorf("%.20s: %v", token, err)
			}
		}
	}
	if n := i.called("/check_token"); n != 2 {
		t.Errorf("check_token was called %d times for two tokens in a moment, want 2", n)
	}
	if want := "token=a%26b%3Dc%2Bd%2Fe%3D"; i.forms[0] != want {
		t.Errorf("check_token was sent %s, want %s", i.forms[0], want)
	}
	i.opaque["ended"] = with(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})
	if err := try(u, "ended"); !errors.Is(err, fault.Denied) {
		t.Errorf("token that has ended: %v, want denied", err)
	}
}

func TestAServerThatUAARefusesIsNotTheCallersFault(t *testing.T) {
	i := newIssuer(t)
	i.opaque["opaque"] = with(nil)
	u := newUAA(i, func(c *auth.UAAConfig) { c.Secret = "wrong" })
	if err := try(u, "opaque"); !errors.Is(err, fault.Unavailable) {
		t.Errorf("with a wrong secret: %v, want unavailable", err)
	}
	if _, err := u.Token(t.Context()); !errors.Is(err, fault.Unavailable) {
		t.Errorf("own token with a wrong secret: %v, want unavailable", err)
	}
}

// TestWhoeverAnswersForUAAIsNotBelieved: only UAA itself, in its own words, can say that a token is not good.
func TestWhoeverAnswersForUAAIsNotBelieved(t *testing.T) {
	i := newIssuer(t)
	u := newUAA(i)
	for _, c := range []struct {
		status int
		body   string
		kind   fault.Kind
	}{
		{400, `{"error":"invalid_token","error_description":"expired"}`, fault.Denied},
		{401, `{"error":"invalid_token"}`, fault.Denied},
		{400, `{"error":"invalid_request"}`, fault.Denied},
		{400, "Client sent an HTTP request to an HTTPS server.\n", fault.Unavailable},
		{400, `{}`, fault.Unavailable},
		{400, `{"error":"invalid_client"}`, fault.Unavailable},
		{401, `{"error":"unauthorized","error_description":"Bad credentials"}`, fault.Unavailable},
		{401, "<html>who are you?</html>", fault.Unavailable},
		{403, "<html>blocked</html>", fault.Unavailable},
		{404, "404 Not Found: Requested route does not exist.\n", fault.Unavailable},
		{429, "", fault.Unavailable},
	} {
		i.failing(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/check_token" {
				return false
			}
			w.WriteHeader(c.status)
			w.Write([]byte(c.body))
			return true
		})
		if err := try(u, "opaque"); fault.Of(err) != c.kind {
			t.Errorf("%d %s: %v, want %v", c.status, c.body, err, c.kind)
		}
	}
}

// TestANewKeyOfAnOldName cannot be told from a forgery while UAA is away.
func TestANewKeyOfAnOldName(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	u := newUAA(i)
	if err := try(u, i.sign(t, jose.RS256, "one", with(nil))); err != nil {
		t.Fatal(err)
	}
	i.failing(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true })
	if err := u.KeepKeys(t.Context()); err == nil {
		t.Fatal("keys were fetched from one who is away")
	}
	if err := try(u, sign(t, jose.RS256, "one", mustRSA(t), with(nil))); !errors.Is(err, fault.Unavailable) {
		t.Errorf("signed by another key of the name: %v, want unavailable", err)
	}
}

func TestKeysRotate(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	u := newUAA(i)
	old := i.sign(t, jose.RS256, "one", with(nil))
	if err := try(u, old); err != nil {
		t.Fatal(err)
	}
	i.rsaKey(t, "two")
	i.ecKey(t, "three")
	if err := u.KeepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	for kid, alg := range map[string]jose.SignatureAlgorithm{"one": jose.RS256, "two": jose.RS256, "three": jose.ES256} {
		if err := try(u, i.sign(t, alg, kid, with(nil))); err != nil {
			t.Errorf("key %s: %v", kid, err)
		}
	}
	i.drop("one")
	if err := u.KeepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := try(u, old); !errors.Is(err, fault.Denied) {
		t.Errorf("key that UAA no longer has: %v, want denied", err)
	}
	// Keys that cannot be used do not spoil the others, and RSA keys do not verify with another algorithm than theirs.
	i.mu.Lock()
	i.keys = append(i.keys, jose.JSONWebKey{Key: []byte("secret"), KeyID: "hmac", Algorithm: "HS256"})
	i.mu.Unlock()
	if err := u.KeepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := try(u, i.sign(t, jose.RS256, "two", with(nil))); err != nil {
		t.Errorf("beside a secret key: %v", err)
	}
	for _, token := range []string{i.sign(t, jose.PS256, "two", with(nil)), sign(t, jose.HS256, "hmac", []byte("secret-secret-secret-secret-secret"), with(nil))} {
		if err := try(u, token); !errors.Is(err, fault.Denied) {
			t.Errorf("another algorithm: %v, want denied", err)
		}
	}
}

// TestUnknownKeysAreAskedForSeldom: who sends nonsense does not make the server ask UAA each time.
func TestUnknownKeysAreAskedForSeldom(t *testing.T) {
	i := newIssuer(t)
	i.rsaKey(t, "one")
	u := newUAA(i)
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			if err := try(u, unsigned("RS256", with(map[string]any{"n": n}))); !errors.Is(err, fault.Denied) {
				t.Errorf("%v, want denied", err)
			}
		})
	}
	wg.Wait()
	if n := i.called("/token_keys"); n > 2 {
		t.Errorf("token_keys was called %d times", n)
	}
}

func TestOwnTokenIsKept(t *testing.T) {
	i := newIssuer(t)
	u := newUAA(i)
	first, err := u.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if again, err := u.Token(t.Context()); again != first || err != nil {
			t.Fatalf("token %q, %v, want %q", again, err, first)
		}
	}
	u.Forget("another")
	if again, _ := u.Token(t.Context()); again != first {
		t.Error("a token was given up for another's failure")
	}
	u.Forget(first)
	if again, err := u.Token(t.Context()); again == first || err != nil {
		t.Errorf("token %q, %v, want a new one", again, err)
	}
	if i.forms[0] != "client_id=network-policy&grant_type=client_credentials" {
		t.Errorf("asked with %s", i.forms[0])
	}
}
