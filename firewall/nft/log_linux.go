package nft

import (
	"fmt"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// LogGroup is the NFLOG group that logged packets go to unless Options say another. Who listens there gets the beginning of each packet and a
// prefix that flow.ParsePrefix reads. If nobody listens, or not fast enough, nothing waits and what was not read is lost.
const LogGroup = 4700

const (
	// snaplen is how many bytes of a packet are logged: the longest header of IPv4 and what tells a connection of the next.
	snaplen = 96

	// limitIdle is how long a container's share of lines is remembered after the last packet that asked for it.
	limitIdle = time.Minute

	// maxLimited is how many containers' shares are remembered. A packet of one beyond that is not logged.
	maxLimited = 4096
)

// logs is what the table logs. It is comparable.
type logs struct {
	c2c, egress bool
	group       uint16
	denied, udp uint32 // lines a second of one container: packets denied, and accepted of udp
}

// logsOf returns what a ruleset asks to be logged. Rates that are missing are those of a deployment that does not say.
func logsOf(l firewall.Log, group uint16) logs {
	out := logs{c2c: l.C2C, egress: l.Egress, group: group, denied: uint32(max(l.Denied, 0)), udp: uint32(max(l.UDP, 0))}
	if out.denied == 0 {
		out.denied = 1
	}
	if out.udp == 0 {
		out.udp = 100
	}
	return out
}

// tells reports whether refusals of a scope are logged where packets are refused. What exceeds a limit is logged where that is found out.
func (l logs) tells(s flow.Scope) bool {
	switch s {
	case flow.Egress:
		return l.egress
	case flow.Rate:
		return false
	}
	return l.c2c
}

// The names of the sets that hold the containers' shares, one for each rate: what has a share keeps its rate until it was idle.
func (l logs) deniedSet() string { return fmt.Sprintf("log-denied-%d", l.denied) }
func (l logs) udpSet() string    { return fmt.Sprintf("log-udp-%d", l.udp) }

// Counters of packets that were to be logged, and of those that were.
const (
	countDenied, countDeniedSent = "log-denied", "log-denied-sent"
	countUDP, countUDPSent       = "log-udp", "log-udp-sent"
)

var logCounters = []string{countDenied, countDeniedSent, countUDP, countUDPSent}

// container says by the name of which of a packet's devices it is counted whose it is.
type container bool

// The devices.
const (
	sender   container = false // the one that it came from
	receiver container = true  // the one that it would go to
)

// rules returns the rules that log packets which match: they come before the rule that gives the verdict and give none themselves, since a rule with
// a limit and a verdict would not hold for what exceeds the limit. They must be where no packet of an established connection comes by.
// detail is the reason of a refusal, or names the rule that lets the packet through; records have it.
//
// Denied packets, and accepted ones of udp, are limited for each container; all others are logged each.
func (l logs) rules(v flow.Verdict, s flow.Scope, detail string, whose container, match ...part) []rule {
	prefix := flow.Prefix(v, s, detail)
	if v == flow.Denied {
		// counter name "log-denied" update @log-denied-1 { iifname timeout 1m limit rate 1/second burst 1 packets }
		// counter name "log-denied-sent" log prefix "silk deny c2c no-policy " group 4700 snaplen 96
		return []rule{newRule(with(match, count(countDenied), share(whose, l.deniedSet(), l.denied), count(countDeniedSent), l.tell(prefix))...)}
	}
	return []rule{
		// meta l4proto udp counter name "log-udp" update @log-udp-100 { oifname timeout 1m limit rate 100/second burst 100 packets }
		// counter name "log-udp-sent" log prefix "silk ok c2c " group 4700 snaplen 96
		newRule(with(match, protocol("udp", unix.IPPROTO_UDP), count(countUDP), share(whose, l.udpSet(), l.udp), count(countUDPSent), l.tell(prefix))...),
		// meta l4proto != udp log prefix "silk ok c2c " group 4700 snaplen 96
		newRule(with(match, notUDP(), l.tell(prefix))...),
	}
}

// with returns a list of its own.
func with(match []part, more ...part) []part { return append(append([]part{}, match...), more...) }

// tell logs the packet.
func (l logs) tell(prefix string) part {
	return part{fmt.Sprintf("log prefix %q group %d snaplen %d", prefix, l.group, snaplen), []expr.Any{&expr.Log{
		Key:     1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
		Group:   l.group,
		Snaplen: snaplen,
		Data:    []byte(prefix),
	}}}
}

// share is true as long as a container has not used up its lines of this second.
func share(whose container, set string, rate uint32) part {
	word, key := "iifname", expr.MetaKeyIIFNAME
	if whose == receiver {
		word, key = "oifname", expr.MetaKeyOIFNAME
	}
	l := limit(uint64(rate), rate)
	return part{fmt.Sprintf("update @%s { %s timeout %s %s }", set, word, strings.TrimSuffix(limitIdle.String(), "0s"), l.text), []expr.Any{
		meta(key, reg1), &expr.Dynset{SrcRegKey: reg1, SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: limitIdle, Exprs: l.exprs}}}
}

func notUDP() part {
	return part{"meta l4proto != udp", []expr.Any{meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpNeq, unix.IPPROTO_UDP)}}
}

// refusalLogs says of which scope a refusal is and whose lines tell of it: the container's that the packet was for where it is judged
// there, else the one's that sent it.
func refusalLogs(r Reason) (flow.Scope, container) {
	switch r {
	case NoPolicy, FromOutside:
		return flow.C2C, receiver
	case HostService:
		return flow.Host, sender
	case NoRule, DeniedNetwork, Invalid:
		return flow.Egress, sender
	case RateLimited:
		return flow.Rate, sender
	}
	return flow.C2C, sender
}
