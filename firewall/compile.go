package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// Compile returns what a host with these endpoints has to enforce, and what of the input cannot be. It is pure; equal inputs give equal
// rulesets, whatever their order. Who compiles again and again what changes little does so by a Compiler.
func Compile(in Input) (Ruleset, []Problem) { return new(Compiler).Compile(in) }

// compiler is one compilation.
type compiler struct {
	in       Input
	max      identity.Tag
	out      Ruleset
	problems []Problem
}

func begin(in Input) *compiler {
	c := &compiler{in: in, max: cmp.Or(in.MaxTag, identity.MaxTag)}
	c.out = Ruleset{Network: in.Network.Masked(), VTEP: in.VTEP, Unrestricted: in.Unrestricted, Limit: in.Limit}
	if in.Router > c.max {
		c.refuse("overlay ingress", fault.Invalidf("tag %v is above the highest tag to use, %v", in.Router, c.max))
	} else {
		c.out.Router = in.Router
	}
	return c
}

func (c *compiler) refuse(what string, err error) {
	c.problems = append(c.problems, Problem{what, err})
}

func (e Endpoint) String() string { return fmt.Sprintf("endpoint %s %v", e.Device, e.Address) }

// maxDevice is the longest name of a device in bytes (linux/if.h: IFNAMSIZ less the final 0).
const maxDevice = 15

// devicePrefix is what the names of container devices begin with.
const devicePrefix = "s-"

// endpoints returns the good ones, sorted. Of two that claim one address neither is enforced: it is not known whose it is.
func (c *compiler) endpoints() []Endpoint {
	count := map[netip.Addr]int{}
	for _, e := range c.in.Endpoints {
		count[e.Address]++
	}
	var out []Endpoint
	for _, e := range c.in.Endpoints {
		if err := c.check(e); err != nil {
			c.refuse(e.String(), err)
		} else if count[e.Address] > 1 {
			c.refuse(e.String(), fault.Conflictf("%d endpoints have this address", count[e.Address]))
		} else {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Endpoint) int { return a.Address.Compare(b.Address) })
	return out
}

func (c *compiler) check(e Endpoint) error {
	switch {
	case !e.Address.Is4():
		return fault.Invalidf("address %v is not IPv4, which is all that is enforced so far", e.Address)
	case len(e.Device) > maxDevice || len(e.Device) <= len(devicePrefix) || !strings.HasPrefix(e.Device, devicePrefix) ||
		strings.ContainsFunc(e.Device, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/:"*\`, r) }):
		return fault.Invalidf("device %.40q: expected a name such as s-010255030002", e.Device)
	case e.Group != "":
		return e.Group.Validate()
	}
	return nil
}

// sources says who is here. A group that may be sent nothing is none: its members' group is 0.
func (c *compiler) sources(here []Endpoint, b *book) {
	for _, e := range here {
		tag := b.tags[e.Group].tag
		c.out.Sources = append(c.out.Sources, Source{Address: e.Address, Device: e.Device, Tag: tag})
		if len(b.allowed[e.Group]) == 0 {
			tag = 0
		}
		c.out.Destinations = append(c.out.Destinations, Destination{Address: e.Address, Group: tag})
		if c.out.Router == 0 {
			continue
		}
		for _, p := range e.Ingress {
			if p != 0 {
				c.out.Ingress = append(c.out.Ingress, Ingress{e.Address, p})
			}
		}
	}
	slices.SortFunc(c.out.Ingress, compareIngress)
	c.out.Ingress = slices.Compact(c.out.Ingress)
}

// groups says what each local group may be sent.
func (c *compiler) groups(b *book) {
	for g, list := range b.allowed {
		c.out.Groups = append(c.out.Groups, Group{b.tags[g].tag, list})
	}
	slices.SortFunc(c.out.Groups, func(a, b Group) int { return cmp.Compare(a.Tag, b.Tag) })
}

// merge sorts allowances and joins those of one source and protocol that share ports.
func merge(list []Allow) []Allow {
	if !slices.IsSortedFunc(list, CompareAllow) {
		slices.SortFunc(list, CompareAllow)
	}
	out := list[:0]
	for _, a := range list {
		if n := len(out) - 1; n >= 0 && out[n].Source == a.Source && out[n].Protocol == a.Protocol && a.Ports.First <= out[n].Ports.Last {
			out[n].Ports.Last = max(out[n].Ports.Last, a.Ports.Last)
			continue
		}
		out = append(out, a)
	}
	return slices.Clip(out)
}

func (c *compiler) services() {
	add := func(s Service) {
		if !s.Address.Is4() || s.Port == 0 || s.Protocol != policy.TCP && s.Protocol != policy.UDP {
			c.refuse(fmt.Sprintf("host service %v %v:%d", s.Protocol, s.Address, s.Port), fault.Invalidf("expected tcp or udp, an IPv4 address and a port"))
			return
		}
		c.out.Services = append(c.out.Services, s)
	}
	for _, s := range c.in.Services {
		add(s)
	}
	for _, a := range c.in.DNS {
		if a.Is4() && a.IsLinkLocalUnicast() {
			add(Service{policy.TCP, a, 53})
			add(Service{policy.UDP, a, 53})
		}
	}
	slices.SortFunc(c.out.Services, CompareService)
	c.out.Services = slices.Compact(c.out.Services)
}
