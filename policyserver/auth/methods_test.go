package auth_test

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policyserver/auth"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

func TestOIDC(t *testing.T) {
	i := newIssuer(t)
	i.ecKey(t, "one")
	ask := outbound.New(nil, time.Second, "issuer")
	cfg := auth.OIDCConfig{
		Issuer: i.URL, Audience: "silk", ScopeClaim: "realm_access.roles", Scopes: map[string]string{"ops": policyhttp.Admin, "dev": policyhttp.Writer},
		GroupsClaim: "apps", NameClaim: "email",
	}
	o := auth.NewOIDC(cfg, ask, discard)
	claims := func(changes map[string]any) map[string]any {
		c := with(map[string]any{
			"iss": i.URL, "aud": "silk", "email": "ada@example", "realm_access": map[string]any{"roles": []string{"dev", "network.admin", "x"}}, "apps": []string{"shop", "*"},
		})
		for k, v := range changes {
			c[k] = v
		}
		return c
	}
	c, err := o.Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(nil))))
	if err != nil || c.Name != "ada@example" || !slices.Equal(c.Scopes, []string{policyhttp.Writer, "x"}) || !slices.Equal(c.Groups, []string{"shop"}) || c.Admin() {
		t.Errorf("caller %+v, %v", c, err)
	}
	c, err = o.Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(map[string]any{"aud": []string{"a", "silk"}, "realm_access": map[string]any{"roles": "ops"}}))))
	if err != nil || !c.Admin() {
		t.Errorf("caller %+v, %v, want an admin", c, err)
	}
	for what, changed := range map[string]map[string]any{
		"issuer": {"iss": "https://evil"}, "audience": {"aud": "other"}, "no audience": {"aud": nil}, "audience that is a number": {"aud": 7}, "nobody": {"sub": ""},
		"ended": {"exp": 1}, "end that is a word": {"exp": "tomorrow"}, "end beyond time": {"exp": 1e300},
	} {
		if _, err := o.Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(changed)))); !errors.Is(err, fault.Denied) || err.Error() != "failed to verify token" {
			t.Errorf("%s: %v, want denied", what, err)
		}
	}
	if _, err := o.Authenticate(bearing("opaque")); !errors.Is(err, fault.Denied) {
		t.Errorf("opaque: %v, want denied", err)
	}
	if _, err := o.Authenticate(bearing(unsigned("none", claims(nil)))); !errors.Is(err, fault.Denied) {
		t.Errorf("not signed: %v, want denied", err)
	}
	// Without a mapping the issuer's scopes count as they are; without a claim for groups there are none.
	plain := auth.NewOIDC(auth.OIDCConfig{Issuer: i.URL, Audience: "silk"}, ask, discard)
	c, err = plain.Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(map[string]any{"scope": "openid network.admin"}))))
	if err != nil || !c.Admin() || c.Groups == nil || len(c.Groups) != 0 {
		t.Errorf("caller %+v, %v", c, err)
	}
	// An issuer that says it is another, or is away, is not believed and no denial.
	cfg.Issuer = i.URL + "/"
	if _, err := auth.NewOIDC(cfg, ask, discard).Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(nil)))); !errors.Is(err, fault.Unavailable) {
		t.Errorf("another issuer's configuration: %v, want unavailable", err)
	}
	i.failing(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true })
	if _, err := auth.NewOIDC(auth.OIDCConfig{Issuer: i.URL, Audience: "silk"}, ask, discard).Authenticate(bearing(i.sign(t, jose.ES256, "one", claims(nil)))); !errors.Is(err, fault.Unavailable) {
		t.Errorf("outage: %v, want unavailable", err)
	}
}

