// Package firewall is what a host enforces of its containers: who its endpoints are, as which group each of them sends, what each group may be
// sent, and what each endpoint may reach outside the overlay. Compile makes that of policies, lists of rules (NewList) and endpoints; Allows and
// AllowsOut judge one flow by it.
//
// Everything here is a plain value and no kernel is spoken to (firewall/nft does that). Port maps and limits of bandwidth are not part of it.
//
// Use: Compile an Input, give the Ruleset to nft.Table.Set.
package firewall

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"unsafe"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// Endpoint is one address of one container on this host. A container with two addresses is two endpoints of one device.
type Endpoint struct {
	Device  string         // the host's end of the container's device: "s-010255030002"
	Address netip.Addr     // the container's own
	Group   identity.Group // "": the container is in none, so nothing is allowed to it
	Ingress []uint16       // tcp ports open to overlay ingress, if the input has a Router
	Egress  *Egress        // what it may reach outside the overlay; nil: everything
}

// Service is a port of the host that containers may reach.
type Service struct {
	Protocol policy.Protocol
	Address  netip.Addr
	Port     uint16
}

// Input is what Compile works on. Order means nothing and duplicates are harmless, but for endpoints.
type Input struct {
	Network      netip.Prefix // the overlay
	VTEP         string       // the device that leads to other hosts
	Endpoints    []Endpoint
	Rules        []policy.Rule // those that do not touch a group here are passed over
	Router       identity.Tag  // of overlay ingress; 0: there is none
	MaxTag       identity.Tag  // highest tag to use; 0: identity.MaxTag
	Services     []Service     // host_tcp_services and host_udp_services
	DNS          []netip.Addr  // link-local ones are reachable on port 53, tcp and udp; others are no services of the host
	Limit        Limit         // of connections to the outside of the overlay
	Unrestricted bool          // disable_container_network_policy: everything is allowed between addresses of the overlay that are endpoints'
}

// Ruleset is what a host enforces, in a form that == of its parts and slices.Equal can compare: all lists are sorted, without duplicates,
// and no allowance covers another of the same source and protocol.
type Ruleset struct {
	Network      netip.Prefix
	VTEP         string
	Unrestricted bool
	Router       identity.Tag
	Sources      []Source
	Destinations []Destination
	Groups       []Group
	Ingress      []Ingress
	Services     []Service
	Limit        Limit
	Outside      []Outside // one for each source
	Reaches      []Reach   // that they name
	Log          Log       // Compile leaves it out: it is a switch, and no matter of who may talk to whom
}

// Log says which new connections the flow log is told of. The zero value is none.
type Log struct {
	C2C    bool // between containers, and what containers are refused besides: accepted and denied
	Egress bool // from containers to the outside of the overlay, whether or not a security group's rule asks for it
	Denied int  // lines a second about denied packets, for each container; 0: 1
	UDP    int  // lines a second about accepted connections of udp, for each container; 0: 100
}

// Source is an address that a device may send from, and the tag that its packets bear inside the overlay: 0 if its group has none.
type Source struct {
	Address netip.Addr
	Device  string
	Tag     identity.Tag
}

// Destination is an address behind one of this host's devices. What it may be sent is that of its group.
type Destination struct {
	Address netip.Addr
	Group   identity.Tag // names a Group of the ruleset; 0: it may be sent nothing
}

// Group is what may be sent to the local members of the group with this tag.
type Group struct {
	Tag     identity.Tag
	Allowed []Allow
}

// Allow lets one source group open connections to a range of ports.
type Allow struct {
	Source   identity.Tag
	Protocol policy.Protocol
	Ports    policy.Ports
}

// Ingress is a tcp port that overlay ingress (Router) may reach.
type Ingress struct {
	Address netip.Addr
	Port    uint16
}

// Problem is an endpoint, rule or service that cannot be enforced and was left out. Everything else is in the ruleset. Leaving out
// never opens anything.
type Problem struct {
	What string // names it: "endpoint s-010255030002 10.255.30.2", or a policy
	Err  error
}

// String returns "what: why".
func (p Problem) String() string { return p.What + ": " + p.Err.Error() }

