package policyhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// SecurityGroups is what a Client knows of security groups: as a host's agent it is a secgroup.Feed, with the watch or, against a server of
// the deployed kind, by polling; as one of the people a secgroup.Book. It is safe for concurrent use.
type SecurityGroups struct {
	c *Client

	mu     sync.Mutex
	old    map[*server]time.Time // until when they count as without a watch
	polled map[*server]polledGroups
}

// polledGroups is what a server last answered to polling.
type polledGroups struct {
	ask   string // what it was asked for
	count int
	sum   secgroup.Digest
	next  time.Time // when it is asked again
}

// SecurityGroups returns the client's view of security groups. Each has its own memory of servers without a watch.
func (c *Client) SecurityGroups() *SecurityGroups {
	return &SecurityGroups{c: c, old: map[*server]time.Time{}, polled: map[*server]polledGroups{}}
}

var (
	_ secgroup.Feed = (*SecurityGroups)(nil)
	_ secgroup.Book = (*SecurityGroups)(nil)
)

// Watch implements secgroup.Feed. An answer that does not add up to its own seal is fault.Unavailable: nothing of it may be used.
//
// A server of the deployed kind is polled instead: the revisions then have the epoch Polled, their counters mean nothing, and that the list
// is complete is not proved by more than that it is an answer; secgroup.Held knows what that is worth. Groups that are bound to policy
// groups such a server does not have.
func (g *SecurityGroups) Watch(ctx context.Context, a secgroup.Ask) (u secgroup.Update, err error) {
	err = g.c.try(ctx, func(s *server) error {
		if g.isOld(s) {
			u, err = g.poll(ctx, s, a)
		} else {
			u, err = g.watch(ctx, s, a)
		}
		return err
	})
	if err != nil {
		return secgroup.Update{}, fmt.Errorf("watch security groups: %w", err)
	}
	return u, nil
}

func (g *SecurityGroups) watch(ctx context.Context, s *server, a secgroup.Ask) (secgroup.Update, error) {
	seconds := int(g.c.o.Wait / time.Second)
	in := wireGroupWatch{Host: a.Host, Spaces: orEmpty(a.Spaces), Members: orEmpty(a.Members), Since: a.Since, Wait: &seconds}
	if !a.Since.IsZero() {
		in.Sum = a.Sum.String()
	}
	waiting, cancel := context.WithTimeout(ctx, g.c.o.Wait+g.c.o.Timeout)
	defer cancel()
	var body json.RawMessage
	err := s.api.Do(waiting, http.MethodPost, PathWatchGroups, in, &body)
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok && (se.Status == http.StatusNotFound || se.Status == http.StatusMethodNotAllowed) {
		g.mu.Lock()
		again := g.c.o.Again
		g.old[s] = time.Now().Add(again - again/10 + rand.N(again/5+1))
		g.mu.Unlock()
		return g.poll(ctx, s, a)
	}
	if err != nil {
		return secgroup.Update{}, err
	}
	u, err := decodeGroups(body)
	if err == nil && !u.Full && u.Sum != a.Sum {
		return secgroup.Update{}, fault.Unavailablef("server %s says that nothing is new, but not of what this host has", s.api.Base)
	}
	return u, err
}

func (g *SecurityGroups) isOld(s *server) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Now().Before(g.old[s])
}

const (
	groupPages  = 1000 // of one list, at most
	groupTrials = 3    // to read a list of several pages that is the same twice
)

// poll asks a server of the deployed kind, as often as the deployed agents do, and returns what it has when that is new, or nothing after
// the client's wait.
func (g *SecurityGroups) poll(ctx context.Context, s *server, a secgroup.Ask) (secgroup.Update, error) {
	ask := strings.Join(a.Spaces, ",")
	same := func(sum secgroup.Digest) bool { return a.Since.Epoch == Polled && a.Sum == sum }
	end := time.Now().Add(g.c.o.Wait)
	for {
		g.mu.Lock()
		last := g.polled[s]
		g.mu.Unlock()
		if last.ask == ask && same(last.sum) {
			due := last.next
			if due.After(end) {
				due = end
			}
			if !reconcile.Sleep(ctx, time.Until(due)) {
				return secgroup.Update{}, ctx.Err()
			}
			if last.next.After(time.Now()) || !g.isOld(s) {
				return secgroup.Update{Revision: a.Since, Sum: a.Sum, Count: last.count}, nil
			}
		}
		list, err := g.fetch(ctx, s, ask)
		if err != nil {
			return secgroup.Update{}, err
		}
		every := g.c.o.PollGroups
		u := secgroup.Update{Full: true, Groups: list, Count: len(list), Sum: secgroup.Sum(list), Revision: revision.Revision{Epoch: Polled, Counter: uint64(secgroup.Sum(list))}}
		g.mu.Lock()
		g.polled[s] = polledGroups{ask, u.Count, u.Sum, time.Now().Add(every - every/10 + rand.N(every/5+1))}
		g.mu.Unlock()
		if !same(u.Sum) {
			return u, nil
		}
		if !time.Now().Before(end) {
			u.Full, u.Groups = false, nil
			return u, nil
		}
	}
}

