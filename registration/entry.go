package registration

import (
	"encoding/binary"
	"iter"
	"math"
	"net/netip"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// MaxText bounds an endpoint's id, its zone and its group, in bytes each.
const MaxText = 200

// What a registration, and a name or one above it, are counted for in Limits.Bytes, without their texts: a little more than was measured
// (TestMemory).
const (
	entrySize = 175
	nodeSize  = 85
)

// entry is a registration as a table keeps it. Large deployments have hundreds of thousands.
type entry struct {
	of      *told
	seen    int64 // nanos
	updated int64 // nanos
	index   int32
	port    uint16
}

// told is what is known of an address whatever it is called by. It is never changed: names share it.
type told struct {
	address [16]byte // a netip.Addr has 24
	details string   // appendDetails
}

func (d *told) addr() netip.Addr { return netip.AddrFrom16(d.address).Unmap() }

// find returns where a registration of an address is, or -1.
func (n *node) find(a netip.Addr) int {
	b := a.As16()
	for i := range n.list {
		if n.list[i].of.address == b {
			return i
		}
	}
	return -1
}

func (e *entry) registration(name Name) Registration {
	r := Registration{Name: name, Address: e.of.addr(), Port: e.port, Index: int(e.index), Updated: moment(e.updated), Seen: moment(e.seen)}
	d := e.of.details
	r.Endpoint, d = cutText(d)
	r.Group, d = cutText(d)
	r.Zone, _ = cutText(d)
	return r
}

func (r *Registration) validate() error {
	switch {
	case r.Name == "" || len(r.Name) > MaxName:
		return fault.Invalidf("registration of a name of %d bytes: expected 1 to %d", len(r.Name), MaxName)
	case !r.Address.IsValid() || r.Address.Zone() != "":
		return fault.Invalidf("registration of %s at %v: expected an address without a zone", r.Name, r.Address)
	case max(len(r.Endpoint), len(r.Group), len(r.Zone)) > MaxText:
		return fault.Invalidf("registration of %s at %v: endpoint, group or zone has more than %d bytes", r.Name, r.Address, MaxText)
	}
	return nil
}

// above returns the names that n stands below, the nearest first.
func above(n Name) iter.Seq[Name] {
	return func(yield func(Name) bool) {
		for _, rest, ok := strings.Cut(string(n), "."); ok; _, rest, ok = strings.Cut(rest, ".") {
			if !yield(Name(rest)) {
				return
			}
		}
	}
}

// unsaid is the zero time in nanos.
const unsaid = math.MinInt64

// nanos is a time as a table keeps it: nanoseconds since 1970 as far as 64 bits go. The zero time is before all others.
func nanos(t time.Time) int64 {
	switch {
	case t.IsZero(), t.Year() < 1700:
		return unsaid
	case t.Year() > 2200:
		return math.MaxInt64
	}
	return t.UnixNano()
}

func moment(n int64) time.Time {
	if n == unsaid {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// narrow is an index as a table keeps it; one that does not fit is not said.
func narrow(index int) int32 {
	if index < 0 || index > math.MaxInt32 {
		return -1
	}
	return int32(index)
}

// detailsSpace is enough for three UUIDs or other texts of that kind.
const detailsSpace = 128

// isUUID before a text in details says that it is a UUID in 16 bytes; other numbers are the length of a text.
const isUUID = 255

// appendDetails appends the endpoint, the group and the zone of r. Endpoints and groups of large deployments are UUIDs, which take less
// than half so.
func appendDetails(b []byte, r *Registration) []byte {
	return appendText(appendText(appendText(b, r.Endpoint), r.Group), r.Zone)
}

func appendText(b []byte, s string) []byte {
	if id, ok := parseUUID(s); ok {
		return append(append(b, isUUID), id[:]...)
	}
	return append(append(b, byte(len(s))), s...)
}

func cutText(d string) (text, rest string) {
	if d[0] == isUUID {
		var b [uuidText]byte
		return string(appendUUID(b[:0], d[1:17])), d[17:]
	}
	n := 1 + int(d[0])
	return d[1:n], d[n:]
}

// appendCut is cutText for a snapshot: it appends the length of the text and the text.
func appendCut(b []byte, d string) (appended []byte, rest string) {
	if d[0] == isUUID {
		return appendUUID(append(b, uuidText), d[1:17]), d[17:]
	}
	n := 1 + int(d[0])
	return append(binary.AppendUvarint(b, uint64(n-1)), d[1:n]...), d[n:]
}

// uuidText is how long a UUID is in writing.
const uuidText = 36

// parseUUID reads the one form of a UUID that appendUUID writes.
func parseUUID(s string) (id [16]byte, ok bool) {
	if len(s) != uuidText || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, false
	}
	n := 0
	for i := 0; i < len(s); i++ {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			continue
		}
		var v byte
		switch c := s[i]; {
		case c >= '0' && c <= '9':
			v = c - '0'
		case c >= 'a' && c <= 'f':
			v = c - 'a' + 10
		default:
			return id, false
		}
		id[n/2] = id[n/2]<<4 | v
		n++
	}
	return id, true
}

func appendUUID(b []byte, id string) []byte {
	const digits = "0123456789abcdef"
	for i := range 16 {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			b = append(b, '-')
		}
		b = append(b, digits[id[i]>>4], digits[id[i]&15])
	}
	return b
}
