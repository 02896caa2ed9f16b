package overlay

import (
	"fmt"
	"net/netip"
)

// The guard, in words. Everything is in table "inet silk", beside the chains of others.
//
//   - What leaves the VTEP must have a source inside the overlay and outside this host's own subnet: another host has no
//     business with other sources, and the outer sender of a packet is not known any more after decapsulation.
//   - Whatever a container sends to the VXLAN port is dropped, wherever it goes: to this host it would be taken for a
//     peer's, and to another host it would arrive from this host's address, a known peer's, with any tag it likes.
//     Containers that talk to each other have 65534 other ports.
//   - What a container sends must have a source that is routed back to it. Its device's rp_filter says so too, but the kernel takes
//     the larger of that and conf.all.rp_filter, and several distributions set the latter to 2, which lets a container
//     pass for any other. (fib in a table of family inet: Linux 4.10.) The address that goes with the name of its device is known
//     from a set, for that takes a third of the time; what is not in it is asked of the routing table.
//   - The VXLAN port hears only the underlay addresses of known peers.
//   - A source in the overlay comes out of the VTEP or from a container. A packet with one that comes in by any other device is
//     dropped, or whoever may not send VXLAN could do without it: the host forwards, and a reply would find its way.
//   - Outer packets are not tracked: they would take a conntrack entry each for nothing. Only those that come in by the
//     lower device for the VTEP's own address, and those that this host sends from it; anything else to that port is
//     traffic like any other and must not escape the rules of others by being untracked.
//   - The encapsulated packet still bears the mark whose low 16 bits went out as the tag. They are cleared, so that
//     nobody's rules on the underlay take them for their own.
//   - The mark of a packet that arrives is its tag and nothing else. The kernel also puts two flags of the VXLAN header in
//     it (0x80000 and 0x400000, drivers/net/vxlan: VXLAN_GBP_POLICY_APPLIED and _DONT_LEARN), which the sender is free to
//     set and others on this host may give a meaning; and to a packet without a tag it leaves the mark that
//     rules on this host gave to the outer packet. Neither gets through.
//
// Every packet of the host passes these chains, so what is common comes first, names of devices are compared seldom (they take longest), and
// a mark is written only if that changes it: a rule for those that need nothing stands before the one that writes.
const (
	guardPrefix     = "overlay-" // of all that is ours in the table
	guardSet        = "overlay-peers"
	ownSet          = "overlay-own"
	chainPrerouting = "overlay-prerouting"
	chainOutput     = "overlay-output"
	chainInput      = "overlay-input"

	// TagMask is the part of a packet's mark that VXLAN carries as the tag of a policy group.
	TagMask = 0x0000ffff

	containerDevices = "s-" // what the names of container devices begin with
)

const (
	priorityRaw    = -300
	priorityFilter = 0
)

// guardChains returns the guard as it should be. lower is the name of the lower device, "" when it is not there.
func guardChains(c Config, lower string) []chain {
	var out []chain
	for _, c := range guardRules(c, lower) {
		x := chain{name: c.name, hook: hookText("filter", c.hook, c.priority, "accept")}
		for _, r := range c.rules {
			x.rules = append(x.rules, r.text)
		}
		out = append(out, x)
	}
	return out
}

// hookText is the declaration of a base chain.
func hookText(typ, hook string, priority int32, policy string) string {
	return fmt.Sprintf("type %s hook %s priority %d; policy %s;", typ, hook, priority, policy)
}

// guardRules returns the chains with their rules. Above each rule stands its text; the text is also what plans and
// comparisons speak of.
func guardRules(c Config, lower string) []ruleChain {
	device, network, underlay := c.Device, c.Network, netip.PrefixFrom(c.Underlay, 32)
	fromContainer := iifname(containerDevices + "*")
	foreign := newRule(iifname(device), saddrBetween(network, c.Local.Subnet))
	pre := ruleChain{name: chainPrerouting, hook: "prerouting", priority: priorityRaw}
	if len(pairs(c.Local.Subnet)) > 0 {
		// iifname "s-*" iifname . ip saddr @overlay-own th dport != 4789 accept
		pre.rules = append(pre.rules, newRule(ownSource(), thDportNot(c.Port), accept()))
	}
	if lower != "" {
		// udp dport 4789 iifname "eth0" ip daddr 10.0.16.15 notrack accept
		pre.rules = append(pre.rules, newRule(dport(c.Port), iifname(lower), daddr(underlay), notrack(), accept()))
	}
	pre.rules = append(pre.rules,
		// iifname "silk-vtep" ip saddr 10.255.0.0/16 ip saddr != 10.255.30.0/24 meta mark & 0xffff0000 == 0x00000000 accept
		newRule(foreign, markLacks(^uint32(TagMask)), accept()),
		// iifname "silk-vtep" ip saddr 10.255.0.0/16 ip saddr != 10.255.30.0/24 meta mark set meta mark & 0x0000ffff accept
		newRule(foreign, keepMark(TagMask), accept()),
		// iifname "silk-vtep" counter drop
		newRule(iifname(device), counter(), drop()),
		// udp dport 4789 iifname "s-*" counter drop
		newRule(dport(c.Port), fromContainer, counter(), drop()),
		// iifname "s-*" fib saddr . iif oif exists accept
		newRule(fromContainer, sourceRouted(), accept()),
		// iifname "s-*" counter drop
		newRule(fromContainer, counter(), drop()),
		// ip saddr 10.255.0.0/16 iifname != "lo" counter drop
		newRule(saddr("", network), iifnameNot("lo"), counter(), drop()))
	out := ruleChain{name: chainOutput, hook: "output", priority: priorityRaw, rules: []rule{
		// udp dport 4789 ip saddr 10.0.16.15 meta mark set meta mark & 0xffff0000 notrack
		newRule(dport(c.Port), saddr("", underlay), keepMark(^uint32(TagMask)), notrack()),
	}}
	known := newRule(dport(c.Port), saddrIn(guardSet))
	in := ruleChain{name: chainInput, hook: "input", priority: priorityFilter, rules: []rule{
		// udp dport 4789 ip saddr @overlay-peers meta mark & 0x0000ffff == 0x00000000 accept
		newRule(known, markLacks(TagMask), accept()),
		// udp dport 4789 ip saddr @overlay-peers meta mark set meta mark & 0xffff0000 accept
		newRule(known, keepMark(^uint32(TagMask)), accept()),
		// udp dport 4789 counter drop
		newRule(dport(c.Port), counter(), drop()),
	}}
	return []ruleChain{pre, out, in}
}
