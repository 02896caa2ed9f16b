package overlay

import (
	"fmt"
	"strings"
)

// explain returns the plan as the commands an operator would type, in order.
func (p *plan) explain() []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	p.guard.explain(say)
	p.link.explain(p.device, say)
	for _, a := range p.delAddrs {
		say("ip address del %v dev %s", a, p.device)
	}
	for _, a := range p.addAddrs {
		say("ip address add %v dev %s", a, p.device)
	}
	for _, r := range p.connected {
		say("ip route replace %v", r.on(p.device))
	}
	for _, e := range p.badEntries {
		say("bridge fdb del %v dev %s self", e.mac, p.device)
	}
	for _, e := range p.putEntries {
		say("bridge fdb replace %v dev %s", e, p.device)
	}
	for _, n := range p.putNeighs {
		say("ip neigh replace %v dev %s", n, p.device)
	}
	for _, r := range p.clash {
		say("ip route del %v", r.on(p.device))
	}
	for _, r := range p.putRoutes {
		say("ip route replace %v", r.on(p.device))
	}
	for _, r := range p.delRoutes {
		say("ip route del %v", r.on(p.device))
	}
	for _, n := range p.delNeighs {
		say("ip neigh del %v dev %s", n.addr, p.device)
	}
	for _, e := range p.delEntries {
		say("bridge fdb del %v dev %s", e, p.device)
	}
	for _, a := range p.delPeers {
		say("nft delete element inet %s %s { %v }", Table, guardSet, a)
	}
	return out
}

func (l linkPlan) explain(device string, say func(string, ...any)) {
	if l.remove {
		say("ip link del %s", device)
	}
	if l.create {
		x := l.want.vxlan
		say("ip link add %s address %v mtu %d txqueuelen 0 type vxlan id %d local %v dev if%d dstport %d nolearning gbp",
			device, l.want.mac, l.want.mtu, x.vni, x.local, x.lower, x.port)
	}
	if l.create || l.noIPv6 {
		say("sysctl -w net.ipv6.conf.%s.disable_ipv6=1", device)
	}
	if l.create || l.noARP {
		say("sysctl -w net.ipv4.neigh.%s.mcast_solicit=0", device)
	}
	for _, c := range []struct {
		is   bool
		text string
	}{
		{l.setMAC, "address " + l.want.mac.String()},
		{l.setMTU, fmt.Sprintf("mtu %d", l.want.mtu)},
		{l.setQueue, "txqueuelen 0"},
		{l.free, "nomaster"},
		{l.up, "up"},
	} {
		if c.is {
			say("ip link set %s %s", device, c.text)
		}
	}
}

func (g guardPlan) explain(say func(string, ...any)) {
	for _, c := range g.old {
		say("nft delete chain inet %s %s", Table, c)
	}
	if g.replaceSet {
		say("nft delete set inet %s %s", Table, guardSet)
	}
	if g.makeSet {
		say("nft add table inet %s", Table)
		say("nft add set inet %s %s { type ipv4_addr; }", Table, guardSet)
	}
	for _, a := range g.addPeers {
		say("nft add element inet %s %s { %v }", Table, guardSet, a)
	}
	if g.dropOwn {
		say("nft delete set inet %s %s", Table, ownSet)
	}
	if g.flushOwn {
		say("nft flush set inet %s %s", Table, ownSet)
	}
	if len(g.own) > 0 {
		if !g.flushOwn {
			say("nft add set inet %s %s { type ifname . ipv4_addr; }", Table, ownSet)
		}
		var keys []string
		for _, k := range g.own {
			keys = append(keys, k.String())
		}
		say("nft add element inet %s %s { %s }", Table, ownSet, strings.Join(keys, ", "))
	}
	for _, c := range g.chains {
		say("nft add chain inet %s %s { %s }", Table, c.name, c.hook)
		for _, r := range c.rules {
			say("nft add rule inet %s %s %s", Table, c.name, r)
		}
	}
}

var scopes = map[uint8]string{scopeGlobal: "global", scopeLink: "link", 254: "host"}

func scopeName(s uint8) string {
	if n, ok := scopes[s]; ok {
		return n
	}
	return fmt.Sprint(s)
}

// String returns the address as ip writes it.
func (a address) String() string { return fmt.Sprintf("%v scope %s", a.prefix, scopeName(a.scope)) }

// String returns the neighbour as ip writes it.
func (n neigh) String() string {
	state := "permanent"
	if !n.permanent {
		state = "reachable"
	}
	return fmt.Sprintf("%v lladdr %v nud %s", n.addr, n.mac, state)
}

// String returns the entry as bridge writes it.
func (e entry) String() string {
	s := fmt.Sprintf("%v dst %v self", e.mac, e.dst)
	if e.permanent {
		s += " permanent"
	}
	return s
}

// String returns the route as ip writes it, without the device.
func (r route) String() string { return r.on("") }

func (r route) on(device string) string {
	var s strings.Builder
	fmt.Fprint(&s, r.dst)
	if r.tos != 0 {
		fmt.Fprintf(&s, " tos 0x%02x", r.tos)
	}
	if r.via.IsValid() {
		fmt.Fprintf(&s, " via %v", r.via)
	}
	if device != "" {
		fmt.Fprintf(&s, " dev %s", device)
	}
	fmt.Fprintf(&s, " proto %d", r.proto)
	if r.scope != scopeGlobal {
		fmt.Fprintf(&s, " scope %s", scopeName(r.scope))
	}
	if r.src.IsValid() {
		fmt.Fprintf(&s, " src %v", r.src)
	}
	if r.metric != 0 {
		fmt.Fprintf(&s, " metric %d", r.metric)
	}
	return s.String()
}
