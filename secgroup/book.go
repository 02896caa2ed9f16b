package secgroup

import (
	"context"
	"slices"

	"code.cloudfoundry.org/silk/identity"
)

// Book is what keeps security groups for people. Its implementations are policysql.SecurityGroups (a database) and policyhttp.Client (a
// policy-server, as one of its users); policytest.RunSecurityGroups is what both pass. All methods are safe for concurrent use and return
// when ctx ends.
type Book interface {
	// List returns all groups in their order.
	List(ctx context.Context) ([]Kept, error)

	// Create adds a group and returns it; without a GUID it is given one. Invalid: the record or its rules, read as strictly as Form.Parse
	// does. Conflict: there is a group with this GUID or name.
	Create(ctx context.Context, r Record) (Kept, error)

	// Change changes a group and returns it as it is then. NotFound: there is none. Conflict: it follows Cloud Controller, and more than
	// its members would change; or another group has its new name.
	Change(ctx context.Context, guid string, c Change) (Kept, error)

	// Delete removes a group. NotFound: there is none. Conflict: it follows Cloud Controller.
	Delete(ctx context.Context, guid string) error
}

// Change is what becomes different of a group.
type Change struct {
	Name   *string // nil: stays
	Rules  *string // in the form of Cloud Controller; nil: stay
	Bind   Scope   // comes to whom it holds for
	Unbind Scope   // ceases, before anything comes
}

// Apply makes the change.
func (c Change) Apply(r *Record) {
	if c.Name != nil {
		r.Name = *c.Name
	}
	if c.Rules != nil {
		r.Rules = *c.Rules
	}
	r.StagingDefault = r.StagingDefault && !c.Unbind.StagingDefault || c.Bind.StagingDefault
	r.RunningDefault = r.RunningDefault && !c.Unbind.RunningDefault || c.Bind.RunningDefault
	r.StagingSpaces = altered(r.StagingSpaces, c.Unbind.StagingSpaces, c.Bind.StagingSpaces)
	r.RunningSpaces = altered(r.RunningSpaces, c.Unbind.RunningSpaces, c.Bind.RunningSpaces)
	r.Members = altered(r.Members, c.Unbind.Members, c.Bind.Members)
}

// altered returns a sorted list without some elements and with others, each once; nil when there are none.
func altered[T ~string](list, without, with []T) []T {
	var out []T
	for _, e := range list {
		if !slices.Contains(without, e) {
			out = append(out, e)
		}
	}
	out = append(out, with...)
	slices.Sort(out)
	return slices.Compact(out)
}

// Scope is for whom a group holds.
type Scope struct {
	StagingDefault, RunningDefault bool
	StagingSpaces, RunningSpaces   []string
	Members                        []identity.Group
}

// IsZero reports whether the scope is nobody.
func (s Scope) IsZero() bool {
	return !s.StagingDefault && !s.RunningDefault && len(s.StagingSpaces)+len(s.RunningSpaces)+len(s.Members) == 0
}