// Allows reports whether a new connection from a group to an address of this host is allowed by the ruleset. Tag 0 is no group.
func (r *Ruleset) Allows(source identity.Tag, to netip.Addr, proto policy.Protocol, port uint16) bool {
	i, ok := slices.BinarySearchFunc(r.Destinations, to, func(d Destination, a netip.Addr) int { return d.Address.Compare(a) })
	if !ok || source == 0 || r.Unrestricted {
		return ok && r.Unrestricted
	}
	if source == r.Router && proto == policy.TCP {
		if _, ok := slices.BinarySearchFunc(r.Ingress, Ingress{to, port}, compareIngress); ok {
			return true
		}
	}
	_, ok = r.allowance(r.Destinations[i].Group, source, proto, port)
	return ok
}

// Allowance returns the ports of the allowance by which a group may send to an address of this host; false if it has none.
func (r *Ruleset) Allowance(source identity.Tag, to netip.Addr, proto policy.Protocol, port uint16) (policy.Ports, bool) {
	i, ok := slices.BinarySearchFunc(r.Destinations, to, func(d Destination, a netip.Addr) int { return d.Address.Compare(a) })
	if !ok {
		return policy.Ports{}, false
	}
	return r.allowance(r.Destinations[i].Group, source, proto, port)
}

func (r *Ruleset) allowance(to, source identity.Tag, proto policy.Protocol, port uint16) (policy.Ports, bool) {
	g := r.Group(to)
	if g == nil {
		return policy.Ports{}, false
	}
	// The last allowance that begins at or before the port: no other of the same source and protocol reaches beyond it.
	key := Allow{source, proto, policy.Ports{First: port, Last: 65535}}
	j, ok := slices.BinarySearchFunc(g.Allowed, key, CompareAllow)
	if !ok {
		j--
	}
	if j < 0 || g.Allowed[j].Source != source || g.Allowed[j].Protocol != proto || !g.Allowed[j].Ports.Contains(port) {
		return policy.Ports{}, false
	}
	return g.Allowed[j].Ports, true
}

// Group returns the group with a tag, nil if the ruleset has none.
func (r *Ruleset) Group(tag identity.Tag) *Group {
	i, ok := slices.BinarySearchFunc(r.Groups, tag, func(g Group, t identity.Tag) int { return cmp.Compare(g.Tag, t) })
	if !ok {
		return nil
	}
	return &r.Groups[i]
}

// CompareAllow orders allowances by source, protocol and ports.
func CompareAllow(a, b Allow) int {
	return cmp.Or(cmp.Compare(a.Source, b.Source), cmp.Compare(a.Protocol, b.Protocol),
		cmp.Compare(a.Ports.First, b.Ports.First), cmp.Compare(a.Ports.Last, b.Ports.Last))
}

// Missing yields those of a sorted list of allowances that another one lacks. Lists that share their memory, as those of a Compiler do that did
// not change, cost nothing.
func Missing(from, in []Allow) iter.Seq[Allow] {
	return func(yield func(Allow) bool) {
		if SameAllowed(from, in) {
			return
		}
		for _, a := range from {
			for len(in) > 0 && CompareAllow(in[0], a) < 0 {
				in = in[1:]
			}
			if (len(in) == 0 || in[0] != a) && !yield(a) {
				return
			}
		}
	}
}

// SameAllowed reports whether two lists are one in memory. Lists with the same content may still be two.
func SameAllowed(a, b []Allow) bool {
	return len(a) == len(b) && unsafe.SliceData(a) == unsafe.SliceData(b)
}

// CompareSource orders sources by address and device.
func CompareSource(a, b Source) int {
	return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Device, b.Device))
}

// CompareDestination orders destinations by address.
func CompareDestination(a, b Destination) int { return a.Address.Compare(b.Address) }

// CompareService orders services by protocol, address and port.
func CompareService(a, b Service) int {
	return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port))
}

func compareIngress(a, b Ingress) int {
	return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port))
}

// CompareIngress orders open ports by address and port.
func CompareIngress(a, b Ingress) int { return compareIngress(a, b) }

// Policies returns how many allowances the ruleset has, of all groups together.
func (r *Ruleset) Policies() int {
	n := 0
	for _, g := range r.Groups {
		n += len(g.Allowed)
	}
	return n
}
