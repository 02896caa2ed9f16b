package policyserver

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/revision"
)

// backend is the store as the API wants it.
func (p *program) backend() policyhttp.Backend {
	s := p.opened.Load()
	return policyhttp.Backend{
		Create: func(ctx context.Context, ps []policy.Policy, quota int) (revision.Revision, error) {
			at, err := s.CreateWithin(ctx, ps, quota)
			if errors.Is(err, policysql.ErrQuota) {
				err = fault.New(fault.Exhausted, errors.Join(policyhttp.ErrQuota, err))
			}
			return at, err
		},
		Remove: s.Remove,
		Rules: func(ctx context.Context, f policy.Filter) (iter.Seq[policy.Rule], int, error) {
			v, err := s.Snapshot(ctx)
			if err != nil {
				return nil, 0, err
			}
			if f.Either == nil && f.Sources == nil && f.Destinations == nil {
				return v.All(), v.Len(), nil
			}
			rules := v.Select(f)
			return slices.Values(rules), len(rules), nil
		},
		Tags: s.Tags, Tag: s.Tag, Stamp: s.Stamp, Watch: s.WatchFor, Polled: s.DeployedPoll, Ping: s.Ping,
		Force: func(ctx context.Context, at revision.Revision, groups []identity.Group, wait time.Duration) (policyhttp.Force, error) {
			f, err := s.Force(ctx, at, groups, wait)
			return policyhttp.Force(f), err
		},
		GroupPage: func(ctx context.Context, spaces []string, from int64, limit int) (policyhttp.GroupPage, error) {
			pg, err := s.SecurityGroups().Page(ctx, spaces, from, limit)
			return policyhttp.GroupPage(pg), err
		},
		WatchGroups: s.SecurityGroups().WatchFor, Groups: s.SecurityGroups(),
		TagLength: p.cfg.TagLength,
	}
}

func (p *program) externalHandler() http.Handler {
	o := policyhttp.ExternalOptions{
		Authenticate: p.who, Access: p.access, SelfService: p.cfg.SelfService, MaxPolicies: p.cfg.MaxPolicies, CORS: p.cfg.AllowedCORS,
		HSTS: p.cfg.EnableTLS, Observe: p.metrics.requests.Observe("external"),
	}
	if p.cleaner != nil {
		o.Cleanup = p.cleaner.clean
	}
	return policyhttp.ExternalHandler(p.backend(), p.log, o)
}

func (p *program) internalHandler() http.Handler {
	return policyhttp.InternalHandler(p.backend(), p.log, policyhttp.InternalOptions{
		Clients: p.cfg.InternalClients, BindHosts: p.cfg.BindUnderlay, Observe: p.metrics.requests.Observe("internal"),
	})
}

// few is the number of groups up to which Cloud Controller is asked about each of them, and not for all that the caller has.
const few = 500

// access returns which groups a caller may write: those that the method of authentication gave, or the apps in spaces of which
// the caller is a developer. An app that Cloud Controller does not know is nobody's.
func (p *program) access(ctx context.Context, c policyhttp.Caller, groups []identity.Group) (map[identity.Group]bool, error) {
	mine := map[identity.Group]bool{}
	switch {
	case len(groups) == 0:
		return mine, nil
	case c.Groups != nil:
		for _, g := range groups {
			if slices.ContainsFunc(c.Groups, func(pattern string) bool { return policyhttp.Matches(pattern, string(g)) }) {
				mine[g] = true
			}
		}
		return mine, nil
	case p.cc == nil || c.Subject == "":
		return mine, nil
	case len(groups) > few:
		return mine, p.addAllApps(ctx, c.Subject, mine)
	}
	return mine, p.addApps(ctx, c.Subject, groups, mine)
}

// addApps adds those of groups that are apps in spaces of which the user is a developer.
func (p *program) addApps(ctx context.Context, user string, groups []identity.Group, mine map[identity.Group]bool) error {
	spaces, err := p.cc.Spaces(ctx, textOf(groups))
	if err != nil {
		return err
	}
	var distinct []string
	for _, s := range spaces {
		distinct = append(distinct, s)
	}
	slices.Sort(distinct)
	developed, err := p.cc.DevelopedOf(ctx, user, slices.Compact(distinct))
	if err != nil {
		return err
	}
	for app, space := range spaces {
		if developed[space] {
			mine[identity.Group(app)] = true
		}
	}
	return nil
}

// addAllApps adds all apps in spaces of which the user is a developer.
func (p *program) addAllApps(ctx context.Context, user string, mine map[identity.Group]bool) error {
	developed, err := p.cc.Developed(ctx, user)
	if err != nil {
		return err
	}
	spaces := make([]string, 0, len(developed))
	for s := range developed {
		spaces = append(spaces, s)
	}
	slices.Sort(spaces)
	apps, err := p.cc.Apps(ctx, spaces)
	for a := range apps {
		mine[identity.Group(a)] = true
	}
	return err
}

func textOf(groups []identity.Group) []string {
	text := make([]string, len(groups))
	for i, g := range groups {
		text[i] = string(g)
	}
	return text
}

// ping asks the database, if it is connected.
func (p *program) ping(ctx context.Context) error {
	s := p.opened.Load()
	if s == nil {
		return fmt.Errorf("the database is not connected yet")
	}
	return s.Ping(ctx)
}

func (p *program) debugHandler() http.Handler {
	m := service.Debug(p.level())
	m.Handle("GET /metrics", p.metrics.handler(p.log))
	return m
}

func (p *program) healthHandler() http.Handler {
	m := http.NewServeMux()
	m.Handle("/", policyhttp.HealthHandler(p.ping, p.log))
	m.Handle("GET /metrics", p.metrics.handler(p.log))
	return httpjson.Admit(16, time.Second, m)
}
