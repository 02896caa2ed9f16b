package flow

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// Logged is a packet that a rule has logged.
type Logged struct {
	Time    time.Time
	Verdict Verdict
	Scope   Scope
	Detail  string
	Mark    uint32
	Packet  Packet
}

// End is a connection that the kernel has forgotten.
type End struct {
	Time        time.Time
	Packet      Packet // Source began it, Destination answered
	Mark        uint32
	Sent, Heard Traffic
	Start, Last time.Time // zero if the kernel does not keep them
}

// Book is what a host knows of names. It does not change once a Log has it.
type Book struct {
	Parties map[netip.Addr]*Party           // containers of this host
	Groups  map[identity.Tag]identity.Group // of all policies

	// Allowed returns the ports of the policy by which a group may reach an address of this host.
	Allowed func(from identity.Tag, to netip.Addr, proto policy.Protocol, port uint16) (policy.Ports, bool)

	// Explain words why a packet was let out or not, "" where it cannot say more than the rule's detail; nil is allowed.
	Explain func(Logged) string
}

// Options of a Log.
type Options struct {
	Open   int       // connections whose end is waited for; 0: 262,144
	Denied int       // refusals that are remembered, so that a packet sent again makes no other record; 0: 65,536
	Since  time.Time // connections that began earlier were somebody else's to tell of; their end is told all the same
}

// repeat is how long, at least, a refusal is remembered: TCP sends again after at most 32 s of silence, before it gives up.
const repeat = time.Minute

// Log makes records. It is not safe for concurrent use.
type Log struct {
	o      Options
	book   *Book
	open   map[key]begun
	denied [2]map[key]struct{} // of now, and of before
	turned time.Time
	whys   map[whyKey]string
	whats  map[what]*what
	early  [2]map[key]End // ends whose beginning has not been heard of, of now and of before
	aged   time.Time
	out    Record // that emit is given: it is not made anew for each
}

// begun is what is remembered of a connection.
type begun struct {
	start  int64 // ns
	again  int64 // ns: when rules logged a packet with the same ends last
	what   *what
	mark   uint32
	missed bool // the kernel did not know it when it was last asked
}

// what is what many connections have in common: there are far fewer of them.
type what struct {
	verdict            Verdict
	scope              Scope
	detail, why        string
	from, to           *Party
	fromGroup, toGroup string
}

// maxWhats bounds how many are shared.
const maxWhats = 4096

func (l *Log) what(r *Record) *what {
	w := what{r.Verdict, r.Scope, r.Detail, r.Why, r.From, r.To, r.FromGroup, r.ToGroup}
	if p, ok := l.whats[w]; ok {
		return p
	}
	if len(l.whats) >= maxWhats {
		clear(l.whats)
	}
	l.whats[w] = &w
	return &w
}

// New returns a Log that knows no names yet.
func New(o Options) *Log {
	if o.Open <= 0 {
		o.Open = 1 << 18
	}
	if o.Denied <= 0 {
		o.Denied = 1 << 16
	}
	l := &Log{o: o, open: map[key]begun{}}
	l.denied[0], l.denied[1] = map[key]struct{}{}, map[key]struct{}{}
	l.early[0], l.early[1] = map[key]End{}, map[key]End{}
	l.Know(&Book{})
	return l
}

// Know gives the Log other names, for what begins from now on.
func (l *Log) Know(b *Book) { l.book, l.whys, l.whats = b, map[whyKey]string{}, map[what]*what{} }

// Open returns how many connections' ends are waited for.
func (l *Log) Open() int { return len(l.open) }

// Packet takes a logged packet and gives the record that it makes, if any, to emit, which may keep a copy only: the first packet of a connection makes one. Rules log a packet of
// a connection between containers once, unless somebody else drops it; elsewhere it may come again.
func (l *Log) Packet(p Logged, emit func(*Record)) {
	k := p.Packet.key()
	if p.Verdict == Denied {
		if l.repeated(k, p.Time) {
			return
		}
		r := l.record(p)
		r.Event = Refused
		l.give(r, emit)
		return
	}
	old, known := l.open[k]
	if known { // sent again, or the next connection with the same ports, before the end of this one was heard of
		old.again = p.Time.UnixNano()
		l.open[k] = old
		if p.Scope != C2C || p.Packet.Protocol != protoTCP {
			return
		}
	}
	r := l.record(p)
	r.Event = Begun
	e, early := l.overtaken(k)
	switch {
	case known, early:
	case len(l.open) >= l.o.Open:
		r.EndUnknown = true
	default:
		l.open[k] = begun{start: p.Time.UnixNano(), what: l.what(&r), mark: r.Mark}
	}
	l.give(r, emit)
	if early && !known {
		l.finish(begun{start: p.Time.UnixNano(), what: l.what(&r), mark: r.Mark}, e, emit)
	}
}

