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
//     pass for any other. (fib in a table of family inet: Linux 4.10.)
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
const (
	guardPrefix     = "overlay-" // of all that is ours in the table
	guardSet        = "overlay-peers"
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
	device, network, local, underlay := c.Device, c.Network, c.Local.Subnet, netip.PrefixFrom(c.Underlay, 32)
	pre := ruleChain{name: chainPrerouting, hook: "prerouting", priority: priorityRaw, rules: []rule{
		// iifname "silk-vtep" ip saddr 10.255.0.0/16 ip saddr != 10.255.30.0/24 meta mark set meta mark & 0x0000ffff accept
		newRule(iifname(device), saddr("", network), saddr("!= ", local), keepMark(TagMask), accept()),
		// iifname "silk-vtep" counter drop
		newRule(iifname(device), counter(), drop()),
		// iifname "s-*" udp dport 4789 counter drop
		newRule(iifname(containerDevices+"*"), dport(c.Port), counter(), drop()),
	}}
	pre.rules = append(pre.rules,
		// iifname "s-*" fib saddr . iif oif missing counter drop
		newRule(iifname(containerDevices+"*"), sourceElsewhere(), counter(), drop()),
		// iifname "s-*" accept
		newRule(iifname(containerDevices+"*"), accept()),
		// iifname != "lo" ip saddr 10.255.0.0/16 counter drop
		newRule(iifnameNot("lo"), saddr("", network), counter(), drop()))
	if lower != "" {
		// iifname "eth0" ip daddr 10.0.16.15 udp dport 4789 notrack
		pre.rules = append(pre.rules, newRule(iifname(lower), daddr(underlay), dport(c.Port), notrack()))
	}
	out := ruleChain{name: chainOutput, hook: "output", priority: priorityRaw, rules: []rule{
		// ip saddr 10.0.16.15 udp dport 4789 meta mark set meta mark & 0xffff0000 notrack
		newRule(saddr("", underlay), dport(c.Port), keepMark(^uint32(TagMask)), notrack()),
	}}
	in := ruleChain{name: chainInput, hook: "input", priority: priorityFilter, rules: []rule{
		// udp dport 4789 ip saddr != @overlay-peers counter drop
		newRule(dport(c.Port), saddrNotIn(guardSet), counter(), drop()),
		// udp dport 4789 meta mark set meta mark & 0xffff0000
		newRule(dport(c.Port), keepMark(^uint32(TagMask))),
	}}
	return []ruleChain{pre, out, in}
}
