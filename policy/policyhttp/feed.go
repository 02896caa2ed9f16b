package policyhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// Watch implements policy.Feed. Rules of the answer that cannot be used are left out and named by a *Partial error beside the
// update, whose seal then is that of the rules that are left: it may be applied.
//
// A server of the deployed kind is polled instead: revisions then have the epoch Polled and updates are full. When the server has learned
// the watch, the next update is full again and of another epoch.
func (c *Client) Watch(ctx context.Context, a policy.Ask) (u policy.Update, err error) {
	err = c.try(ctx, func(s *server) error {
		if s.isOld() {
			u, err = c.poll(ctx, s, a)
		} else {
			u, err = c.watch(ctx, s, a)
		}
		return err
	})
	var p *Partial
	switch {
	case err == nil:
		return u, nil
	case errors.As(err, &p):
		return u, p
	}
	return policy.Update{}, fmt.Errorf("watch policies: %w", err)
}

// watch asks with the watch, and once more from nothing when a change cannot be read: then everything that can be is better.
func (c *Client) watch(ctx context.Context, s *server, a policy.Ask) (policy.Update, error) {
	u, err := c.post(ctx, s, a)
	var p *Partial
	if errors.As(err, &p) && !u.Full {
		a.Since = revision.Revision{}
		return c.post(ctx, s, a)
	}
	return u, err
}

// post sends the ask, with its groups only if the server does not know them.
func (c *Client) post(ctx context.Context, s *server, a policy.Ask) (policy.Update, error) {
	id := setOf(a.Groups)
	seconds := int(c.o.Wait / time.Second)
	in := wireWatch{Host: a.Host, Set: id.String(), Since: a.Since, InForce: a.InForce, Wait: &seconds}
	if s.lacks(id) {
		in.Groups = a.Groups
	}
	ctx, cancel := context.WithTimeout(ctx, c.o.Wait+c.o.Timeout)
	defer cancel()
	var body json.RawMessage
	err := s.api.Do(ctx, http.MethodPost, PathWatch, in, &body)
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok {
		switch {
		case se.Status == http.StatusNotFound || se.Status == http.StatusMethodNotAllowed:
			s.setOld(c.o.Again)
			return c.poll(ctx, s, a)
		case se.Status == http.StatusPreconditionRequired && in.Groups == nil:
			in.Groups = a.Groups
			err = s.api.Do(ctx, http.MethodPost, PathWatch, in, &body)
		}
	}
	if err != nil {
		return policy.Update{}, err
	}
	s.setKnows(id)
	return decodeUpdate(body)
}

// Tag implements policy.Feed.
func (c *Client) Tag(ctx context.Context, g identity.Group, kind string) (identity.Tag, error) {
	var out struct {
		ID   identity.Group `json:"id"`
		Tag  string         `json:"tag"`
		Type string         `json:"type"`
	}
	err := c.call(ctx, http.MethodPut, PathTags, map[string]string{"id": string(g), "type": kind}, &out)
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok {
		switch {
		case se.Status == http.StatusConflict:
			err = fault.New(fault.Exhausted, se)
		case se.Status == http.StatusInternalServerError && se.Text == conflictText:
			err = fault.New(fault.Conflict, se)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("tag of %s: %w", g, err)
	}
	t, err := identity.ParseTag(out.Tag)
	if err != nil || out.ID != g {
		return 0, fmt.Errorf("tag of %s: answer cannot be used: it is tag %.20q of %.40q", g, out.Tag, out.ID)
	}
	return t, nil
}

// conflictText is what a server answers about a group that has a tag of another type; the deployed one says nothing else either.
const conflictText = "database create failed"

func (s *server) lacks(id setID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.knows != id
}

func (s *server) setKnows(id setID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.knows = id
}

func (s *server) isOld() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.old)
}

func (s *server) setOld(again time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.old = time.Now().Add(again - again/10 + rand.N(again/5+1))
}