// hurry is how long an end whose beginning has not been heard of is kept: on a host that has no time for its agent it may overtake it.
const hurry = 10 * time.Second

// maxEarly bounds how many are.
const maxEarly = 8192

// overtaken returns the end that has overtaken a beginning.
func (l *Log) overtaken(k key) (End, bool) {
	for i := range l.early {
		if e, ok := l.early[i][k]; ok {
			delete(l.early[i], k)
			return e, true
		}
	}
	return End{}, false
}

// keep keeps an end for its beginning. Only connections between containers can be told from the many that no rule logs; those of udp may be
// without a beginning because there were too many, and do not end that soon.
func (l *Log) keep(k key, e End) {
	if e.Mark == 0 || e.Packet.Protocol == protoUDP || l.book.Parties[e.Packet.Destination.Addr()] == nil {
		return
	}
	if e.Time.Sub(l.aged) > hurry/2 || len(l.early[0]) >= maxEarly/2 {
		l.early[0], l.early[1] = l.early[1], l.early[0]
		clear(l.early[0])
		l.aged = e.Time
	}
	l.early[0][k] = e
}

// give hands a record over. It is emit's until that returns.
func (l *Log) give(r Record, emit func(*Record)) {
	l.out = r
	emit(&l.out)
}

// repeated notes a refusal and reports whether it was known.
func (l *Log) repeated(k key, now time.Time) bool {
	if now.Sub(l.turned) > repeat || len(l.denied[0]) >= l.o.Denied/2 {
		l.denied[0], l.denied[1] = l.denied[1], l.denied[0]
		clear(l.denied[0])
		l.turned = now
	}
	_, recently := l.denied[0][k]
	_, before := l.denied[1][k]
	l.denied[0][k] = struct{}{}
	return recently || before
}

// record says of a packet all that is known at once.
func (l *Log) record(p Logged) Record {
	r := Record{Time: p.Time, Start: p.Time, Verdict: p.Verdict, Scope: p.Scope, Detail: p.Detail, Packet: p.Packet, Mark: p.Mark}
	if p.Detail != unknownSource { // that address is not the sender's
		r.From = l.book.Parties[p.Packet.Source.Addr()]
	}
	r.To = l.book.Parties[p.Packet.Destination.Addr()]
	r.Ingress = r.To != nil
	if p.Scope == C2C && r.Ingress {
		r.Tag = identity.Tag(p.Mark)
	}
	switch {
	case r.From != nil:
		r.FromGroup = r.From.Group
	case r.Tag != 0:
		r.FromGroup = string(l.book.Groups[r.Tag])
	}
	if r.To != nil {
		r.ToGroup = r.To.Group
	}
	r.Why = l.why(&r, p)
	return r
}

// End takes the end of a connection and gives its record to emit. Connections that no rule has logged make none.
func (l *Log) End(e End, emit func(*Record)) {
	k := e.Packet.key()
	b, known := l.open[k]
	if !known {
		if !l.inherited(e, emit) {
			l.keep(k, e)
		}
		return
	}
	if b.again > e.Time.UnixNano() { // that was another connection: its end is still to come
		b.start = b.again
		l.open[k] = b
	} else {
		delete(l.open, k)
	}
	l.finish(b, e, emit)
}

// finish gives the record of an end.
func (l *Log) finish(b begun, e End, emit func(*Record)) {
	r := b.ended(e.Packet, e.Time)
	r.Sent, r.Heard, r.Last = e.Sent, e.Heard, e.Last
	if !e.Start.IsZero() {
		r.Start = e.Start
	}
	l.give(r, emit)
}

func (b begun) ended(p Packet, now time.Time) Record {
	w := b.what
	r := Record{Event: Ended, Time: now, Verdict: w.verdict, Scope: w.scope, Detail: w.detail, Why: w.why, Packet: p, Mark: b.mark,
		From: w.from, To: w.to, Ingress: w.to != nil, FromGroup: w.fromGroup, ToGroup: w.toGroup, Start: time.Unix(0, b.start)}
	if r.Scope == C2C && r.Ingress {
		r.Tag = identity.Tag(r.Mark)
	}
	return r
}

// inherited tells of the end of a connection between containers that began before this Log did, if it is one.
func (l *Log) inherited(e End, emit func(*Record)) bool {
	if e.Mark == 0 || e.Start.IsZero() || !e.Start.Before(l.o.Since) || l.book.Parties[e.Packet.Destination.Addr()] == nil {
		return false
	}
	r := l.record(Logged{Time: e.Time, Verdict: Accepted, Scope: C2C, Mark: e.Mark, Packet: e.Packet})
	r.Event, r.Start, r.Last, r.Sent, r.Heard = Ended, e.Start, e.Last, e.Sent, e.Heard
	l.give(r, emit)
	return true
}

