package dnsserver

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/registration"
)

// zone is a domain of ours.
type zone struct{ name, server []byte } // server: the name that its NS record gives

func newZones(domains []registration.Name) []zone {
	var zones []zone
	for _, d := range domains {
		zones = append(zones, zone{[]byte(d), []byte("ns." + d)})
	}
	slices.SortStableFunc(zones, func(a, b zone) int { return cmp.Compare(len(b.name), len(a.name)) })
	return zones
}

// worker answers questions, one at a time, in memory of its own.
type worker struct {
	s      *Server
	q      query
	r      reply
	buf    []byte // of r
	addrs  []netip.Addr
	list   []registration.Registration
	places []int // in r, of the targets of SRV records
}

// keepRecords is for how many records a worker keeps memory.
const keepRecords = 64

// verdict is what is to be done with a message.
type verdict uint8

const (
	drop   verdict = iota
	send           // the answer that there is
	onward         // ask a resolver: query is filled in
)

// answer reads a message and writes the answer to it, which is valid until the next call. limit is the most bytes of one by this
// transport; udp has a limit of the client's as well.
func (w *worker) answer(b []byte, stream bool) (resp []byte, v verdict) {
	code, dropped := w.q.parse(b)
	if dropped {
		w.s.counts.dropped.Add(1)
		return nil, drop
	}
	w.r.begin(w.buf, &w.q, w.limit(stream))
	if code == noError {
		code, v = w.decide()
		if v == onward {
			return nil, onward
		}
	}
	return w.finish(code, stream), send
}

// limit returns the most bytes of an answer to the present question.
func (w *worker) limit(stream bool) int {
	if stream {
		return maxTCP
	}
	return min(w.q.udp, w.s.cfg.UDPSize)
}

// finish ends the answer and counts it.
func (w *worker) finish(code rcode, stream bool) []byte {
	w.s.counts.answer(stream, &w.q, code)
	resp := w.r.end(code, w.s.cfg.UDPSize)
	w.buf = w.r.b
	if cap(w.addrs) > keepRecords || cap(w.list) > keepRecords {
		w.addrs, w.list, w.places = nil, nil, nil // one large answer is not to be paid for by memory for ever
	}
	return resp
}

// fail writes an answer without records to the present question.
func (w *worker) fail(code rcode, stream bool) []byte {
	w.r.begin(w.buf, &w.q, w.limit(stream))
	if w.s.onward != nil {
		w.r.set(flagRA)
	}
	return w.finish(code, stream)
}

// decide writes the answer's records, or says that a resolver is to be asked.
func (w *worker) decide() (rcode, verdict) {
	q := &w.q
	if w.s.onward != nil {
		w.r.set(flagRA)
	}
	if q.class != classIN || q.typ == typeAXFR || q.typ == typeIXFR {
		return refused, send
	}
	code := refused
	if z := w.s.zoneOf(q.name()); z != nil {
		code = w.domain(z)
	} else if p, ok := w.s.reverseOf(q.name()); ok {
		code = w.reverse(p)
	} else if w.s.onward != nil && q.flags&flagRD != 0 {
		return noError, onward
	}
	if code == noError || code == nxDomain {
		w.r.set(flagAA | flagRA) // both, as clients are used to: for these names there is nobody to be asked further
	}
	return code, send
}

// zoneOf returns the smallest domain of ours that has the name, nil if none has.
func (s *Server) zoneOf(name []byte) *zone {
	for i := range s.zones {
		d := s.zones[i].name
		if n := len(name) - len(d); n >= 0 && (n == 0 || name[n-1] == '.') && string(name[n:]) == string(d) {
			return &s.zones[i]
		}
	}
	return nil
}

// domain answers for a name in a domain of ours.
func (w *worker) domain(z *zone) rcode {
	name := w.q.name()
	apex := headerSize + len(name) - len(z.name)
	f := w.find(z, name)
	switch {
	case !f.known && !w.ofZone(apex) && !w.s.cfg.Warm():
		return servFail
	case !f.there:
		w.r.soa(authority, apex, w.serial(), w.s.ttl)
		return nxDomain
	}
	host := f.kind == ordinary || f.kind == addressName
	switch typ := w.q.typ; {
	case host && (typ == typeA || typ == typeAAAA):
		w.addresses(typ == typeA)
	case typ == typeSRV:
		w.services(f)
	default:
		w.common(apex)
	}
	if w.r.n[answers] == 0 && !w.truncated() {
		w.r.soa(authority, apex, w.serial(), w.s.ttl)
	}
	return noError
}

// ofZone reports whether the question is about the zone itself, which stands at a place in the message, and not about a name that can be
// registered.
func (w *worker) ofZone(apex int) bool {
	return apex == headerSize && (w.q.typ == typeSOA || w.q.typ == typeNS)
}

// common answers what is the same for every name that is there. apex is where the zone's name stands in the message.
func (w *worker) common(apex int) {
	switch typ := w.q.typ; {
	case typ == typeANY:
		w.r.hinfo(headerSize, w.s.ttl)
	case typ == typeSOA && apex == headerSize:
		w.r.soa(answers, apex, w.serial(), w.s.ttl)
	case typ == typeNS && apex == headerSize:
		w.r.ns(answers, apex, w.s.ttl)
	}
}

