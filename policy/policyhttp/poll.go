package policyhttp

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// Polled is the epoch of revisions that come from polling a server without a watch: their counters are the server's time stamps.
const Polled = "polled"

const (
	refresh   = 5 * time.Minute // after which a list is fetched though the stamp is the same: the deployed server's may repeat
	idsAtOnce = 500             // groups in one request
)

// polled is what a server last answered to polling.
type polled struct {
	set      setID
	revision revision.Revision
	count    int
	sum      policy.Digest
	fetched  time.Time
}

// poll asks a server of the deployed kind until its list may have changed, as the deployed agents do, but compares stamps for equality: they may go
// back. Ctx and the client's wait bound it.
func (c *Client) poll(ctx context.Context, s *server, a policy.Ask) (policy.Update, error) {
	id := setOf(a.Groups)
	s.mu.Lock()
	last := s.polled
	s.mu.Unlock()
	known := !a.Since.IsZero() && last.set == id && last.revision == a.Since && time.Since(last.fetched) < refresh
	end := time.Now().Add(c.o.Wait)
	for {
		stamp, err := c.stamp(ctx, s)
		if err != nil && ctx.Err() != nil {
			return policy.Update{}, err
		}
		if !known || err != nil || stamp != a.Since.Counter {
			return c.fetch(ctx, s, a.Groups, stamp)
		}
		// From here nothing is new.
		if !time.Now().Before(end) || !s.isOld() {
			return policy.Update{Revision: last.revision, Count: last.count, Sum: last.sum}, nil
		}
		pause := time.NewTimer(c.o.Poll - c.o.Poll/10 + rand.N(c.o.Poll/5+1))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return policy.Update{}, ctx.Err()
		}
	}
}

// stamp asks when policies changed last.
func (c *Client) stamp(ctx context.Context, s *server) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	var n uint64
	err := s.api.Do(ctx, http.MethodGet, PathLastUpdated, nil, &n)
	return n, err
}

// fetch gets the rules that touch groups, at least as new as the stamp, which was read before.
func (c *Client) fetch(ctx context.Context, s *server, groups []identity.Group, stamp uint64) (policy.Update, error) {
	var rules []policy.Rule
	var bad []error
	for part := range slices.Chunk(groups, idsAtOnce) {
		names := make([]string, len(part))
		for i, g := range part {
			names[i] = escapeID(string(g))
		}
		rs, err := c.fetchPart(ctx, s, PathPolicies+"?id="+strings.Join(names, ","))
		var p *Partial
		switch {
		case errors.As(err, &p):
			bad = append(bad, p.Skipped...)
		case err != nil:
			return policy.Update{}, err
		}
		rules = append(rules, rs...)
	}
	rules = sortRules(rules)
	u := policy.Update{Revision: revision.Revision{Epoch: Polled, Counter: stamp}, Full: true, Set: rules, Count: len(rules), Sum: policy.Sum(rules)}
	s.mu.Lock()
	s.polled = polled{setOf(groups), u.Revision, u.Count, u.Sum, time.Now()}
	s.mu.Unlock()
	return u, partial(bad)
}

func (c *Client) fetchPart(ctx context.Context, s *server, path string) ([]policy.Rule, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	var body json.RawMessage
	if err := s.api.Do(ctx, http.MethodGet, path, nil, &body); err != nil {
		return nil, err
	}
	return decodeList(body, true)
}
