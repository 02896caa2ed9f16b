package dnsserver

import (
	"encoding/binary"
)

// Sizes of messages in bytes.
const (
	headerSize = 12
	minUDP     = 512  // what every client takes (RFC 1035 section 4.2.1)
	maxUDP     = 4096 // more than this is never sent by udp
	maxTCP     = 65535
	optSize    = 11 // of an OPT record without options
	maxName    = 255
	maxQuery   = 4096   // no question with its options comes near it
	maxPointer = 0x3fff // where a name can stand that is pointed to
)

// Types, classes, opcodes and flags (RFC 1035, 2782, 3596, 6891).
const (
	typeA     = 1
	typeNS    = 2
	typeSOA   = 6
	typePTR   = 12
	typeHINFO = 13
	typeTXT   = 16
	typeAAAA  = 28
	typeSRV   = 33
	typeOPT   = 41
	typeHTTPS = 65
	typeIXFR  = 251
	typeAXFR  = 252
	typeANY   = 255

	classIN = 1

	flagQR     = 1 << 15
	flagAA     = 1 << 10
	flagTC     = 1 << 9
	flagRD     = 1 << 8
	flagRA     = 1 << 7
	flagAD     = 1 << 5
	flagCD     = 1 << 4
	maskOpcode = 15 << 11

	flagDO = 1 << 15 // of the OPT record
)

// rcode is a response code with EDNS0's upper bits.
type rcode uint16

const (
	noError  rcode = 0
	formErr  rcode = 1
	servFail rcode = 2
	nxDomain rcode = 3
	notImp   rcode = 4
	refused  rcode = 5
	badVers  rcode = 16
)

// query is what a client asks.
type query struct {
	id    uint16
	flags uint16

	question []byte // as it was asked: name, type, class; part of the message. Empty when there is none that can be read
	typ      uint16
	class    uint16

	// key is the name in lower case with dots between its labels, none at its end; "" is the root. A dot within a label is 0xff, which no
	// name of the table has. A label begins at the same place in it and in the question.
	key  [maxName]byte
	size int // of key

	edns bool
	do   bool // the client wants DNSSEC's records
	udp  int  // most bytes that the client takes by udp
}

func (q *query) name() []byte { return q.key[:q.size] }

// parse reads a message. drop: it is not one to answer. Otherwise code is what is wrong with it, noError for a question that is to be
// answered.
func (q *query) parse(b []byte) (code rcode, drop bool) {
	q.question, q.edns, q.do, q.udp, q.size = nil, false, false, minUDP, 0
	if len(b) < headerSize {
		return 0, true
	}
	q.id, q.flags = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	if q.flags&flagQR != 0 {
		return 0, true
	}
	code = noError
	if q.flags&maskOpcode != 0 {
		code = notImp
	}
	at := headerSize
	if binary.BigEndian.Uint16(b[4:]) == 1 {
		if at = q.ask(b); at == 0 {
			return max(code, formErr), false
		}
	} else if code == noError {
		return formErr, false
	}
	if code != noError {
		return code, false
	}
	return q.rest(b, at), false
}

// ask reads the one question and returns where it ends, 0 when it cannot be read. A pointer in it would have nothing to point to.
func (q *query) ask(b []byte) int {
	at, n := headerSize, 0
	for {
		if at >= len(b) {
			return 0
		}
		l := int(b[at])
		at++
		if l == 0 {
			break
		}
		if l > 63 || at+l > len(b) || n+l+2 > maxName {
			return 0
		}
		if n > 0 {
			q.key[n-1] = '.'
		}
		for i, c := range b[at : at+l] {
			switch {
			case c >= 'A' && c <= 'Z':
				c += 'a' - 'A'
			case c == '.':
				c = 0xff
			}
			q.key[n+i] = c
		}
		at, n = at+l, n+l+1
	}
	if at+4 > len(b) {
		return 0
	}
	q.size = max(n-1, 0)
	q.typ, q.class = binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:])
	q.question = b[headerSize : at+4]
	return at + 4
}

// rest reads the records after the question, of which only OPT has a meaning. What comes after the last one is passed over.
func (q *query) rest(b []byte, at int) rcode {
	sections := [3]int{int(binary.BigEndian.Uint16(b[6:])), int(binary.BigEndian.Uint16(b[8:])), int(binary.BigEndian.Uint16(b[10:]))}
	code := noError
	for i, n := range sections {
		for range n {
			r, ok := readRecord(b, at)
			if !ok {
				return formErr
			}
			if r.typ == typeOPT {
				if i != 2 || q.edns || b[at] != 0 || !validOptions(b[r.data:r.end]) {
					return formErr
				}
				q.edns, q.do, q.udp = true, r.ttl&flagDO != 0, max(int(r.class), minUDP)
				if r.ttl>>16&0xff != 0 {
					code = badVers
				}
			}
			at = r.end
		}
	}
	return code
}

// record is where a resource record's parts are in a message.
type record struct {
	typ, class uint16
	ttl        uint32
	data, end  int
}

func readRecord(b []byte, at int) (r record, ok bool) {
	at = skipName(b, at)
	if at == 0 || at+10 > len(b) {
		return r, false
	}
	r.typ, r.class, r.ttl = binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:]), binary.BigEndian.Uint32(b[at+4:])
	r.data = at + 10
	r.end = r.data + int(binary.BigEndian.Uint16(b[at+8:]))
	return r, r.end <= len(b)
}

// skipName returns where the name at a place of a message ends, 0 when it does not.
func skipName(b []byte, at int) int {
	for at < len(b) {
		switch l := int(b[at]); {
		case l == 0:
			return at + 1
		case l >= 0xc0:
			if at+2 > len(b) {
				return 0
			}
			return at + 2
		case l > 63:
			return 0
		default:
			at += 1 + l
		}
	}
	return 0
}

// validOptions reports whether the options of an OPT record end where it does.
func validOptions(b []byte) bool {
	for len(b) >= 4 {
		l := int(binary.BigEndian.Uint16(b[2:]))
		if 4+l > len(b) {
			return false
		}
		b = b[4+l:]
	}
	return len(b) == 0
}

// wellFormed reports whether all the records that a message says it has can be read, those of the question included.
func wellFormed(b []byte) bool {
	at := headerSize
	for range int(binary.BigEndian.Uint16(b[4:])) {
		if at = skipName(b, at); at == 0 || at+4 > len(b) {
			return false
		}
		at += 4
	}
	for i := 6; i <= 10; i += 2 {
		for range int(binary.BigEndian.Uint16(b[i:])) {
			r, ok := readRecord(b, at)
			if !ok {
				return false
			}
			at = r.end
		}
	}
	return true
}
