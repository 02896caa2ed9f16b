package secgroup

import (
	"context"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// Kept is a record with what its store says of it.
type Kept struct {
	Record
	CloudController bool // it follows Cloud Controller, and but for its members it can be changed only there
}

// Ask is what a host's agent asks a Feed: which groups there are for all containers, for those of some spaces, and for those of some policy groups.
type Ask struct {
	Host    string           // the agent's, as in policy.Ask
	Spaces  []string         // sorted, without duplicates
	Members []identity.Group // sorted, without duplicates

	Since revision.Revision // of the last answer; zero: there is none
	Sum   Digest            // of what the agent has for exactly these spaces and members; it says the rest
}

// Update is one answer of Feed.Watch: all groups that the ask is about, in their order, or, if it is not Full, that they are what the asker
// has. Count and Sum seal it.
type Update struct {
	Revision revision.Revision
	Full     bool
	Groups   []Record
	Count    int
	Sum      Digest
}

// Apply returns the groups that hold after u, given those held before it. An update that does not add up to its own seal is fault.Invalid: ask
// again from the zero revision, and change nothing.
func (u Update) Apply(held []Record) ([]Record, error) {
	if u.Full {
		held = u.Groups
	}
	if sum := Sum(held); len(held) != u.Count || sum != u.Sum {
		return nil, fault.Invalidf("security groups of revision %v are not complete: %d with digest %v, expected %d with %v", u.Revision, len(held), sum, u.Count, u.Sum)
	}
	return held, nil
}

// Feed tells agents which security groups there are. Its implementations are policysql.SecurityGroups and policyhttp.SecurityGroups;
// policytest.RunSecurityGroups is what both pass.
type Feed interface {
	// Watch waits until the groups that the ask is about differ from those whose Sum the asker has, or Since is zero or of another epoch,
	// then returns all of them. After a wait that the implementation bounds it returns an Update that is not Full, whose revision may be
	// newer than Since.
	Watch(ctx context.Context, a Ask) (Update, error)
}