func (w *worker) truncated() bool { return w.r.b[2]&(flagTC>>8) != 0 }

// serial is a number that changes when the table does.
func (w *worker) serial() uint32 { return uint32(w.s.cfg.Table.Turn()) }

// found is what a name in a domain turned out to be. Its addresses are in worker.addrs.
type found struct {
	there bool // it, or a name below it
	known bool // itself: a table that lacks names cannot say more of it
	kind  kind
	base  []byte     // whose registrations count: the name itself, or what follows the labels that make it special
	only  netip.Addr // of an addressName: the one that counts
}

// find looks a name up. A name that the table has as it stands is nothing special, whatever it looks like.
func (w *worker) find(z *zone, name []byte) found {
	table := w.s.cfg.Table
	w.addrs = w.addrs[:0]
	if bytes.Equal(name, z.server) && !w.exact(name) {
		w.own()
		return found{there: true, known: true, base: name}
	}
	kind, rest, only := special(name)
	if kind != ordinary && len(rest) >= len(z.name) && !w.exact(name) {
		w.addrs, _ = table.AppendAddrs(w.addrs, rest)
		if len(w.addrs) > 0 && (kind != addressName || slices.Contains(w.addrs, only)) {
			if kind == addressName {
				w.addrs = append(w.addrs[:0], only)
			}
			return found{true, true, kind, rest, only}
		}
		w.addrs = w.addrs[:0]
	}
	var standing registration.Standing
	w.addrs, standing = table.AppendAddrs(w.addrs, name)
	return found{there: standing != registration.Absent || len(name) == len(z.name), known: standing == registration.Present, base: name}
}

// own finds the addresses of the zone's server, which the table does not have: those that we listen on, as far as they are said.
func (w *worker) own() {
	for _, a := range w.s.cfg.Listen {
		if !a.Addr().IsUnspecified() && !slices.Contains(w.addrs, a.Addr()) {
			w.addrs = append(w.addrs, a.Addr())
		}
	}
}

// exact reports whether the table has registrations of the name itself, not of one that stands for it.
func (w *worker) exact(name []byte) bool {
	n, _ := w.s.cfg.Table.Exact(name)
	return n > 0
}

// addresses answers with the addresses of one family, in an order of chance.
func (w *worker) addresses(v4 bool) {
	w.addrs = slices.DeleteFunc(w.addrs, func(a netip.Addr) bool { return a.Is4() != v4 })
	shuffle(w.addrs)
	for _, a := range w.addrs {
		if !w.r.address(answers, headerSize, a, w.s.ttl) {
			w.r.set(flagTC)
			return
		}
	}
}

// shuffle gives each order the same chance.
func shuffle[T any](list []T) {
	for i := len(list) - 1; i > 0; i-- {
		j := rand.IntN(i + 1)
		list[i], list[j] = list[j], list[i]
	}
}

// services answers with the ports that were registered, each at a name that has its one address.
func (w *worker) services(f found) {
	if f.kind == aboveServices {
		return
	}
	w.list, _ = w.s.cfg.Table.AppendRegistrations(w.list[:0], f.base)
	of := make(map[int]int, len(w.list)) // registrations of each index
	for i := range w.list {
		of[w.list[i].Index]++
	}
	w.list = slices.DeleteFunc(w.list, func(r registration.Registration) bool {
		return r.Port == 0 || f.kind == addressName && r.Address != f.only
	})
	shuffle(w.list)
	w.places = w.places[:0]
	for i := range w.list {
		at, ok := w.r.srv(w.list[i].Port, w.target(&w.list[i], f.base, of[w.list[i].Index] == 1), w.s.ttl)
		if !ok {
			w.r.set(flagTC)
			return // without addresses: the client asks again by tcp
		}
		w.places = append(w.places, at)
	}
	for i, at := range w.places {
		if at > maxPointer || !w.r.address(additional, at, w.list[i].Address, w.s.ttl) {
			return // what does not fit here the client can ask for
		}
	}
}

// target returns a name that stands for the registration's address and for no other: "<index>.NAME" if that does, else one made of the
// address in front of base, the name that was found. Where there is neither it is base, with all its addresses. alone: no other registration
// of the name has its index. A name may have thousands: what takes longer for that is not done for each.
func (w *worker) target(r *registration.Registration, base []byte, alone bool) registration.Name {
	if r.Index >= 0 && r.Name[0] != '*' {
		label := strconv.Itoa(r.Index) + "."
		name := r.Name
		if !strings.HasPrefix(string(name), label) { // emitters register "0.api" beside "api", with the same index
			name = registration.Name(label) + name
		}
		n, a := w.s.cfg.Table.Exact([]byte(name))
		if n == 1 && a == r.Address || n == 0 && alone && len(name) <= registration.MaxName {
			return name
		}
	}
	name := registration.Name(addressLabel(r.Address) + "." + string(base))
	if len(name) > registration.MaxName || w.exact([]byte(name)) { // the latter is what the table itself has
		return registration.Name(base)
	}
	return name
}
