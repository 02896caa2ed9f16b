package dnsserver

import (
	"encoding/binary"
	"net/netip"

	"code.cloudfoundry.org/silk/registration"
)

// sections of a message in which records stand.
const (
	answers = iota
	authority
	additional
)

// reply is an answer that is being written. Records are there whole or not at all.
type reply struct {
	b     []byte
	limit int // of b, with room for the OPT record
	n     [3]uint16
	edns  bool
	do    bool // the client's flag
}

// begin writes the header and the question, into b's memory. limit is the most bytes that the client takes.
func (r *reply) begin(b []byte, q *query, limit int) {
	*r = reply{b: b[:0], limit: limit, edns: q.edns, do: q.do}
	if r.edns {
		r.limit -= optSize
	}
	r.b = append(r.b, make([]byte, headerSize)...)
	binary.BigEndian.PutUint16(r.b, q.id)
	binary.BigEndian.PutUint16(r.b[2:], flagQR|q.flags&(maskOpcode|flagRD))
	if len(q.question) > 0 {
		r.b[5] = 1
		r.b = append(r.b, q.question...)
	}
}

// set adds flags.
func (r *reply) set(flags uint16) {
	binary.BigEndian.PutUint16(r.b[2:], binary.BigEndian.Uint16(r.b[2:])|flags)
}

// end writes what depends on the rest, and returns the message. udp is how much the server takes.
func (r *reply) end(code rcode, udp int) []byte {
	r.set(uint16(code & 15))
	if r.edns { // there is room: begin has kept it
		r.b = append(r.b, 0, 0, typeOPT, byte(udp>>8), byte(udp), byte(code>>4), 0, 0, 0, 0, 0)
		if r.do { // goes back as it came (RFC 3225 section 3)
			r.b[len(r.b)-4] = flagDO >> 8
		}
		r.n[additional]++
	}
	for i, n := range r.n {
		binary.BigEndian.PutUint16(r.b[6+2*i:], n)
	}
	return r.b
}

// keep counts the record that begins at from, or takes it away when it is too much, and reports which.
func (r *reply) keep(section, from int) bool {
	if len(r.b) > r.limit || r.n[section] == 0xffff {
		r.b = r.b[:from]
		return false
	}
	r.n[section]++
	return true
}

// start writes a record's owner, which stands at a place in the message, its type and TTL, and returns where the record begins.
func (r *reply) start(owner int, typ uint16, ttl uint32) (from int) {
	from = len(r.b)
	r.b = append(r.b, 0xc0|byte(owner>>8), byte(owner))
	r.fixed(typ, ttl)
	return from
}

func (r *reply) fixed(typ uint16, ttl uint32) {
	r.b = append(r.b, byte(typ>>8), byte(typ), 0, classIN, byte(ttl>>24), byte(ttl>>16), byte(ttl>>8), byte(ttl), 0, 0)
}

// data ends the record whose data begin at from.
func (r *reply) data(from int) { binary.BigEndian.PutUint16(r.b[from-2:], uint16(len(r.b)-from)) }

// address writes the A or AAAA record of an owner that stands at a place in the message.
func (r *reply) address(section, owner int, a netip.Addr, ttl uint32) bool {
	if a.Is4() {
		from := r.start(owner, typeA, ttl)
		v := a.As4()
		r.b = append(r.b, v[:]...)
		r.b[len(r.b)-5] = 4
		return r.keep(section, from)
	}
	from := r.start(owner, typeAAAA, ttl)
	v := a.As16()
	r.b = append(r.b, v[:]...)
	r.b[len(r.b)-17] = 16
	return r.keep(section, from)
}

// soa writes the start of authority of the zone that stands at a place in the message. What its last number says, that a name that is not
// there may be remembered for that long, is the TTL of all answers.
func (r *reply) soa(section, zone int, serial, ttl uint32) bool {
	from := r.start(zone, typeSOA, ttl)
	at := len(r.b)
	r.label("ns", zone)
	r.label("hostmaster", zone)
	for _, v := range []uint32{serial, 3600, 600, 86400, ttl} {
		r.b = binary.BigEndian.AppendUint32(r.b, v)
	}
	r.data(at)
	return r.keep(section, from)
}

func (r *reply) ns(section, zone int, ttl uint32) bool {
	from := r.start(zone, typeNS, ttl)
	at := len(r.b)
	r.label("ns", zone)
	r.data(at)
	return r.keep(section, from)
}

// label writes a name: a label in front of what stands at a place in the message.
func (r *reply) label(l string, at int) {
	r.b = append(append(r.b, byte(len(l))), l...)
	r.b = append(r.b, 0xc0|byte(at>>8), byte(at))
}

// hinfo writes what is answered to a question for all types (RFC 8482 section 4.2).
func (r *reply) hinfo(owner int, ttl uint32) bool {
	from := r.start(owner, typeHINFO, ttl)
	at := len(r.b)
	r.b = append(append(r.b, 7), "RFC8482"...)
	r.b = append(r.b, 0)
	r.data(at)
	return r.keep(answers, from)
}

func (r *reply) ptr(owner int, name registration.Name, ttl uint32) bool {
	from := r.start(owner, typePTR, ttl)
	at := len(r.b)
	r.name(name)
	r.data(at)
	return r.keep(answers, from)
}

// srv writes the SRV record of what is asked for and returns where its target stands in the message.
func (r *reply) srv(port uint16, target registration.Name, ttl uint32) (at int, ok bool) {
	from := r.start(headerSize, typeSRV, ttl)
	data := len(r.b)
	r.b = append(r.b, 0, 0, 0, 0, byte(port>>8), byte(port)) // all of the same priority and without weights
	r.name(target)                                           // never compressed (RFC 2782)
	r.data(data)
	return data + 6, r.keep(answers, from)
}

// name writes a whole name.
func (r *reply) name(n registration.Name) {
	for len(n) > 0 {
		l := 0
		for l < len(n) && n[l] != '.' {
			l++
		}
		r.b = append(append(r.b, byte(l)), n[:l]...)
		n = n[min(l+1, len(n)):]
	}
	r.b = append(r.b, 0)
}
