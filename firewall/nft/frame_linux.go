package nft

import (
	"math/bits"
	"net/netip"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/identity"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The table, in words. A packet is judged once, where it would enter a container's device; its tag says who sent it.
//
//	forward      from the overlay (from-overlay): established, or to a container and judged by its destination
//	             from a container: is the source its own? Then, by its tag, from-TAG:
//	               to a container here: established, or the tag is put on it and it is judged at once
//	               to another host (from-TAG-away): the tag is put on it (to-overlay)
//	               to anything else: to-outside, see egress_linux.go
//	             all else by others: to a container only what answers, and what a port map of the host led there. That is known by the
//	             connection and by where its packets come in, not by a mark
//	destinations the address finds to-TAG of its group; there (tag, protocol, port) is looked up, in the first place for streams that
//	             are known, if without answers. Without policy it finds to-any
//	streams      the same for what a container sends in a connection that bears its own tag: known-TAG looks into the same set with the tag
//	             from there, so that the packet need not be given one. What is not found there goes on as if it had not been asked
//	allow        the connection keeps the tag of who began it
//	input        what containers may reach of the host itself
//	errors       what containers say of packets that did not arrive: only of their own connections
//
// What is established goes first everywhere, but for the check of a container's source address: only so a container cannot
// slip into a connection of another. What is asked of every packet stands in few chains, since another chain is other memory.
// What a helper of conntrack expects (the data of FTP, say) is related, but it is judged like anything else: no policy speaks of it.
//
// A source that is not in the map is dropped, not rejected: a container that has just started tries again until its
// rules are there, and does not fail. All else that is refused is told so.
const (
	chainForward  = "forward"
	chainInput    = "input"
	chainPeers    = "from-overlay"
	chainOthers   = "others"
	chainOverlay  = "to-overlay"
	chainUntagged = "to-overlay-untagged"
	chainOutside  = "to-outside"
	chainAny      = "to-any"
	chainUnknown  = "unmatched"
	chainAllow    = "allow"
	chainErrors   = "errors"
	chainHost     = "to-host"
	chainPeer     = "from-overlay-to-host"
	chainRefuse   = "refuse"

	setSources      = "sources"      // (device, address) -> from-TAG
	setOwn          = "own"          // (device, address)
	setDestinations = "destinations" // address -> to-TAG
	setStreams      = "streams"      // address -> known-TAG
	setServices     = "services"     // (address, protocol, port) of the host
	setIngress      = "ingress"      // (address, port) for overlay ingress
	setEnded        = "ended"        // (address, port, address, port, protocol): what Cut ended, from the side that answered
)

const (
	tagMask    = 0x0000ffff // what VXLAN carries of a mark
	containers = "s-*"      // container devices
	vxlanPort  = 4789

	// Answers to refused packets, in packets a second for the host. What is above is dropped silently.
	answerRate, answerBurst = 100, 100
)

// frame says what the chains that every ruleset has depend on. It is comparable.
type frame struct {
	network      netip.Prefix
	vtep         string
	unrestricted bool
	router       identity.Tag
	connMask     uint32
	ended        bool // the set of what Cut ended is not empty
	limit        firewall.Limit
	log          logs
}

// streams reports whether streams without answers are known by the marks of their connections: only where the tag is in the same bits as in a packet's.
func (f frame) streams() bool { return f.connMask == tagMask && !f.unrestricted }

// hook is the declaration of a base chain of type filter, priority filter, policy accept: the table refuses by rules, since most of what
// passes the hooks is none of ours.
type hook uint32

const (
	noHook  hook = 0
	input   hook = 1 + unix.NF_INET_LOCAL_IN
	forward hook = 1 + unix.NF_INET_FORWARD
)

// String returns the declaration as nft(8) has it, "" for a chain that is no base chain.
func (h hook) String() string {
	switch h {
	case input:
		return "type filter hook input priority 0; policy accept;"
	case forward:
		return "type filter hook forward priority 0; policy accept;"
	}
	return ""
}

// number is the kernel's (NF_INET_*).
func (h hook) number() uint32 { return uint32(h) - 1 }

const nfAccept = 1 // NF_ACCEPT

type chain struct {
	name  string
	hook  hook
	rules []rule
	canon string // what a chain in the kernel is compared by
}

// newChain declares a chain.
func newChain(name string, h hook, rules ...rule) chain {
	c := chain{name, h, rules, h.String()}
	for _, r := range rules {
		c.canon += "\n" + r.canon
	}
	return c
}

// refusal says how a reason is answered: by which chain, "" for not at all.
type refusal struct {
	reason Reason
	answer string
}

var refusals = []refusal{
	{NoPolicy, chainRefuse}, {NoTag, chainRefuse}, {UnknownDestination, chainRefuse}, {FromOutside, chainRefuse},
	{HostService, chainRefuse}, {Ended, chainRefuse}, {UnknownSource, ""}, {VXLAN, ""},
	{NoRule, chainRefuse}, {DeniedNetwork, chainRefuse}, {RateLimited, chainRefuse}, {Invalid, ""},
}

func refuse(r Reason) part { return goTo("refuse-" + string(r)) }

// chains returns those that every ruleset has. Above each rule stands its text.
func (f frame) chains() []chain {
	out := []chain{
		newChain(chainForward, forward,
			// iifname "s-*" iifname . ip saddr vmap @sources
			newRule(verdictBySource(containers, setSources)),
			// iifname "silk-vtep" goto from-overlay
			newRule(iifname(f.vtep), goTo(chainPeers)),
			// goto others
			newRule(goTo(chainOthers)),
		),
		newChain(chainPeers, noHook,
			// ct state established accept
			newRule(isEstablished(), accept()),
			// meta l4proto icmp ct state related accept
			newRule(relatedICMP(), accept()),
			// oifname "s-*" ip daddr vmap @destinations
			newRule(oifname(containers), verdictByDestination(setDestinations)),
			// goto refuse-unknown-destination
			newRule(refuse(UnknownDestination)),
		),
		newChain(chainOthers, noHook,
			// iifname "s-*" goto refuse-unknown-source
			newRule(iifname(containers), refuse(UnknownSource)),
			// oifname "s-*" ct status dnat accept
			newRule(oifname(containers), isMapped(), accept()),
			// oifname "s-*" ct state ! established,related goto refuse-from-outside
			newRule(oifname(containers), notEstablished(), refuse(FromOutside)),
			// oifname "silk-vtep" meta mark set meta mark & 0xffff0000
			newRule(oifname(f.vtep), setTag(0)),
		),
		newChain(chainOverlay, noHook, f.toOverlay()...),
		newChain(chainUntagged, noHook, f.untagged()...),
		newChain(chainOutside, noHook, f.outsideRules()...),
		newChain(chainAny, noHook, f.any()...),
		newChain(chainUnknown, noHook, f.unmatched()...),
		// The kernel takes an ICMP error for part of the connection that it speaks of, whoever sends it, if that one's sender is who it is
		// sent to. (In ct state established there are none, nor are there echo requests.)
		newChain(chainErrors, noHook,
			// ct state established accept
			newRule(isEstablished(), accept()),
			// ct state related iifname . ct reply ip saddr @own accept
			newRule(related(), ownEndOf(replyTuple, setOwn), accept()),
			// ct state related iifname . ct original ip saddr @own accept
			newRule(related(), ownEndOf(originalTuple, setOwn), accept()),
			// goto refuse-unknown-source
			newRule(refuse(UnknownSource)),
		),
	}
	out = append(append(out, f.allowing()), f.egress()...)
	out = append(out, f.host()...)
	return append(out, f.refusing()...)
}

func (f frame) any() []rule {
	var rules []rule
	if f.log.c2c {
		// ip saddr 10.255.0.0/16 ... log
		rules = f.log.rules(flow.Accepted, flow.C2C, "", receiver, saddrIn(f.network))
	}
	return append(rules,
		// ip saddr 10.255.0.0/16 accept
		newRule(saddrIn(f.network), accept()),
		// goto unmatched
		newRule(goTo(chainUnknown)))
}

func (f frame) toOverlay() []rule {
	var rules []rule
	if f.ended {
		rules = append(rules,
			// ct state established accept
			newRule(isEstablished(), accept()),
			// ip saddr . th sport . ip daddr . th dport . meta l4proto @ended goto refuse-ended
			newRule(endedIn(setEnded), refuse(Ended)))
	}
	return append(rules,
		// icmp type != echo-request goto errors
		newRule(icmpAnswer(), goTo(chainErrors)),
		// accept
		newRule(accept()))
}

func (f frame) untagged() []rule {
	rules := []rule{
		// ct state established accept
		newRule(isEstablished(), accept()),
		// icmp type != echo-request goto errors
		newRule(icmpAnswer(), goTo(chainErrors)),
	}
	if f.unrestricted {
		// accept
		return append(rules, newRule(accept()))
	}
	// goto refuse-no-tag
	return append(rules, newRule(refuse(NoTag)))
}

func (f frame) unmatched() []rule {
	var rules []rule
	if f.router != 0 {
		// meta mark & 0x0000ffff == 0x00000007 meta l4proto tcp ip daddr . th dport @ingress goto allow
		rules = append(rules, newRule(tagIs(expr.CmpOpEq, uint32(f.router)), ingressIn(setIngress), goTo(chainAllow)))
	}
	return append(rules,
		// meta mark & 0x0000ffff == 0x00000000 goto refuse-no-tag
		newRule(tagIs(expr.CmpOpEq, 0), refuse(NoTag)),
		// goto refuse-no-policy
		newRule(refuse(NoPolicy)))
}

// allowing is the chain that lets a packet in which no connection has been established for. The tag is written once for a
// connection: a stream without answers comes by with every packet.
func (f frame) allowing() chain {
	// ct mark & 0x0000ffff != 0x00000000 accept
	rules := []rule{newRule(connMark(expr.CmpOpNeq, f.connMask), accept())}
	if f.log.c2c { // what has the tag was told of
		rules = append(rules, f.log.rules(flow.Accepted, flow.C2C, "", receiver)...)
	}
	shift := bits.TrailingZeros32(f.connMask)
	if shift == 0 {
		// ct mark == 0x00000000 ct mark set meta mark & 0x0000ffff accept
		rules = append(rules, newRule(connMark(expr.CmpOpEq, ^uint32(0)), connMarkFromTag(), accept()))
	}
	// Others keep something in the mark too, or ours is not at its end: bit by bit, since before Linux 6.13 two values that are
	// not constants cannot be put together.
	for i := range 16 {
		bit := uint32(1) << i
		// meta mark & 0x00000001 == 0x00000001 ct mark set ct mark | 0x00010000
		rules = append(rules, newRule(hasBit(bit), connMarkBit(bit<<shift)))
	}
	// accept
	rules = append(rules, newRule(accept()))
	return newChain(chainAllow, noHook, rules...)
}

func (f frame) host() []chain {
	// meta mark & 0x0000ffff != 0x00000000 iifname "silk-vtep" goto from-overlay-to-host
	fromPeers := newRule(tagIs(expr.CmpOpNeq, 0), iifname(f.vtep), goTo(chainPeer))
	if f.unrestricted { // containers without a tag send too, and cannot be told from hosts, which have nothing to ask of each other here
		// iifname "silk-vtep" goto from-overlay-to-host
		fromPeers = newRule(iifname(f.vtep), goTo(chainPeer))
	}
	return []chain{
		newChain(chainInput, input,
			// iifname "s-*" goto to-host
			newRule(iifname(containers), goTo(chainHost)),
			fromPeers,
		),
		newChain(chainHost, noHook,
			// meta nfproto != ipv4 goto refuse-unknown-source
			newRule(notIPv4(), refuse(UnknownSource)),
			// iifname . ip saddr != @own goto refuse-unknown-source
			newRule(sourceNotIn(setOwn), refuse(UnknownSource)),
			// udp dport 4789 goto refuse-vxlan
			newRule(udpPort(vxlanPort), refuse(VXLAN)),
			// ct state established accept
			newRule(isEstablished(), accept()),
			// icmp type != echo-request goto errors
			newRule(icmpAnswer(), goTo(chainErrors)),
			// ip daddr . meta l4proto . th dport @services accept
			newRule(serviceIn(setServices), accept()),
			// goto refuse-host-service
			newRule(refuse(HostService)),
		),
		newChain(chainPeer, noHook,
			// ct state established accept
			newRule(isEstablished(), accept()),
			// meta l4proto icmp ct state related accept
			newRule(relatedICMP(), accept()),
			// goto refuse-host-service
			newRule(refuse(HostService)),
		),
	}
}

func (f frame) refusing() []chain {
	out := []chain{newChain(chainRefuse, noHook,
		// meta l4proto tcp limit rate 100/second burst 100 packets reject with tcp reset
		newRule(protocol("tcp", unix.IPPROTO_TCP), limit(answerRate, answerBurst), rejectReset()),
		// limit rate 100/second burst 100 packets reject
		newRule(limit(answerRate, answerBurst), rejectUnreachable()),
		// drop
		newRule(drop()),
	)}
	for _, r := range refusals {
		answer := drop()
		if r.answer != "" {
			answer = goTo(r.answer)
		}
		var rules []rule
		if scope, whose := refusalLogs(r.reason); f.log.tells(scope) {
			rules = f.log.rules(flow.Denied, scope, string(r.reason), whose)
		}
		// counter name "no-policy" goto refuse
		out = append(out, newChain("refuse-"+string(r.reason), noHook, append(rules, newRule(count(string(r.reason)), answer))...))
	}
	return out
}

// fromChain returns the name of the chain of what a group's members here send.
func fromChain(tag identity.Tag) string { return "from-" + tag.String() }

// awayChain returns the name of the chain of what of it goes to no container on this host.
func awayChain(tag identity.Tag) string { return fromChain(tag) + "-away" }

// from returns the chain of what a group's members here send. Only what enters the overlay gets the tag: the marks of all else are not ours.
// With streams, the tag in the connection's mark is where the packet's is, and known streams need not be given it once more.
func from(tag identity.Tag, streams bool) chain {
	rules := []rule{
		// oifname != "s-*" goto from-0007-away
		newRule(oifnameNot(containers), goTo(awayChain(tag))),
		// ct state established accept
		newRule(isEstablished(), accept()),
	}
	if streams && tag != 0 {
		// ct mark & 0x0000ffff == 0x00000007 ip daddr vmap @streams
		rules = append(rules, newRule(connTagIs(uint32(tag)), verdictByDestination(setStreams)))
	}
	return newChain(fromChain(tag), noHook, append(rules,
		// icmp type != echo-request goto errors
		newRule(icmpAnswer(), goTo(chainErrors)),
		// meta mark set meta mark & 0xffff0000 | 0x00000007 ip daddr vmap @destinations
		newRule(setTag(uint32(tag)), verdictByDestination(setDestinations)),
		// goto refuse-unknown-destination
		newRule(refuse(UnknownDestination)),
	)...)
}

// away returns the chain of what they send to other hosts, whose tables judge it, and to the outside.
func away(vtep string, tag identity.Tag) chain {
	out := chainOverlay
	if tag == 0 {
		out = chainUntagged
	}
	return newChain(awayChain(tag), noHook,
		// oifname "silk-vtep" meta mark set meta mark & 0xffff0000 | 0x00000007 goto to-overlay
		newRule(oifname(vtep), setTag(uint32(tag)), goTo(out)),
		// goto to-outside
		newRule(goTo(chainOutside)),
	)
}

// knownChain returns the name of the chain that judges streams that are known.
func knownChain(tag identity.Tag) string { return "known-" + tag.String() }

// known returns the chain that judges packets of a connection that bears the tag of who sends them; what it does not accept
// is judged like any other.
func known(tag identity.Tag) chain {
	return newChain(knownChain(tag), noHook,
		// ct mark & 0x0000ffff . meta l4proto . th dport @allow-0007 accept
		newRule(streamAllowedIn(allowSet(tag)), accept()))
}

// toChain returns the name of the chain that judges what the members of a group here are sent; allowSet that of the set it looks into.
func toChain(tag identity.Tag) string  { return "to-" + tag.String() }
func allowSet(tag identity.Tag) string { return "allow-" + tag.String() }

// to returns the chain of a group; allow is the set of single ports that it has, "" for none.
func to(connMask uint32, tag identity.Tag, allow string, ranges rangesRule) chain {
	var rules []rule
	if allow != "" {
		rules = append(rules,
			// ct mark & 0x0000ffff != 0x00000000 meta mark & 0x0000ffff . meta l4proto . th dport @allow-0007 accept
			newRule(connMark(expr.CmpOpNeq, connMask), allowedIn(allow, false), accept()),
			// meta mark & 0x0000ffff . meta l4proto . th dport @allow-0007 goto allow
			newRule(allowedIn(allow, false), goTo(chainAllow)))
	}
	switch {
	case ranges.shards > 1:
		// meta mark & 0x0000000f vmap @shards-0007-16
		rules = append(rules, newRule(verdictByTag(uint32(ranges.shards-1), ranges.set)))
	case ranges.set != "":
		// meta mark & 0x0000ffff . meta l4proto . th dport @ranges-0007-0 goto allow
		rules = append(rules, newRule(allowedIn(ranges.set, true), goTo(chainAllow)))
	}
	// goto unmatched
	rules = append(rules, newRule(goTo(chainUnknown)))
	return newChain(toChain(tag), noHook, rules...)
}
