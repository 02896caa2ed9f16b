// Package firewalltest is what every engine that enforces a firewall.Ruleset must pass: random endpoints, policies and packets,
// about each of which the engine and a deliberately simple interpreter agree.
//
// It has no rules of its own and knows no engine. It works on the real kernel in namespaces that it makes.
//
// Use: Run in the tests of an engine; NewWorld for tests of other things that need hosts with containers.
package firewalltest

import (
	"net/netip"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// Packet is a packet that a container sends: from which of its host's devices, and what it says.
type Packet struct {
	Device      string
	Source      netip.Addr
	Destination netip.Addr
	Protocol    policy.Protocol // or any other number
	SourcePort  uint16
	Port        uint16
}

// Reference judges packets by looking at everything every time: policies by name, endpoints one by one. It knows connections by
// what was allowed before.
type Reference struct {
	Hosts []firewall.Input // what each host's engine was given
	open  map[Packet]bool  // what was let through, without devices
}

// Allows reports whether a packet from a container on one host arrives, and remembers the connection if so.
func (r *Reference) Allows(host int, p Packet) bool {
	from, ok := find(r.Hosts[host], p.Source)
	if !ok || from.Device != p.Device {
		return false // not its own address, or no rules yet
	}
	answer := Packet{Source: p.Destination, Destination: p.Source, Protocol: p.Protocol, SourcePort: p.Port, Port: p.SourcePort}
	if r.open[answer] {
		return true
	}
	allowed := false
	for _, h := range r.Hosts {
		if to, ok := find(h, p.Destination); ok {
			allowed = allows(h, from.Group, to.Group, p)
		}
	}
	if allowed {
		if r.open == nil {
			r.open = map[Packet]bool{}
		}
		p.Device = ""
		r.open[p] = true
	}
	return allowed
}

// Forget ends all connections.
func (r *Reference) Forget() { clear(r.open) }

func find(in firewall.Input, a netip.Addr) (firewall.Endpoint, bool) {
	for _, e := range in.Endpoints {
		if e.Address == a {
			return e, true
		}
	}
	return firewall.Endpoint{}, false
}

func allows(in firewall.Input, from, to identity.Group, p Packet) bool {
	if in.Unrestricted {
		return true
	}
	for _, r := range in.Rules {
		if r.Source == from && r.Destination == to && r.Protocol == p.Protocol && r.Ports.First <= p.Port && p.Port <= r.Ports.Last {
			return true
		}
	}
	return false
}
