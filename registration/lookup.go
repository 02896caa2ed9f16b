package registration

import (
	"bytes"
	"hash/maphash"
	"net/netip"
	"slices"
	"strconv"
)

// Standing is whether a name is there.
type Standing uint8

// What can be said of a name.
const (
	Absent  Standing = iota // neither it nor a name below it: NXDOMAIN
	Above                   // it has no registrations, a name below it has: NOERROR without data (RFC 8020)
	Present                 // it has registrations
)

// String returns the word.
func (s Standing) String() string { return [...]string{"absent", "above", "present"}[s] }

// AppendAddrs appends the addresses of a name to dst, in the order in which they came, and says whether the name is there. The name is in
// lower case, without the final dot. It stands for what Lookup says. Nothing is allocated but for room in dst; any number of goroutines
// may look up at once.
func (t *Table) AppendAddrs(dst []netip.Addr, name []byte) ([]netip.Addr, Standing) {
	f := found{addrs: dst}
	st := t.look(name, &f)
	return f.addrs, st
}

// AppendRegistrations is AppendAddrs for those who want more than addresses. It allocates for texts.
func (t *Table) AppendRegistrations(dst []Registration, name []byte) ([]Registration, Standing) {
	f := found{whole: true, list: dst}
	st := t.look(name, &f)
	return f.list, st
}

// Exact returns how many registrations the name itself has, instances of another one and wildcards left out, and the address of the first. The name is as
// for AppendAddrs; the time does not depend on what it has.
func (t *Table) Exact(name []byte) (registrations int, first netip.Addr) {
	s := t.part(name)
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := s.nodes[Name(name)].list
	if len(list) > 0 {
		first = list[0].of.addr()
	}
	return len(list), first
}

// Lookup returns the registrations of a name in the order in which their addresses came, and whether there are any. It is the name
// itself, or else an instance "<index>.<name>" of one, or else covered by a wildcard: by that of the nearest name above it that is there
// at all, as RFC 4592 has it. What is returned is the caller's.
func (t *Table) Lookup(name Name) ([]Registration, bool) {
	if len(name) > MaxName {
		return nil, false
	}
	var space [MaxName]byte
	list, st := t.AppendRegistrations(nil, append(space[:0], name...))
	return list, st == Present
}

// Standing says whether a name is there.
func (t *Table) Standing(name []byte) Standing {
	var space [1]netip.Addr
	f := found{addrs: space[:0], none: true}
	return t.look(name, &f)
}

// NamesOf returns the names that stand for an address, in the order in which they came.
func (t *Table) NamesOf(a netip.Addr) []Name {
	if !a.IsValid() || a.Zone() != "" {
		return nil
	}
	t.hostsMu.RLock()
	defer t.hostsMu.RUnlock()
	h := t.hosts[a.As16()]
	return h.list()
}

// At returns what is registered at an address, in the order in which its names came.
func (t *Table) At(a netip.Addr) []Registration {
	names := t.NamesOf(a)
	list := make([]Registration, 0, len(names))
	for _, name := range names {
		if r, ok := t.of(name, a.Unmap()); ok {
			list = append(list, r)
		}
	}
	return list
}

// of returns the registration of a name at an address.
func (t *Table) of(name Name, a netip.Addr) (Registration, bool) {
	s := t.shard(name)
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := s.nodes[name]
	i := n.find(a)
	if i < 0 { // it went meanwhile
		return Registration{}, false
	}
	return n.list[i].registration(name), true
}

// found is what a lookup has found: addresses, or whole registrations, or nothing but that there are some.
type found struct {
	whole, none bool
	addrs       []netip.Addr
	list        []Registration
}

// anyInstance is no index.
const anyInstance = -1

func (t *Table) look(name []byte, f *found) Standing {
	if len(name) == 0 || len(name) > MaxName {
		return Absent
	}
	has, there := t.gather(name, anyInstance, f)
	if has {
		return Present
	}
	first, rest, ok := bytes.Cut(name, []byte{'.'})
	if !ok {
		return absentUnless(there)
	}
	if index, isIndex := instance(first); isIndex {
		if has, _ := t.gather(rest, index, f); has {
			return Present
		}
	}
	if there {
		return Above
	}
	var space [MaxName + 2]byte
	for ; ok; _, rest, ok = bytes.Cut(rest, []byte{'.'}) {
		if !t.there(rest) {
			continue
		}
		if has, _ := t.gather(append(append(space[:0], '*', '.'), rest...), anyInstance, f); has {
			return Present
		}
		break
	}
	return Absent
}

func absentUnless(there bool) Standing {
	if there {
		return Above
	}
	return Absent
}

// instance reads an index in its one form.
func instance(label []byte) (index int32, ok bool) {
	if len(label) == 0 || len(label) > 10 || label[0] == '0' && len(label) > 1 {
		return 0, false
	}
	for _, c := range label {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(string(label), 10, 32)
	return int32(n), err == nil
}

func (t *Table) part(name []byte) *shard { return &t.shards[maphash.Bytes(t.seed, name)%shards] }

// there reports whether a name has registrations or names below it.
func (t *Table) there(name []byte) bool {
	s := t.part(name)
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.nodes[Name(name)]
	return ok
}

// gather takes the registrations of exactly this name, of one instance if index is not anyInstance, and reports whether it has any and
// whether it is there at all.
func (t *Table) gather(name []byte, index int32, f *found) (has, there bool) {
	s := t.part(name)
	s.mu.RLock()
	defer s.mu.RUnlock()
	n, there := s.nodes[Name(name)]
	switch {
	case index != anyInstance || f.none:
	case f.whole:
		f.list = slices.Grow(f.list, len(n.list))
	default:
		f.addrs = slices.Grow(f.addrs, len(n.list))
	}
	for i := range n.list {
		e := &n.list[i]
		if index != anyInstance && e.index != index {
			continue
		}
		has = true
		switch {
		case f.none:
			return has, there
		case f.whole:
			f.list = append(f.list, e.registration(Name(name)))
		default:
			f.addrs = append(f.addrs, e.of.addr())
		}
	}
	return has, there
}