func hash(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

func TestTokensOfAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"tokens":[{"name":"ada","sha256":"` + hash("secret") + `","admin":true},{"name":"ci","sha256":"` + hash("other") + `","groups":["shop-*"]},{"name":"none","sha256":"` + hash("third") + `"}]}`)
	k, err := auth.OpenTokens(path, discard)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := k.Authenticate(bearing("secret")); err != nil || !c.Admin() || c.Name != "ada" {
		t.Errorf("caller %+v, %v", c, err)
	}
	if c, err := k.Authenticate(bearing("other")); err != nil || c.Admin() || !slices.Equal(c.Groups, []string{"shop-*"}) || !slices.Equal(c.Scopes, []string{policyhttp.Writer}) {
		t.Errorf("caller %+v, %v", c, err)
	}
	if c, err := k.Authenticate(bearing("third")); err != nil || c.Groups == nil || len(c.Groups) != 0 {
		t.Errorf("caller %+v, %v, want one without groups", c, err)
	}
	for _, token := range []string{"Secret", "secret ", hash("secret"), "x"} {
		if _, err := k.Authenticate(bearing(token)); !errors.Is(err, fault.Denied) {
			t.Errorf("%q: %v, want denied", token, err)
		}
	}
	if _, err := k.Authenticate(bearing("")); !errors.Is(err, policyhttp.ErrNoCredentials) {
		t.Errorf("without a token: %v", err)
	}
	// A broken file leaves what was known; a good one is taken soon.
	write(`{"tokens":[`)
	eventually(t, func() bool { _, err := k.Authenticate(bearing("secret")); return err == nil })
	write(`{"tokens":[{"name":"bob","sha256":"` + hash("new") + `","admin":true}]}`)
	eventually(t, func() bool { c, err := k.Authenticate(bearing("new")); return err == nil && c.Name == "bob" })
	if _, err := k.Authenticate(bearing("secret")); !errors.Is(err, fault.Denied) {
		t.Errorf("token that was taken out: %v, want denied", err)
	}
	if _, err := auth.OpenTokens(filepath.Join(t.TempDir(), "none"), discard); err == nil {
		t.Error("a file that is not there was opened")
	}
}

// TestATokenIsReplacedByAnotherOfItsSize in a file whose time stays the same, as tools leave it that set all times alike.
func TestATokenIsReplacedByAnotherOfItsSize(t *testing.T) {
	path, at := filepath.Join(t.TempDir(), "tokens.json"), time.Unix(1_700_000_000, 0)
	write := func(token string) {
		t.Helper()
		text := `{"tokens":[{"name":"ada","sha256":"` + hash(token) + `","admin":true}]}`
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	write("stolen")
	k, err := auth.OpenTokens(path, discard)
	if err != nil {
		t.Fatal(err)
	}
	write("fresh")
	eventually(t, func() bool { _, err := k.Authenticate(bearing("fresh")); return err == nil })
	if _, err := k.Authenticate(bearing("stolen")); !errors.Is(err, fault.Denied) {
		t.Errorf("token that was taken out: %v, want denied", err)
	}
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	testkit.Until(t, 20*time.Second, "it did not happen", ok)
}

func TestCertificates(t *testing.T) {
	m := &auth.Certificates{Admins: []string{"ops.*"}, Writers: map[string][]string{"ci": {"shop-*"}, "c*": {"x"}}}
	with := func(verified bool, cn string, dns ...string) *http.Request {
		r := bearing("")
		c := &x509.Certificate{Subject: pkix.Name{CommonName: cn}, DNSNames: dns}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}}
		if verified {
			r.TLS.VerifiedChains = [][]*x509.Certificate{{c}}
		}
		return r
	}
	if c, err := m.Authenticate(with(true, "", "x", "ops.one")); err != nil || !c.Admin() || c.Name != "ops.one" {
		t.Errorf("caller %+v, %v", c, err)
	}
	if c, err := m.Authenticate(with(true, "ci")); err != nil || c.Admin() || !slices.Equal(c.Groups, []string{"shop-*", "x"}) {
		t.Errorf("caller %+v, %v", c, err)
	}
	if _, err := m.Authenticate(with(true, "nobody")); !errors.Is(err, fault.Denied) || errors.Is(err, policyhttp.ErrNoCredentials) {
		t.Errorf("nobody: %v, want denied", err)
	}
	token := with(true, "ops.one")
	token.Header.Set("Authorization", "bearer x")
	for what, r := range map[string]*http.Request{"not verified": with(false, "ops.one"), "no tls": bearing(""), "with a token": token} {
		if _, err := m.Authenticate(r); !errors.Is(err, policyhttp.ErrNoCredentials) {
			t.Errorf("%s: %v, want no credentials", what, err)
		}
	}
}

func TestFirstOf(t *testing.T) {
	none := func(*http.Request) (policyhttp.Caller, error) {
		return policyhttp.Caller{}, policyhttp.ErrNoCredentials
	}
	no := func(*http.Request) (policyhttp.Caller, error) { return policyhttp.Caller{}, fault.Deniedf("no") }
	away := func(*http.Request) (policyhttp.Caller, error) { return policyhttp.Caller{}, fault.Unavailablef("away") }
	broken := func(*http.Request) (policyhttp.Caller, error) { return policyhttp.Caller{}, errors.New("broken") }
	yes := func(*http.Request) (policyhttp.Caller, error) { return policyhttp.Caller{Name: "x"}, nil }
	for _, c := range []struct {
		methods []auth.Method
		want    error
	}{
		{nil, policyhttp.ErrNoCredentials}, {[]auth.Method{none, none}, policyhttp.ErrNoCredentials}, {[]auth.Method{none, no}, fault.Denied}, {[]auth.Method{away, no}, fault.Unavailable},
		{[]auth.Method{no, away, none}, fault.Unavailable}, {[]auth.Method{no, broken}, fault.Unavailable}, {[]auth.Method{away, yes}, nil},
	} {
		if _, err := auth.FirstOf(c.methods...)(bearing("x")); !errors.Is(err, c.want) {
			t.Errorf("%v, want %v", err, c.want)
		}
	}
}
