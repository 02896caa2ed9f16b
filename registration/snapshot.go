package registration

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// A snapshot is
//
//	"silk names 1\n"
//	varint  when it was taken, in nanoseconds since 1970
//	for each name, sorted:
//	    uvarint length, name
//	    uvarint number of registrations, and of each, in the order in which they came:
//	        4 or 16 and as many bytes of address; uvarint port; varint index
//	        varint age in nanoseconds; varint updated in nanoseconds since 1970, 0 if it was not said
//	        uvarint length and text of endpoint, group and zone
//	uvarint 0
//	uvarint number of all registrations
//	4 bytes CRC-32C of all before, big endian
const snapshotMagic = "silk names 1\n"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode writes a snapshot of the table, taken at the time of day taken. Clock is the time by which registrations are Seen: a snapshot
// keeps their ages. Equal tables make equal snapshots. Lookups and changes go on meanwhile; each name is as it was at one instant.
func (t *Table) Encode(w io.Writer, taken, clock time.Time) error {
	sum := crc32.New(castagnoli)
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 32<<10)
	e := encoder{out: out, now: nanos(clock)}
	e.buf = append(e.buf, snapshotMagic...)
	e.buf = binary.AppendVarint(e.buf, nanos(taken))
	var list []entry
	for _, name := range t.Names() {
		if list = t.entries(list[:0], name); len(list) > 0 {
			e.name(name, list)
		}
		if err := e.flush(); err != nil {
			return fmt.Errorf("write snapshot of names: %w", err)
		}
	}
	e.buf = binary.AppendUvarint(e.buf, 0)
	e.buf = binary.AppendUvarint(e.buf, e.count)
	err := e.flush()
	if err == nil {
		err = out.Flush()
	}
	if err == nil {
		_, err = w.Write(sum.Sum(nil))
	}
	if err != nil {
		return fmt.Errorf("write snapshot of names: %w", err)
	}
	return nil
}

type encoder struct {
	out   *bufio.Writer
	buf   []byte
	now   int64
	count uint64
}

func (e *encoder) flush() error {
	_, err := e.out.Write(e.buf)
	e.buf = e.buf[:0]
	return err
}

func (e *encoder) name(name Name, list []entry) {
	e.buf = append(binary.AppendUvarint(e.buf, uint64(len(name))), name...)
	e.buf = binary.AppendUvarint(e.buf, uint64(len(list)))
	for i := range list {
		r := &list[i]
		if a := r.of.addr(); a.Is4() {
			b := a.As4()
			e.buf = append(append(e.buf, 4), b[:]...)
		} else {
			e.buf = append(append(e.buf, 16), r.of.address[:]...)
		}
		e.buf = binary.AppendUvarint(e.buf, uint64(r.port))
		e.buf = binary.AppendVarint(e.buf, int64(r.index))
		e.buf = binary.AppendVarint(e.buf, minus(e.now, r.seen))
		updated := r.updated
		if updated == unsaid {
			updated = 0
		}
		e.buf = binary.AppendVarint(e.buf, updated)
		for d := r.of.details; d != ""; {
			e.buf, d = appendCut(e.buf, d)
		}
		e.count++
	}
}

// entries appends the registrations of exactly this name.
func (t *Table) entries(dst []entry, name Name) []entry {
	s := t.shard(name)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return append(dst, s.nodes[name].list...)
}

// minus is a-b, or the nearest that there is.
func minus(a, b int64) int64 {
	switch d := a - b; {
	case a >= 0 && b < 0 && d < 0:
		return math.MaxInt64
	case a < 0 && b > 0 && d > 0:
		return math.MinInt64
	default:
		return d
	}
}

// Decode reads a snapshot into a new table, in which registrations are as old by clock as they were when it was taken, and returns when
// that was. What is no snapshot, not a whole one or another's is fault.Invalid, with the reason. Registrations outside of the ranges,
// which may have changed, are left out, and so is what the limits leave no room for.
func Decode(r io.Reader, l Limits, in Ranges, clock time.Time) (t *Table, taken time.Time, err error) {
	d := &decoder{in: bufio.NewReaderSize(r, 32<<10), sum: crc32.New(castagnoli), now: nanos(clock), table: NewTableOf(l), ranges: in}
	if taken, err = d.snapshot(); err != nil {
		switch {
		case d.broken:
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			err = fault.Invalidf("it ends early")
		case fault.Of(err) != fault.Invalid:
			err = fault.New(fault.Invalid, err)
		}
		return nil, time.Time{}, fmt.Errorf("read snapshot of names: %w", err)
	}
	return d.table, taken, nil
}

