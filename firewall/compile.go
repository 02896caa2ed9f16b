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
// rulesets, whatever their order.
func Compile(in Input) (Ruleset, []Problem) {
	c := compiler{in: in, max: cmp.Or(in.MaxTag, identity.MaxTag), tags: map[identity.Group]identity.Tag{}, owners: map[identity.Tag]identity.Group{}}
	c.out = Ruleset{Network: in.Network.Masked(), VTEP: in.VTEP, Unrestricted: in.Unrestricted}
	if in.Router > c.max {
		c.refuse("overlay ingress", fault.Invalidf("tag %v is above the highest tag to use, %v", in.Router, c.max))
	} else {
		c.out.Router = in.Router
	}
	here := c.endpoints()
	rules := c.usable(here)
	c.sources(here)
	c.groups(rules)
	c.services()
	return c.out, c.problems
}

type compiler struct {
	in       Input
	max      identity.Tag
	tags     map[identity.Group]identity.Tag // of groups that rules speak of
	owners   map[identity.Tag]identity.Group
	out      Ruleset
	problems []Problem
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

// usable returns the rules that touch a group here and can be enforced. What a rule says of its groups' tags holds for all of
// them: a group that has two tags, or a tag that two groups have, is a problem, and such rules are left out.
func (c *compiler) usable(here []Endpoint) []policy.Rule {
	local := map[identity.Group]bool{}
	for _, e := range here {
		local[e.Group] = true
	}
	delete(local, "")
	rules := slices.DeleteFunc(slices.Clone(c.in.Rules), func(r policy.Rule) bool { return !local[r.Source] && !local[r.Destination] })
	slices.SortFunc(rules, func(a, b policy.Rule) int {
		return cmp.Or(policy.Compare(a.Policy, b.Policy), cmp.Compare(a.SourceTag, b.SourceTag), cmp.Compare(a.DestinationTag, b.DestinationTag))
	})
	rules = slices.Compact(rules)
	rules = slices.DeleteFunc(rules, func(r policy.Rule) bool {
		err := c.checkRule(r)
		if err != nil {
			c.refuse(r.String(), err)
		}
		return err != nil
	})
	doubtful := c.nameTags(rules)
	return slices.DeleteFunc(rules, func(r policy.Rule) bool {
		why := cmp.Or(doubtful[r.Source], doubtful[r.Destination])
		if why != "" {
			c.refuse(r.String(), fault.Conflictf("%s", why))
		}
		return why != ""
	})
}

func (c *compiler) checkRule(r policy.Rule) error {
	if err := r.Validate(); err != nil {
		return err
	}
	for _, t := range []identity.Tag{r.SourceTag, r.DestinationTag} {
		if t == 0 || t > c.max {
			return fault.Invalidf("tag %v: expected 0001 to %v", t, c.max)
		}
	}
	return nil
}

// nameTags learns the tags of groups and returns why some groups are in doubt.
func (c *compiler) nameTags(rules []policy.Rule) map[identity.Group]string {
	doubtful := map[identity.Group]string{}
	learn := func(g identity.Group, t identity.Tag) {
		if had, ok := c.tags[g]; ok && had != t {
			doubtful[g] = fmt.Sprintf("group %.40q has two tags, %v and %v", string(g), had, t)
		}
		c.tags[g] = t
		if o, ok := c.owners[t]; ok && o != g {
			why := fmt.Sprintf("tag %v belongs to two groups, %.40q and %.40q", t, string(o), string(g))
			doubtful[o], doubtful[g] = why, why
		} else if t == c.out.Router {
			doubtful[g] = fmt.Sprintf("tag %v is that of overlay ingress", t)
		}
		c.owners[t] = g
	}
	for _, r := range rules {
		learn(r.Source, r.SourceTag)
		learn(r.Destination, r.DestinationTag)
	}
	for g := range doubtful {
		delete(c.tags, g)
	}
	return doubtful
}

func (c *compiler) sources(here []Endpoint) {
	for _, e := range here {
		tag := c.tags[e.Group]
		c.out.Sources = append(c.out.Sources, Source{Address: e.Address, Device: e.Device, Tag: tag})
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

// groups collects what each local group may be sent. A group that may be sent nothing is none: its members' group is 0.
func (c *compiler) groups(rules []policy.Rule) {
	local := map[identity.Tag]bool{}
	for _, d := range c.out.Destinations {
		local[d.Group] = true
	}
	allowed := map[identity.Tag][]Allow{}
	for _, r := range rules {
		if local[r.DestinationTag] {
			allowed[r.DestinationTag] = append(allowed[r.DestinationTag], Allow{r.SourceTag, r.Protocol, r.Ports})
		}
	}
	for tag, list := range allowed {
		c.out.Groups = append(c.out.Groups, Group{tag, merge(list)})
	}
	slices.SortFunc(c.out.Groups, func(a, b Group) int { return cmp.Compare(a.Tag, b.Tag) })
	for i, d := range c.out.Destinations {
		if allowed[d.Group] == nil {
			c.out.Destinations[i].Group = 0
		}
	}
}

// merge sorts allowances and joins those of one source and protocol that share ports.
func merge(list []Allow) []Allow {
	slices.SortFunc(list, CompareAllow)
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
