package auth

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

// UAA knows callers by tokens of Cloud Foundry's UAA, and gets one of its own. Tokens that are signed are verified here, with the keys that UAA
// publishes; it is asked about tokens that are not, or that say that they can be revoked. It is safe for concurrent use.
type UAA struct {
	base           string // without a final slash
	client, secret string
	issuer         string
	out            *outbound.Client
	log            *slog.Logger
	keys           *keySet

	mu      sync.Mutex
	checked map[[sha256.Size]byte]checked // what UAA said of tokens a moment ago

	slot   chan struct{} // of the one who uses what follows
	own    string
	expiry time.Time // of own, with a margin
	failed time.Time // when it could not be had
	why    error
}

type checked struct {
	caller policyhttp.Caller
	until  time.Time
}

// UAAConfig is how UAA is reached.
type UAAConfig struct {
	Base           string // "https://uaa.service.cf.internal:8443"
	Client, Secret string // of policy-server itself
	Issuer         string // that tokens must name; empty: any that UAA signs
}

// NewUAA returns a UAA. It asks nothing yet.
func NewUAA(cfg UAAConfig, out *outbound.Client, log *slog.Logger) *UAA {
	u := &UAA{
		base: strings.TrimSuffix(cfg.Base, "/"), client: cfg.Client, secret: cfg.Secret, issuer: cfg.Issuer, out: out, log: log,
		checked: map[[sha256.Size]byte]checked{}, slot: make(chan struct{}, 1),
	}
	u.keys = newKeySet(u.fetchKeys)
	return u
}

// errRefused is what a caller with a token that is not good is told, in the words of the deployed server. Why is in the log at level debug.
var errRefused = fault.Deniedf("failed to verify token with uaa")

// Authenticate is a Method.
func (u *UAA) Authenticate(r *http.Request) (policyhttp.Caller, error) {
	token, err := bearer(r)
	switch {
	case errors.Is(err, policyhttp.ErrNoCredentials):
		return policyhttp.Caller{}, err
	case err != nil:
		return policyhttp.Caller{}, errRefused
	}
	c, err := u.verify(r.Context(), token)
	if errors.Is(err, fault.Denied) {
		u.log.Debug("token refused", "method", "uaa", "error", err)
		err = errRefused
	}
	return c, err
}

func (u *UAA) verify(ctx context.Context, token string) (policyhttp.Caller, error) {
	c, err := verify(ctx, u.keys, token)
	switch {
	case errors.Is(err, errNoJWT), err == nil && !u.plain(c):
		return u.check(ctx, token)
	case err != nil:
		return policyhttp.Caller{}, err
	case u.issuer != "" && c.text("iss") != u.issuer:
		return policyhttp.Caller{}, fault.Deniedf("token is of the issuer %.100q, expected %q", c.text("iss"), u.issuer)
	}
	return callerOf(c), nil
}

// plain reports whether the claims are those of an access token that holds until it ends. UAA signs refresh tokens (whose id ends in -r) and identity
// tokens (whose only scope is openid) with the same keys, and only it knows whether a revocable token has been revoked.
func (u *UAA) plain(c claims) bool {
	var revocable bool
	if raw, ok := c["revocable"]; ok && (json.Unmarshal(raw, &revocable) != nil || revocable) {
		return false
	}
	scopes, ok := c.list("scope")
	return ok && !strings.HasSuffix(c.text("jti"), "-r") && !slices.Equal(scopes, []string{"openid"})
}

func callerOf(c claims) policyhttp.Caller {
	scopes, _ := c.list("scope")
	k := policyhttp.Caller{Name: c.text("user_name"), Subject: c.text("sub"), Scopes: scopes}
	if k.Name == "" {
		k.Name = k.Subject
	}
	return k
}

const (
	believed   = 5 * time.Second // for which an answer of UAA about a token is used again
	maxChecked = 4096            // answers kept
)

