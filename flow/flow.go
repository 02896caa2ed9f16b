// Package flow is the noun of the flow log: who began a connection with whom, whether it was let through and why, and how much it carried.
//
// A Log joins what a host's kernel tells, packets that rules have logged and connections that have ended, to records, one for each
// connection. It is pure: sockets are internal/kernel's, names are the caller's, and so is where records go.
//
// Use: give a Log every Packet and every End together with the time; write what it returns with a Format.
package flow

import (
	"strings"
	"unicode"
)

// Verdict is what became of a connection.
type Verdict uint8

// The verdicts.
const (
	Denied Verdict = iota
	Accepted
)

// String returns "accepted" or "denied".
func (v Verdict) String() string {
	if v == Accepted {
		return "accepted"
	}
	return "denied"
}

// Scope is what kind of connection it is.
type Scope uint8

// The scopes.
const (
	C2C    Scope = iota // between containers
	Egress              // from a container to the outside of the overlay
	Host                // from a container to the host itself
	Rate                // too many new ones to one destination outside
)

var scopes = [...]string{C2C: "c2c", Egress: "egress", Host: "host", Rate: "rate"}

// String returns the word for the scope that prefixes and records have.
func (s Scope) String() string {
	if int(s) < len(scopes) {
		return scopes[s]
	}
	return "unknown"
}

// Prefixes of logged packets are "silk deny c2c no-policy ": what it is, verdict, scope, and a detail, which may be missing.
const prefixBegin, prefixOK, prefixDeny = "silk ", "ok", "deny"

// MaxPrefix is how many bytes of a prefix the kernel keeps (linux/netfilter/nf_log.h: NF_LOG_PREFIXLEN, with the final 0).
const MaxPrefix = 127

// Prefix returns what rules write before a packet that they log. detail, the reason of a refusal or the name of a rule, is cut to what fits and
// changed where it has quotes or other characters that nft cannot show.
func Prefix(v Verdict, s Scope, detail string) string {
	word := prefixDeny
	if v == Accepted {
		word = prefixOK
	}
	p := prefixBegin + word + " " + s.String() + " "
	if detail == "" {
		return p
	}
	detail = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' || r == '*' {
			return '_'
		}
		return r
	}, detail)
	return p + detail[:min(len(detail), MaxPrefix-len(p)-1)] + " "
}

// ParsePrefix is the inverse of Prefix. It is not ok for a prefix that is none of ours.
func ParsePrefix(p string) (v Verdict, s Scope, detail string, ok bool) {
	rest, ok := strings.CutPrefix(p, prefixBegin)
	if !ok {
		return 0, 0, "", false
	}
	word, rest, _ := strings.Cut(rest, " ")
	scope, detail, _ := strings.Cut(rest, " ")
	switch word {
	case prefixOK:
		v = Accepted
	case prefixDeny:
		v = Denied
	default:
		return 0, 0, "", false
	}
	detail = strings.TrimSuffix(detail, " ")
	if strings.ContainsFunc(detail, func(r rune) bool { return !unicode.IsGraphic(r) || r == ' ' }) {
		return 0, 0, "", false
	}
	for i, name := range scopes {
		if name == scope {
			return v, Scope(i), detail, true
		}
	}
	return 0, 0, "", false
}
