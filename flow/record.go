package flow

import (
	"time"

	"code.cloudfoundry.org/silk/identity"
)

// Event says which moment of a connection a record is about.
type Event uint8

// The events.
const (
	Refused Event = iota // a packet was denied: the only record of its connection
	Begun                // the first packet passed
	Ended                // the connection is over: it has carried what it says
)

var events = [...]string{Refused: "denied", Begun: "begun", Ended: "ended"}

// String returns "denied", "begun" or "ended".
func (e Event) String() string {
	if int(e) < len(events) {
		return events[e]
	}
	return "unknown"
}

// Party is who has an address: a container of this host.
type Party struct {
	Container              string // id
	Group, App, Space, Org string // policy group; in Cloud Foundry also what the container belongs to
}

// Traffic is what one side has sent.
type Traffic struct{ Packets, Bytes uint64 }

// Record is what is told of a connection.
type Record struct {
	Event    Event
	Time     time.Time // of the record
	Verdict  Verdict
	Scope    Scope
	Detail   string // of the rule: the reason of a refusal, or the rule's name
	Why      string // the policy or rule that let it through, or what is missing, in words
	Packet   Packet
	Mark     uint32       // of the packet
	Tag      identity.Tag // of who began it, 0 if it is not known
	From, To *Party       // nil: not of this host
	Ingress  bool         // to a container of this host

	FromGroup, ToGroup string // of whichever side, where it is known

	Start, Last time.Time // its first and its last packet; zero if that is not known
	Sent, Heard Traffic   // by who began it, and by who answered
	EndUnknown  bool      // nothing will tell, or has told, of its end: there is no other record of it
}

// Duration is the time from the first packet to the last, 0 if it is not known.
func (r *Record) Duration() time.Duration {
	if r.Start.IsZero() || r.Last.IsZero() {
		return 0
	}
	return max(r.Last.Sub(r.Start), 0)
}
