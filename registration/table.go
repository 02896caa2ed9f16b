package registration

import (
	"iter"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Table is which names stand for which containers. Its methods may be called at the same time.
type Table struct {
	mu     sync.RWMutex
	byName map[Name][]Registration // in the order in which the addresses came; never empty, never changed in place
	count  int                     // of registrations
	turn   uint64
}

// NewTable returns an empty table.
func NewTable() *Table { return &Table{byName: map[Name][]Registration{}} }

// Register adds r, or refreshes the registration of the same name and address, and reports whether it is new.
func (t *Table) Register(r Registration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.byName[r.Name]
	list := make([]Registration, 0, len(was)+1)
	known := false
	for _, o := range was {
		if o.Address == r.Address {
			o, known = r, true
		}
		list = append(list, o)
	}
	if !known {
		list = append(list, r)
		t.count++
		t.turn++
	}
	t.byName[r.Name] = list
	return !known
}

// Unregister removes the registration of a name and an address, and reports whether there was one.
func (t *Table) Unregister(name Name, a netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.keep(name, func(r Registration) bool { return r.Address != a })
}

// Prune removes what was told of last before limit and returns how many registrations that were.
func (t *Table) Prune(limit time.Time) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.count
	for name := range t.byName {
		t.keep(name, func(r Registration) bool { return !r.Seen.Before(limit) })
	}
	return before - t.count
}

// keep leaves of a name what wanted says, and reports whether something went. mu is held.
func (t *Table) keep(name Name, wanted func(Registration) bool) bool {
	was := t.byName[name]
	var list []Registration
	for _, r := range was {
		if wanted(r) {
			list = append(list, r)
		}
	}
	if len(list) == len(was) {
		return false
	}
	t.count -= len(was) - len(list)
	t.turn++
	if t.byName[name] = list; len(list) == 0 {
		delete(t.byName, name)
	}
	return true
}

// Lookup returns the registrations of a name in the order in which their addresses came, and whether the name is there. It is the name itself, or an instance
// "<index>.<name>" of one, or covered by a wildcard; the first of these counts. The caller
// must not change what is returned.
func (t *Table) Lookup(name Name) ([]Registration, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if list, ok := t.byName[name]; ok {
		return list, true
	}
	first, rest, ok := strings.Cut(string(name), ".")
	if !ok {
		return nil, false
	}
	if index, err := strconv.Atoi(first); err == nil && index >= 0 && strconv.Itoa(index) == first {
		var one []Registration
		for _, r := range t.byName[Name(rest)] {
			if r.Index == index {
				one = append(one, r)
			}
		}
		if one != nil {
			return one, true
		}
	}
	for ; ok; _, rest, ok = strings.Cut(rest, ".") {
		if list, found := t.byName[Name("*."+rest)]; found {
			return list, true
		}
	}
	return nil, false
}

// All returns every name with its registrations, in no order. The table may not be changed meanwhile by the one who reads.
func (t *Table) All() iter.Seq2[Name, []Registration] {
	return func(yield func(Name, []Registration) bool) {
		t.mu.RLock()
		defer t.mu.RUnlock()
		for name, list := range t.byName {
			if !yield(name, list) {
				return
			}
		}
	}
}

// Len returns how many names and how many registrations there are.
func (t *Table) Len() (names, registrations int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byName), t.count
}

// Turn returns a number that changes whenever a registration comes or goes, not when one is refreshed.
func (t *Table) Turn() uint64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.turn
}