// Retain gives up the connections that began before the kernel was asked for those that it knows, if alive says twice in a row that they are none:
// their ends were missed, or somebody else has dropped their first packet. Once may be an end that is still on its way here.
func (l *Log) Retain(now, asked time.Time, alive func(Packet) bool, emit func(*Record)) {
	for k, b := range l.open {
		p := k.packet()
		gone := max(b.start, b.again) < asked.UnixNano() && !alive(p)
		if !gone || !b.missed {
			if gone != b.missed {
				b.missed = gone
				l.open[k] = b
			}
			continue
		}
		delete(l.open, k)
		r := b.ended(p, now)
		r.EndUnknown = true
		l.give(r, emit)
	}
}

func (k key) packet() Packet {
	source, destination := netip.AddrFrom16(k.source).Unmap(), netip.AddrFrom16(k.destination).Unmap()
	return Packet{k.proto, netip.AddrPortFrom(source, k.from), netip.AddrPortFrom(destination, k.to)}
}

// whyKey is what a policy's wording depends on.
type whyKey struct {
	from, to    string
	tag         identity.Tag
	proto       uint8
	first, last uint16
	verdict     Verdict
}

// Reasons of refusals that are worded here (firewall/nft: Reason).
const (
	noPolicy      = "no-policy"
	unknownSource = "unknown-source"
)

var words = map[string]string{
	"no-tag":              "the source is in no group that a policy speaks of",
	"unknown-destination": "no container has this address",
	unknownSource:         "the source address is not the sender's own, or the sender is not known yet",
	"from-outside":        "containers are not reached from outside the overlay",
	"host-service":        "no service of the host that containers may reach",
	"vxlan":               "containers may not send VXLAN",
	"ended":               "the connection was ended when its policy was removed",
}

// why words the reason.
func (l *Log) why(r *Record, p Logged) string {
	if l.book.Explain != nil {
		if s := l.book.Explain(p); s != "" {
			return s
		}
	}
	switch {
	case r.Scope == C2C && (r.Verdict == Accepted || r.Detail == noPolicy):
		return l.policy(r)
	case r.Verdict == Denied && words[r.Detail] != "":
		return words[r.Detail]
	case r.Scope == Egress && r.Verdict == Denied:
		return fmt.Sprintf("no security group allows %s", target(r.Packet))
	case r.Scope == Rate:
		return fmt.Sprintf("too many new connections to %s", target(r.Packet))
	case r.Scope == Egress && r.Detail != "":
		return "security group " + r.Detail
	case r.Scope == Egress:
		return "a security group"
	}
	return r.Detail
}

// target words where a packet goes.
func target(p Packet) string {
	if p.isICMP() {
		typ, code := p.ICMP()
		return fmt.Sprintf("%s type %d code %d to %v", ProtocolName(p.Protocol), typ, code, p.Destination.Addr())
	}
	return fmt.Sprintf("%s to %v", ProtocolName(p.Protocol), p.Destination)
}

// policy words the policy that lets a connection through, or that is missing.
func (l *Log) policy(r *Record) string {
	_, port := r.Packet.ports()
	k := whyKey{r.FromGroup, r.ToGroup, r.Tag, r.Packet.Protocol, port, port, r.Verdict}
	if r.Verdict == Accepted && l.book.Allowed != nil {
		if ports, ok := l.book.Allowed(r.Tag, r.Packet.Destination.Addr(), policy.Protocol(r.Packet.Protocol), port); ok {
			k.first, k.last = ports.First, ports.Last
		}
	}
	if s, ok := l.whys[k]; ok {
		return s
	}
	var b strings.Builder
	if r.Verdict == Denied {
		b.WriteString("no ")
	}
	fmt.Fprintf(&b, "policy %s -> %s %s", groupName(r.FromGroup, r.Tag), groupName(r.ToGroup, 0), ProtocolName(r.Packet.Protocol))
	if !r.Packet.isICMP() {
		fmt.Fprintf(&b, " %v", policy.Ports{First: k.first, Last: k.last})
	}
	if len(l.whys) >= maxWhys { // ports that are refused are anybody's choice
		clear(l.whys)
	}
	l.whys[k] = b.String()
	return l.whys[k]
}

// maxWhys bounds how many wordings are remembered.
const maxWhys = 4096

func groupName(group string, tag identity.Tag) string {
	switch {
	case group != "":
		return group
	case tag != 0:
		return "tag " + tag.String()
	}
	return "(no group)"
}
