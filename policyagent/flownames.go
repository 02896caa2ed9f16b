package policyagent

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// partyKept is how long an address that no container has any more goes on with the last one's name: what it did may be read a little later.
const partyKept = 10 * time.Second

// knownNames is what the flow log's book was made of.
type knownNames struct {
	version uint64
	rules   int // policies, of which groups were made
	groups  map[identity.Tag]identity.Group
	parties map[netip.Addr]*flow.Party
	left    map[netip.Addr]time.Time // since when an address has none
	ruleset *firewall.Ruleset
	whose   []container
}

// know tells the flow log of names, if they are others than before. What is given must not change afterwards.
func (f *flowLog) know(h hosted, rules []policy.Rule, version uint64, rs firewall.Ruleset, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := &f.known
	if !f.wanted {
		*k = knownNames{}
		return
	}
	names := k.ruleset == nil || k.version != version || k.rules != len(rules)
	same := slices.EqualFunc(k.whose, h.containers, container.same) && len(k.left) == 0
	if !names && same {
		return
	}
	if names {
		k.groups = make(map[identity.Tag]identity.Group)
		for _, r := range rules {
			k.groups[r.SourceTag], k.groups[r.DestinationTag] = r.Source, r.Destination
		}
		if rs.Router != 0 {
			k.groups[rs.Router] = identity.IngressRouter
		}
	}
	if !same {
		k.moved(h.containers, now)
	}
	k.version, k.rules, k.ruleset, k.whose = version, len(rules), &rs, h.containers
	f.join.Know(&flow.Book{Parties: maps.Clone(k.parties), Groups: k.groups, Allowed: rs.Allowance, Explain: func(l flow.Logged) string { return explain(&rs, l) }})
}

// explain words why a packet between containers passed if it was not for a policy.
func explain(rs *firewall.Ruleset, l flow.Logged) string {
	if l.Verdict != flow.Accepted || l.Scope != flow.C2C {
		return ""
	}
	tag, to := identity.Tag(l.Mark), l.Packet.Destination
	_, allowed := rs.Allowance(tag, to.Addr(), policy.Protocol(l.Packet.Protocol), to.Port())
	switch {
	case allowed:
	case rs.Unrestricted:
		return "disable_container_network_policy: everything between containers is allowed"
	case rs.Allows(tag, to.Addr(), policy.Protocol(l.Packet.Protocol), to.Port()):
		return "overlay ingress"
	}
	return ""
}

// moved notes who is here. A container that stays keeps its Party.
func (k *knownNames) moved(containers []container, now time.Time) {
	was := k.parties
	k.parties = map[netip.Addr]*flow.Party{}
	for _, c := range containers {
		p := c.party()
		for _, e := range c.endpoints {
			if old := was[e.Address]; old != nil && *old == *p {
				p = old
			}
			k.parties[e.Address] = p
		}
	}
	left := map[netip.Addr]time.Time{}
	for a, p := range was {
		since, ok := k.left[a]
		if !ok {
			since = now
		}
		if k.parties[a] == nil && now.Sub(since) < partyKept {
			k.parties[a], left[a] = p, since
		}
	}
	k.left = left
}

// party returns as whom the flow log knows a container.
func (c container) party() *flow.Party {
	var m struct {
		App   any `json:"app_id"`
		Space any `json:"space_id"`
		Org   any `json:"org_id"`
	}
	if len(c.metadata) > 0 {
		_ = json.Unmarshal(c.metadata, &m) // what cannot be read is not known: the enforcement says so where it matters
	}
	text := func(v any) string { s, _ := v.(string); return s }
	return &flow.Party{Container: c.key.Container, Group: string(c.group()), App: text(m.App), Space: text(m.Space), Org: text(m.Org)}
}
