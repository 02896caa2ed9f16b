package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

// OIDCConfig is how tokens of an OpenID issuer are judged.
type OIDCConfig struct {
	Issuer      string            `json:"issuer"`       // its URL; its keys are found by OpenID Connect Discovery 1.0
	Audience    string            `json:"audience"`     // that tokens must name
	CAFile      string            `json:"ca_file"`      // authorities of the issuer's certificate; empty: the system's
	NameClaim   string            `json:"name_claim"`   // default preferred_username, then sub
	ScopeClaim  string            `json:"scope_claim"`  // default scope; dots lead into objects
	Scopes      map[string]string `json:"scopes"`       // from what the issuer calls it to network.admin or network.write
	GroupsClaim string            `json:"groups_claim"` // the policy groups that the caller may write; empty: none
}

// OIDC knows callers by the signed tokens of an OpenID issuer. It is safe for concurrent use.
type OIDC struct {
	cfg  OIDCConfig
	out  *outbound.Client
	log  *slog.Logger
	keys *keySet
}

// NewOIDC returns an OIDC. It asks nothing yet.
func NewOIDC(cfg OIDCConfig, out *outbound.Client, log *slog.Logger) *OIDC {
	if cfg.NameClaim == "" {
		cfg.NameClaim = "preferred_username"
	}
	if cfg.ScopeClaim == "" {
		cfg.ScopeClaim = "scope"
	}
	o := &OIDC{cfg: cfg, out: out, log: log}
	o.keys = newKeySet(o.fetchKeys)
	return o
}

// KeepKeys is a pass of a loop that keeps the issuer's keys fresh, so that no request waits for them.
func (o *OIDC) KeepKeys(ctx context.Context) error { return o.keys.keep(ctx) }

// Authenticate is a Method.
func (o *OIDC) Authenticate(r *http.Request) (policyhttp.Caller, error) {
	token, err := bearer(r)
	if err != nil {
		return policyhttp.Caller{}, err
	}
	c, err := verify(r.Context(), o.keys, token)
	if errors.Is(err, errNoJWT) {
		err = fault.New(fault.Denied, err)
	}
	if err == nil {
		err = o.judge(c)
	}
	if errors.Is(err, fault.Denied) {
		o.log.Debug("token refused", "method", "oidc", "error", err)
		err = fault.Deniedf("failed to verify token")
	}
	if err != nil {
		return policyhttp.Caller{}, err
	}
	return o.caller(c), nil
}

// judge reports, as fault.Denied, a token that is of another issuer or for somebody else.
func (o *OIDC) judge(c claims) error {
	if c.text("iss") != o.cfg.Issuer {
		return fault.Deniedf("token is of the issuer %.100q, expected %q", c.text("iss"), o.cfg.Issuer)
	}
	var one string
	var all []string
	if json.Unmarshal(c["aud"], &one) == nil {
		all = []string{one}
	} else if json.Unmarshal(c["aud"], &all) != nil {
		all = nil
	}
	if !slices.Contains(all, o.cfg.Audience) {
		return fault.Deniedf("token is for %.200q, expected %q", all, o.cfg.Audience)
	}
	if c.text("sub") == "" {
		return fault.Deniedf("token names nobody")
	}
	return nil
}

func (o *OIDC) caller(c claims) policyhttp.Caller {
	k := policyhttp.Caller{Name: c.text(o.cfg.NameClaim), Subject: c.text("sub"), Scopes: []string{}, Groups: []string{}}
	if k.Name == "" {
		k.Name = k.Subject
	}
	given, _ := c.list(o.cfg.ScopeClaim)
	for _, s := range given {
		if ours, ok := o.cfg.Scopes[s]; ok {
			s = ours
		} else if o.cfg.Scopes != nil && (s == policyhttp.Admin || s == policyhttp.Writer) {
			continue // with a mapping only what it says counts
		}
		k.Scopes = append(k.Scopes, s)
	}
	if o.cfg.GroupsClaim != "" {
		groups, _ := c.list(o.cfg.GroupsClaim)
		for _, g := range groups {
			if !strings.Contains(g, "*") { // a name of the issuer's is no pattern of ours
				k.Groups = append(k.Groups, g)
			}
		}
	}
	return k
}

// fetchKeys asks the issuer where its keys are, and for them.
func (o *OIDC) fetchKeys(ctx context.Context) ([]byte, error) {
	var about struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	b, err := o.get(ctx, strings.TrimSuffix(o.cfg.Issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &about); err != nil {
		return nil, fmt.Errorf("configuration of the issuer: %w", err)
	}
	if about.Issuer != o.cfg.Issuer {
		return nil, fmt.Errorf("configuration of the issuer is that of %.100q, expected %q", about.Issuer, o.cfg.Issuer)
	}
	u, err := url.Parse(about.Keys)
	if err != nil || u.Host == "" || u.Scheme != "https" && !strings.HasPrefix(o.cfg.Issuer, "http://") {
		return nil, fmt.Errorf("configuration of the issuer: jwks_uri %.100q: expected an https URL", about.Keys)
	}
	return o.get(ctx, about.Keys)
}

func (o *OIDC) get(ctx context.Context, url string) ([]byte, error) {
	a, err := o.out.Ask(ctx, func(ctx context.Context) (*http.Request, error) {
		return http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	})
	if err != nil {
		return nil, err
	}
	return a.Body, a.Decode(new(json.RawMessage))
}
