// Package policy is the noun of what may talk to what: source group, destination group, protocol, ports. What no policy
// allows is denied.
//
// It holds the types, their order and their proof of completeness, all pure. It is not a store (policy/policysql), not an
// API (policy/policyhttp), and no rules in a kernel (firewall).
//
// Use: a Book keeps policies; a Feed tells hosts which of them touch their groups; a Rule is a policy with the tags of its groups.
package policy

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// Protocol is what a policy speaks of: TCP or UDP, by its IANA number. The zero value is none.
type Protocol uint8

// The protocols of policies.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

// String returns "tcp" or "udp", or the number of anything else.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return strconv.Itoa(int(p))
}

// ParseProtocol reads "tcp" or "udp", in lower case as the deployed server demands. Anything else is fault.Invalid.
func ParseProtocol(s string) (Protocol, error) {
	switch s {
	case "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	}
	return 0, fault.Invalidf("protocol %.20q: expected tcp or udp", s)
}

// MarshalText returns String.
func (p Protocol) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is ParseProtocol.
func (p *Protocol) UnmarshalText(b []byte) error {
	v, err := ParseProtocol(string(b))
	if err == nil {
		*p = v
	}
	return err
}

// Ports is a range of ports, both ends included. The zero value is none.
type Ports struct{ First, Last uint16 }

// Single reports whether the range is one port.
func (p Ports) Single() bool { return p.First == p.Last }

// Contains reports whether a port lies in the range.
func (p Ports) Contains(port uint16) bool { return p.First <= port && port <= p.Last }

// String returns "8080" or "8000-8100".
func (p Ports) String() string {
	if p.Single() {
		return strconv.Itoa(int(p.First))
	}
	return strconv.Itoa(int(p.First)) + "-" + strconv.Itoa(int(p.Last))
}

// ParsePorts reads what String writes. Anything else, 0 and a range that runs backwards are fault.Invalid.
func ParsePorts(s string) (Ports, error) {
	a, b, isRange := strings.Cut(s, "-")
	first, err := strconv.ParseUint(a, 10, 16)
	last := first
	if err == nil && isRange {
		last, err = strconv.ParseUint(b, 10, 16)
	}
	if err != nil || first == 0 || last < first {
		return Ports{}, fault.Invalidf("ports %.40q: expected a port such as 8080 or a range such as 8000-8100, within 1-65535", s)
	}
	return Ports{uint16(first), uint16(last)}, nil
}

// Policy allows new connections of one protocol from any member of a group to a range of ports of any member of another, or of
// the same. It is comparable: two policies are the same when all of it is; ranges that overlap are different policies.
type Policy struct {
	Source, Destination identity.Group
	Protocol            Protocol
	Ports               Ports
}

// String returns "source -> destination tcp 8080".
func (p Policy) String() string {
	return string(p.Source) + " -> " + string(p.Destination) + " " + p.Protocol.String() + " " + p.Ports.String()
}

// Validate reports, as fault.Invalid, a policy that allows nothing or cannot be enforced.
func (p Policy) Validate() error {
	if err := p.Source.Validate(); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := p.Destination.Validate(); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if p.Protocol != TCP && p.Protocol != UDP {
		return fault.Invalidf("protocol %v: expected tcp or udp", p.Protocol)
	}
	if p.Ports.First == 0 || p.Ports.Last < p.Ports.First {
		return fault.Invalidf("ports %v: expected first <= last, within 1-65535", p.Ports)
	}
	return nil
}

// Compare orders policies by destination, source, protocol and ports.
func Compare(a, b Policy) int {
	// Step by step: most pairs that are compared differ in the first fields, and names are long.
	if a.Destination != b.Destination {
		return strings.Compare(string(a.Destination), string(b.Destination))
	}
	if a.Source != b.Source {
		return strings.Compare(string(a.Source), string(b.Source))
	}
	return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Ports.First, b.Ports.First), cmp.Compare(a.Ports.Last, b.Ports.Last))
}

// Filter selects policies as the deployed API does. A nil list is no condition; an empty one selects nothing.
type Filter struct {
	Either       []identity.Group // source or destination is one of them; wins over the others
	Sources      []identity.Group
	Destinations []identity.Group // with Sources: both
}

// Book is what keeps policies. Its implementations are policysql.Store (a database) and policyhttp.Client (a policy-server, as one
// of its users); policytest.Run is what both pass. All methods are safe for concurrent use and return when ctx ends.
type Book interface {
	// Create adds policies, all or none. Those that exist already are no error. Exhausted: there is no tag left for a new group,
	// or a source has more policies than its quota.
	Create(ctx context.Context, ps []Policy) error

	// Delete removes policies, all or none. Those that do not exist are no error.
	Delete(ctx context.Context, ps []Policy) error

	// List returns the policies that f selects, sorted by Compare.
	List(ctx context.Context, f Filter) ([]Policy, error)
}

// Ask is what a host's agent tells and asks a Feed.
type Ask struct {
	Host    string            // of the agent: the underlay address of its host, or another name that is its own; at most 255 bytes
	Groups  []identity.Group  // sorted, without duplicates: the policy groups of the containers there
	Since   revision.Revision // what the agent has for exactly these groups; zero: nothing
	InForce revision.Revision // what is in its kernel; zero: not known
}

// Feed tells agents what to enforce. Its implementations are policysql.Store and policyhttp.Client; policytest.RunFeed is what
// both pass.
type Feed interface {
	// Watch waits until rules that touch the ask's groups differ from those at Since, then returns what changed, or all of them when
	// Since is zero, of another epoch or too old. After a wait that the implementation bounds it returns an Update without
	// changes, whose revision may be newer than Since: what lies between does not touch these groups.
	Watch(ctx context.Context, a Ask) (Update, error)

	// Tag returns the tag of a group that internal clients name, such as identity.IngressRouter, and gives it one if it has none.
	// Conflict: the group has a tag of another kind. Exhausted: no tag is left.
	Tag(ctx context.Context, g identity.Group, kind string) (identity.Tag, error)
}