// fetch gets the groups for all containers and for those of some spaces. A list that came in several pages may be torn: it counts when it
// is the same twice in a row.
func (g *SecurityGroups) fetch(ctx context.Context, s *server, spaces string) ([]secgroup.Record, error) {
	var before []secgroup.Record
	for n := range groupTrials {
		list, pages, err := g.fetchOnce(ctx, s, spaces)
		if err != nil || pages == 1 {
			return list, err
		}
		if n > 0 && slices.EqualFunc(list, before, secgroup.Record.Equal) {
			return list, nil
		}
		before = list
	}
	return nil, fault.Unavailablef("the list of security groups of %s changes while it is read", s.api.Base)
}

func (g *SecurityGroups) fetchOnce(ctx context.Context, s *server, spaces string) (list []secgroup.Record, pages int, err error) {
	q := "?per_page=" + strconv.Itoa(maxRecords)
	if spaces != "" {
		q += "&space_guids=" + url.QueryEscape(spaces)
	}
	seen := map[string]bool{}
	for from := int64(0); pages < groupPages; {
		p := PathSecurityGroups + q
		if from != 0 {
			p += "&from=" + strconv.FormatInt(from, 10)
		}
		var page struct {
			Next   *int64       `json:"next"`
			Groups []wireRecord `json:"security_groups"`
		}
		if err := g.get(ctx, s, p, &page); err != nil {
			return nil, 0, err
		}
		if page.Next == nil || page.Groups == nil {
			return nil, 0, fault.Unavailablef("answer is not what was expected: next or security_groups is missing")
		}
		pages++
		for _, w := range page.Groups {
			if seen[w.GUID] || w.GUID == "" {
				return nil, 0, fault.Unavailablef("the list of security groups of %s has %.60q twice, or without a guid", s.api.Base, w.GUID)
			}
			seen[w.GUID] = true
			list = append(list, w.record())
		}
		if from = *page.Next; from == 0 {
			return list, pages, nil
		}
	}
	return nil, 0, fault.Unavailablef("the list of security groups of %s has more than %d pages", s.api.Base, groupPages)
}

func (g *SecurityGroups) get(ctx context.Context, s *server, path string, out any) error {
	ctx, cancel := context.WithTimeout(ctx, g.c.o.Timeout)
	defer cancel()
	return s.api.Do(ctx, http.MethodGet, path, nil, out)
}

const groupsPath = ExternalV1 + "/security_groups"

// List implements secgroup.Book.
func (g *SecurityGroups) List(ctx context.Context) ([]secgroup.Kept, error) {
	var out struct {
		Groups []wireKept `json:"security_groups"`
	}
	if err := g.c.call(ctx, http.MethodGet, groupsPath, nil, &out); err != nil {
		return nil, fmt.Errorf("list security groups: %w", err)
	}
	if out.Groups == nil {
		return nil, errors.New("list security groups: answer is not what was expected: security_groups is missing")
	}
	list := make([]secgroup.Kept, len(out.Groups))
	for i, w := range out.Groups {
		var err error
		if list[i], err = w.received(); err != nil {
			return nil, fmt.Errorf("list security groups: %.60q: %w", w.Name, err)
		}
	}
	return list, nil
}

// received is kept for an answer, whose JSON may be spelled in another way.
func (w wireKept) received() (secgroup.Kept, error) {
	k := w.kept()
	var err error
	k.Rules, _, err = secgroup.Normalize(w.Rules)
	return k, err
}

// Create implements secgroup.Book.
func (g *SecurityGroups) Create(ctx context.Context, r secgroup.Record) (secgroup.Kept, error) {
	if !json.Valid([]byte(r.Rules)) {
		return secgroup.Kept{}, fault.Invalidf("create security group: rules are no JSON array of objects")
	}
	k, err := g.change(ctx, http.MethodPost, groupsPath, showKept(secgroup.Kept{Record: r}))
	if err != nil {
		return k, fmt.Errorf("create security group: %w", err)
	}
	return k, nil
}

// Change implements secgroup.Book.
func (g *SecurityGroups) Change(ctx context.Context, guid string, c secgroup.Change) (secgroup.Kept, error) {
	in := wireGroupChange{Name: c.Name, Bind: wireScope(c.Bind), Unbind: wireScope(c.Unbind)}
	if c.Rules != nil {
		if in.Rules = json.RawMessage(*c.Rules); !json.Valid(in.Rules) {
			return secgroup.Kept{}, fault.Invalidf("change security group: rules are no JSON array of objects")
		}
	}
	k, err := g.change(ctx, http.MethodPatch, groupsPath+"/"+url.PathEscape(guid), in)
	if err != nil {
		return k, fmt.Errorf("change security group: %w", err)
	}
	return k, nil
}

func (g *SecurityGroups) change(ctx context.Context, method, path string, in any) (secgroup.Kept, error) {
	var out wireKept
	if err := g.c.call(ctx, method, path, in, &out); err != nil {
		return secgroup.Kept{}, err
	}
	return out.received()
}

// Delete implements secgroup.Book.
func (g *SecurityGroups) Delete(ctx context.Context, guid string) error {
	if err := g.c.call(ctx, http.MethodDelete, groupsPath+"/"+url.PathEscape(guid), nil, nil); err != nil {
		return fmt.Errorf("delete security group: %w", err)
	}
	return nil
}