// decoder reads a snapshot; what it reads from in goes into sum.
type decoder struct {
	in     *bufio.Reader
	sum    hash.Hash32
	now    int64
	table  *Table
	ranges Ranges
	count  uint64
	broken bool // in cannot be read
	buf    [256]byte
}

func (d *decoder) snapshot() (time.Time, error) {
	if b, err := d.bytes(len(snapshotMagic)); err != nil {
		return time.Time{}, err
	} else if string(b) != snapshotMagic {
		return time.Time{}, fault.Invalidf("it begins with %q: expected %q", b, snapshotMagic)
	}
	taken, err := binary.ReadVarint(d)
	for last := Name(""); err == nil; {
		var s string
		if s, err = d.text(MaxName); err != nil || s == "" {
			break
		}
		name, bad := ParseName(s)
		if bad != nil || string(name) != s || name <= last {
			return time.Time{}, fault.Invalidf("name %.80q follows %.80q: expected names, sorted", s, last)
		}
		last = name
		err = d.registrations(name)
	}
	if err == nil {
		err = d.end()
	}
	if err != nil {
		return time.Time{}, err
	}
	return moment(taken), nil
}

// end reads what proves that all was read.
func (d *decoder) end() error {
	n, err := binary.ReadUvarint(d)
	if err != nil {
		return err
	}
	if n != d.count {
		return fault.Invalidf("it has %d registrations: expected %d", d.count, n)
	}
	want := d.sum.Sum32()
	b, err := d.bytes(4)
	if err != nil {
		return err
	}
	if got := binary.BigEndian.Uint32(b); got != want {
		return fault.Invalidf("its checksum is %08x: what was read has %08x", got, want)
	}
	if _, err := d.in.ReadByte(); err == nil {
		return fault.Invalidf("there is more after its end")
	} else if !errors.Is(err, io.EOF) {
		d.broken = true
		return err
	}
	return nil
}

func (d *decoder) registrations(name Name) error {
	n, err := binary.ReadUvarint(d)
	if err == nil && n == 0 {
		return fault.Invalidf("name %s has no registrations", name)
	}
	for ; n > 0 && err == nil; n-- {
		var r Registration
		if r, err = d.registration(name); err != nil {
			break
		}
		d.count++
		if d.ranges.Contains(r.Address) {
			if _, err = d.table.Add(r); errors.Is(err, fault.Exhausted) {
				err = nil
			}
		}
	}
	return err
}

func (d *decoder) registration(name Name) (Registration, error) {
	r := Registration{Name: name}
	size, err := d.ReadByte()
	if err == nil && size != 4 && size != 16 {
		err = fault.Invalidf("an address of %s has %d bytes: expected 4 or 16", name, size)
	}
	if err != nil {
		return r, err
	}
	b, err := d.bytes(int(size))
	if err != nil {
		return r, err
	}
	r.Address, _ = netip.AddrFromSlice(b)
	port, err1 := binary.ReadUvarint(d)
	index, err2 := binary.ReadVarint(d)
	age, err3 := binary.ReadVarint(d)
	updated, err4 := binary.ReadVarint(d)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return r, err
	}
	if port > math.MaxUint16 || index < -1 || index > math.MaxInt32 {
		return r, fault.Invalidf("%s at %v has port %d and index %d", name, r.Address, port, index)
	}
	r.Port, r.Index, r.Seen = uint16(port), int(index), moment(minus(d.now, max(age, 0)))
	if updated != 0 {
		r.Updated = moment(updated)
	}
	for _, s := range []*string{&r.Endpoint, &r.Group, &r.Zone} {
		if *s, err = d.text(MaxText); err != nil {
			return r, err
		}
	}
	return r, nil
}

// text reads a text of at most limit bytes.
func (d *decoder) text(limit int) (string, error) {
	n, err := binary.ReadUvarint(d)
	if err != nil {
		return "", err
	}
	if n > uint64(limit) {
		return "", fault.Invalidf("a text has %d bytes: expected at most %d", n, limit)
	}
	b, err := d.bytes(int(n))
	return string(b), err
}

// bytes reads n bytes, at most len(d.buf), which are there until the next call.
func (d *decoder) bytes(n int) ([]byte, error) {
	b := d.buf[:n]
	if _, err := io.ReadFull(d.in, b); err != nil {
		d.broken = !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF)
		return nil, err
	}
	d.sum.Write(b)
	return b, nil
}

// ReadByte implements io.ByteReader.
func (d *decoder) ReadByte() (byte, error) {
	b, err := d.bytes(1)
	if err != nil {
		return 0, err
	}
	return b[0], nil
}
