package policyhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
)

// Create implements policy.Book.
func (c *Client) Create(ctx context.Context, ps []policy.Policy) error {
	_, err := c.change(ctx, "/policies", ps, 0)
	return err
}

// Delete implements policy.Book.
func (c *Client) Delete(ctx context.Context, ps []policy.Policy) error {
	_, err := c.change(ctx, "/policies/delete", ps, 0)
	return err
}

// CreateInForce is Create that then waits, at most for the given time, until the policies are in force. Force.InForce of its answer
// tells whether they are. A server of the deployed kind does not wait: that is fault.NotFound after the policies are made.
func (c *Client) CreateInForce(ctx context.Context, ps []policy.Policy, wait time.Duration) (Force, error) {
	return c.change(ctx, "/policies", ps, wait)
}

// DeleteInForce is Delete that then waits, at most for the given time, until the policies are no longer in force; see CreateInForce.
func (c *Client) DeleteInForce(ctx context.Context, ps []policy.Policy, wait time.Duration) (Force, error) {
	return c.change(ctx, "/policies/delete", ps, wait)
}

func (c *Client) change(ctx context.Context, path string, ps []policy.Policy, wait time.Duration) (Force, error) {
	if len(ps) == 0 {
		return Force{InForce: true}, nil
	}
	for _, p := range ps {
		if err := p.Validate(); err != nil {
			return Force{}, fmt.Errorf("policy %v: %w", p, err)
		}
	}
	path = ExternalV1 + path
	if wait > 0 {
		path += "?wait=in-force&timeout=" + wait.String()
	}
	var out wireForce
	err := c.try(ctx, func(s *server) error {
		ctx, cancel := context.WithTimeout(ctx, c.o.Timeout+wait)
		defer cancel()
		return s.api.Do(ctx, http.MethodPost, path, json.RawMessage(encodePolicies(ps)), &out)
	})
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok {
		switch {
		case se.Text == ErrQuota.Error():
			err = fault.New(fault.Exhausted, errors.Join(ErrQuota, se))
		case se.Status == http.StatusConflict:
			err = fault.New(fault.Exhausted, se)
		}
	}
	if err != nil {
		return Force{}, fmt.Errorf("change policies: %w", err)
	}
	if wait > 0 && out.Revision.IsZero() {
		return Force{}, fault.NotFoundf("the policies are changed, but the policy-server does not tell when that is in force: it is of an earlier kind")
	}
	return Force{out.InForce, out.Known, out.Reporting, out.Unknown, out.Lagging, out.Behind, out.OldAgents}, nil
}

// encodePolicies returns the body of a create or delete.
func encodePolicies(ps []policy.Policy) []byte {
	b := make([]byte, 0, 16+len(ps)*ruleSize)
	b = append(b, `{"policies":[`...)
	for i, p := range ps {
		if i > 0 {
			b = append(b, ',')
		}
		b = shape{version: v1}.appendRule(b, &policy.Rule{Policy: p})
	}
	return append(b, "]}"...)
}

// listAtOnce is how many groups one request names, so that its line stays short.
const listAtOnce = 200

// List implements policy.Book. With a *Partial error the policies returned are good but not all.
func (c *Client) List(ctx context.Context, f policy.Filter) ([]policy.Policy, error) {
	if f.Either != nil {
		f.Sources, f.Destinations = nil, nil
	}
	var all []policy.Rule
	var bad []error
	for _, either := range parts(f.Either) {
		for _, sources := range parts(f.Sources) {
			for _, destinations := range parts(f.Destinations) {
				rs, err := c.listPart(ctx, policy.Filter{Either: either, Sources: sources, Destinations: destinations})
				var p *Partial
				switch {
				case errors.As(err, &p):
					bad = append(bad, p.Skipped...)
				case err != nil:
					return nil, fmt.Errorf("list policies: %w", err)
				}
				all = append(all, rs...)
			}
		}
	}
	all = sortRules(all)
	ps := make([]policy.Policy, len(all))
	for i, r := range all {
		ps[i] = r.Policy
	}
	return ps, partial(bad)
}

// parts cuts a list of groups; none and an empty one are one part.
func parts(gs []identity.Group) [][]identity.Group {
	if len(gs) <= listAtOnce {
		return [][]identity.Group{gs}
	}
	return slices.Collect(slices.Chunk(gs, listAtOnce))
}

func (c *Client) listPart(ctx context.Context, f policy.Filter) ([]policy.Rule, error) {
	var q []string
	add := func(key string, gs []identity.Group) {
		if gs == nil {
			return
		}
		names := make([]string, len(gs))
		for i, g := range gs {
			names[i] = escapeID(string(g))
		}
		q = append(q, key+"="+strings.Join(names, ","))
	}
	add("id", f.Either)
	add("source_id", f.Sources)
	add("dest_id", f.Destinations)
	path := ExternalV1 + "/policies"
	if q != nil {
		path += "?" + strings.Join(q, "&")
	}
	var body json.RawMessage
	if err := c.call(ctx, http.MethodGet, path, nil, &body); err != nil {
		return nil, err
	}
	return decodeList(body, false)
}

// escapeID is for a query that the deployed server reads too: of GUIDs nothing changes.
func escapeID(s string) string { return url.QueryEscape(s) }

// Tags returns the groups that have a tag, by tag; only an admin may ask.
func (c *Client) Tags(ctx context.Context) ([]identity.Tagged, error) {
	var out struct {
		Tags []struct {
			ID   identity.Group `json:"id"`
			Tag  string         `json:"tag"`
			Type string         `json:"type"`
		} `json:"tags"`
	}
	if err := c.call(ctx, http.MethodGet, ExternalV1+"/tags", nil, &out); err != nil {
		return nil, fmt.Errorf("list tags: %w", err)
	}
	ts := make([]identity.Tagged, 0, len(out.Tags))
	var bad []error
	for _, t := range out.Tags {
		n, err := identity.ParseTag(t.Tag)
		if err != nil {
			bad = append(bad, fmt.Errorf("tag of %s: %w", strconv.Quote(string(t.ID)), err))
			continue
		}
		ts = append(ts, identity.Tagged{Group: t.ID, Tag: n, Kind: t.Type})
	}
	return ts, partial(bad)
}

// WhoAmI returns the name by which the server knows the caller.
func (c *Client) WhoAmI(ctx context.Context) (string, error) {
	var out struct {
		Subject string `json:"subject"`
	}
	if err := c.call(ctx, http.MethodGet, ExternalV1+"/whoami", nil, &out); err != nil {
		return "", fmt.Errorf("ask for my name: %w", err)
	}
	return out.Subject, nil
}
