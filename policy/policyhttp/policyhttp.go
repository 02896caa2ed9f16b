// Package policyhttp is the policy API over HTTP: ExternalHandler serves people and programs that change policies, InternalHandler
// serves the agents of hosts, and Client is a policy.Book and a policy.Feed on the other side.
//
// The external routes (versions v0 and v1) and the internal ones are those of the deployed policy-server and answer as it does; POST
// PathWatch and waiting for force are ours. docs/api/policies.md shows all of them with requests and answers. The package
// knows no database, no kernel, and no way to find out who a caller is: it is told by ExternalOptions.Authenticate.
//
// Use: service.HTTP("internal", ln, tlsConfig, policyhttp.InternalHandler(backend, log, policyhttp.InternalOptions{}), ...) on the one
// side, policyhttp.NewClient(urls, tlsConfig, policyhttp.ClientOptions{}) on the other.
package policyhttp

import (
	"context"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// The routes. External ones follow ExternalV1 or ExternalV0.
const (
	ExternalV1 = "/networking/v1/external"
	ExternalV0 = "/networking/v0/external"

	PathPolicies       = "/networking/v1/internal/policies"
	PathLastUpdated    = "/networking/v1/internal/policies_last_updated"
	PathSecurityGroups = "/networking/v1/internal/security_groups"
	PathTags           = "/networking/v1/internal/tags"
	PathWatch          = "/networking/v1/internal/watch"
)

// MaxWait bounds what a caller of PathWatch may wait for; longer waits are cut to it.
const MaxWait = 60 * time.Second

// Backend is what the handlers serve: policysql.Store has all of it as methods, and tests make parts of it fail. Every function is
// required, is safe for concurrent use and returns when its context ends.
type Backend struct {
	// Create adds policies, all or none; those that exist are no error. A source may have at most quota policies afterwards (0: any number).
	// It returns a revision at which all of them hold. policy.ErrQuota: the quota; another fault.Exhausted: no tag is left.
	Create func(ctx context.Context, ps []policy.Policy, quota int) (revision.Revision, error)
	// Remove removes policies, all or none; those that do not exist are no error. It returns a revision at which none of them holds.
	Remove func(ctx context.Context, ps []policy.Policy) (revision.Revision, error)
	// Rules returns the policies that a filter selects, with tags.
	Rules func(ctx context.Context, f policy.Filter) ([]policy.Rule, error)
	// Tags returns all groups that have a tag, by tag.
	Tags func(ctx context.Context) ([]identity.Tagged, error)
	// Tag is that of policy.Feed.
	Tag func(ctx context.Context, g identity.Group, kind string) (identity.Tag, error)
	// Stamp returns nanoseconds since 1970 that grow with each change.
	Stamp func(ctx context.Context) (int64, error)
	// Watch is that of policy.Feed. When ctx has a deadline it returns at it without an error.
	Watch func(ctx context.Context, a policy.Ask) (policy.Update, error)
	// Force says how far a revision of groups has come.
	Force func(ctx context.Context, at revision.Revision, groups []identity.Group) (Force, error)
	// Polled is told of each host that polls as the deployed agents do; its argument is the host's address.
	Polled func(host string)
	// Ping asks the database whether it is there.
	Ping func(ctx context.Context) error
}

// Force tells which hosts have a revision in their kernels. Hosts without a container of a group concerned count as having it.
type Force struct {
	Known     int      // hosts that have reported, however long ago
	Reporting int      // of these, the ones that reported within their lease time
	Polling   int      // hosts that lately polled as the deployed agents do, which report nothing
	Lagging   []string // hosts that report an older revision, sorted
}

// Unknown returns the number of hosts of which nobody knows what is in their kernels.
func (f Force) Unknown() int { return f.Known - f.Reporting + f.Polling }

// Complete reports whether every host that reports has the revision and none polls as the deployed agents do.
func (f Force) Complete() bool { return len(f.Lagging) == 0 && f.Polling == 0 }

// Caller is who sends a request to the external API.
type Caller struct {
	Name    string   // for people: "admin"; for the log and whoami
	Subject string   // for other systems: the user's GUID
	Scopes  []string // what the caller may do: Admin, Writer, and others that mean nothing here
	Groups  []string // what the caller may write without being asked elsewhere: names of groups, "*" in them stands for anything; nil: ask elsewhere
}

// The scopes that mean something.
const (
	Admin  = "network.admin" // everything
	Writer = "network.write" // policies between groups that the caller may write
)

// Admin reports whether the caller may do everything.
func (c Caller) Admin() bool { return slices.Contains(c.Scopes, Admin) }
