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
	"errors"
	"iter"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// The routes. External ones follow ExternalV1 or ExternalV0.
const (
	ExternalV1 = "/networking/v1/external"
	ExternalV0 = "/networking/v0/external"

	PathPolicies       = "/networking/v1/internal/policies"
	PathLastUpdated    = "/networking/v1/internal/policies_last_updated"
	PathSecurityGroups = "/networking/v1/internal/security_groups"
	PathWatchGroups    = "/networking/v1/internal/security_groups/watch"
	PathTags           = "/networking/v1/internal/tags"
	PathWatch          = "/networking/v1/internal/watch"
)

// MaxWait bounds what a caller of PathWatch may wait for; longer waits are cut to it.
const MaxWait = 60 * time.Second

// Backend is what the handlers serve: policysql.Store has all of it as methods, and tests make parts of it fail. Every function
// is required, is safe for concurrent use and returns when its context ends.
type Backend struct {
	// Create adds policies, all or none; those that exist are no error. A source may have at most quota policies afterwards (0: any number).
	// It returns a revision at which all of them hold. ErrQuota: the quota; another fault.Exhausted: no tag is left.
	Create func(ctx context.Context, ps []policy.Policy, quota int) (revision.Revision, error)
	// Remove removes policies, all or none; those that do not exist are no error. It returns a revision at which none of them holds.
	Remove func(ctx context.Context, ps []policy.Policy) (revision.Revision, error)
	// Rules returns the policies that a filter selects, with tags, and their number. They may be ranged over more than once.
	Rules func(ctx context.Context, f policy.Filter) (iter.Seq[policy.Rule], int, error)
	// Tags returns all groups that have a tag, by tag.
	Tags func(ctx context.Context) ([]identity.Tagged, error)
	// Tag is that of policy.Feed.
	Tag func(ctx context.Context, g identity.Group, kind string) (identity.Tag, error)
	// Stamp returns nanoseconds since 1970 that grow with each change.
	Stamp func(ctx context.Context) (int64, error)
	// Watch is that of policy.Feed, with the longest time to wait.
	Watch func(ctx context.Context, a policy.Ask, wait time.Duration) (policy.Update, error)
	// Force waits until a revision is in force on every host that reports, at most for the given time, and says how far it has come.
	// Only hosts with one of the groups matter.
	Force func(ctx context.Context, at revision.Revision, groups []identity.Group, wait time.Duration) (Force, error)
	// GroupPage returns a part of the security groups for all containers and for those of some spaces, at most limit (0: all), from where the Next of another
	// part says (0: the first).
	GroupPage func(ctx context.Context, spaces []string, from int64, limit int) (GroupPage, error)
	// WatchGroups is that of secgroup.Feed, with the longest time to wait.
	WatchGroups func(ctx context.Context, a secgroup.Ask, wait time.Duration) (secgroup.Update, error)
	// Groups keeps security groups for people.
	Groups secgroup.Book
	// Polled is told when an agent polled as deployed ones do, which report nothing.
	Polled func(at time.Time)
	// Ping asks the database whether it is there.
	Ping func(ctx context.Context) error

	TagLength int // of tags in bytes, 1 to 3: how wide they are written
}

// ErrQuota says that a source would have more policies than its quota. It is fault.Exhausted.
var ErrQuota = fault.New(fault.Exhausted, errors.New("policy quota exceeded"))

// Force tells how far a revision has come.
type Force struct {
	InForce   bool     // every host that reports has it in its kernel, and no agent of the deployed kind polled lately
	Known     int      // hosts that reported within a day
	Reporting int      // of Known, those that reported lately
	Unknown   int      // of Known, the others; nothing waits for them
	Lagging   []string // of Reporting, those that do not have it, sorted, perhaps not all
	Behind    int      // how many lag, at least
	OldAgents bool     // an agent of the deployed kind, which reports nothing, polled lately
}

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