// check asks UAA about a token.
func (u *UAA) check(ctx context.Context, token string) (policyhttp.Caller, error) {
	id := sha256.Sum256([]byte(token))
	u.mu.Lock()
	known, ok := u.checked[id]
	u.mu.Unlock()
	if ok && time.Now().Before(known.until) {
		return known.caller, nil
	}
	a, err := u.post(ctx, "/check_token", url.Values{"token": {token}})
	if err != nil {
		return policyhttp.Caller{}, err
	}
	if a.Status >= 400 {
		return policyhttp.Caller{}, refusal(a)
	}
	var c claims
	if err := a.Decode(&c); err != nil {
		return policyhttp.Caller{}, fmt.Errorf("check token: %w", err)
	}
	if _, ok := c.list("scope"); !ok {
		return policyhttp.Caller{}, fault.Unavailablef("check token: answer of uaa has no scope")
	}
	end := time.Now().Add(believed)
	if exp, ok := c.time("exp"); ok && exp.Before(end) {
		if end = exp; time.Now().After(exp.Add(leeway)) {
			return policyhttp.Caller{}, fault.Deniedf("token has ended at %v", exp.UTC())
		}
	}
	known = checked{callerOf(c), end}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.checked) >= maxChecked {
		clear(u.checked)
	}
	u.checked[id] = known
	return known.caller, nil
}

// refusal tells a token that UAA refuses from a policy-server that UAA refuses, and from somebody else who answers in its place: UAA says in JSON what is wrong.
func refusal(a outbound.Answer) error {
	var body struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	_ = json.Unmarshal(a.Body, &body) // without it nobody was refused
	ours := slices.Contains([]string{"", "unauthorized", "invalid_client", "access_denied", "insufficient_scope"}, body.Error)
	if body.Error == "invalid_token" || a.Status == http.StatusBadRequest && !ours {
		return fault.Deniedf("uaa refuses the token: %d %.100s", a.Status, body.Error)
	}
	return fault.Unavailablef("check token: answer is %d %.100s %.200s: see uaa_url, uaa_client and uaa_client_secret", a.Status, body.Error, body.Description)
}

func (u *UAA) post(ctx context.Context, path string, form url.Values) (outbound.Answer, error) {
	text := form.Encode()
	return u.out.Ask(ctx, func(ctx context.Context) (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.base+path, strings.NewReader(text))
		if err != nil {
			return nil, err
		}
		req.SetBasicAuth(u.client, u.secret)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Accept", "application/json")
		return req, nil
	})
}

func (u *UAA) fetchKeys(ctx context.Context) ([]byte, error) {
	a, err := u.out.Ask(ctx, func(ctx context.Context) (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.base+"/token_keys", http.NoBody)
		if err != nil {
			return nil, err
		}
		req.SetBasicAuth(u.client, u.secret)
		req.Header.Set("Accept", "application/json")
		return req, nil
	})
	if err != nil {
		return nil, err
	}
	return a.Body, a.Decode(new(json.RawMessage))
}

// KeepKeys is a pass of a loop that keeps UAA's keys fresh, so that no request waits for them.
func (u *UAA) KeepKeys(ctx context.Context) error { return u.keys.keep(ctx) }

// Token returns policy-server's own token, fetched anew when less than a tenth of its time is left, at least 10 s. While UAA is away those who ask at
// the same time fail together.
func (u *UAA) Token(ctx context.Context) (string, error) {
	select {
	case u.slot <- struct{}{}:
		defer func() { <-u.slot }()
	case <-ctx.Done():
		return "", fault.New(fault.Unavailable, ctx.Err())
	}
	if time.Now().Before(u.expiry) {
		return u.own, nil
	}
	if time.Since(u.failed) < time.Second {
		return "", u.why
	}
	token, life, err := u.fetchToken(ctx)
	if err != nil {
		u.failed, u.why = time.Now(), fmt.Errorf("get a token: %w", err)
		return "", u.why
	}
	u.own, u.expiry = token, time.Now().Add(life-max(life/10, 10*time.Second))
	return token, nil
}

// fetchToken returns a new token of policy-server's own and for how long it is good.
func (u *UAA) fetchToken(ctx context.Context) (string, time.Duration, error) {
	a, err := u.post(ctx, "/oauth/token", url.Values{"client_id": {u.client}, "grant_type": {"client_credentials"}})
	if err != nil {
		return "", 0, err
	}
	var out struct {
		Token   string  `json:"access_token"`
		Expires float64 `json:"expires_in"` // seconds
	}
	if err := a.Decode(&out); err != nil {
		return "", 0, err
	}
	if out.Token == "" {
		return "", 0, fault.Unavailablef("answer of uaa has no access_token")
	}
	return out.Token, time.Duration(min(max(out.Expires, 0), 24*3600) * float64(time.Second)), nil
}

// Forget makes the next Token a new one, because somebody did not accept the given one.
func (u *UAA) Forget(token string) {
	u.slot <- struct{}{}
	defer func() { <-u.slot }()
	if u.own == token {
		u.expiry = time.Time{}
	}
}
