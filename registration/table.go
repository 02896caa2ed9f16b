package registration

import (
	"hash/maphash"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// Limits bound a table, so that no source can fill the memory of who keeps it. Zero values mean the defaults.
type Limits struct {
	Registrations int // in all; default 500,000
	PerName       int // of one name; default 4,096
	Bytes         int // of memory, about, as Table.Size counts it; default 128 MiB
}

func (l Limits) orDefaults() Limits {
	for _, v := range []struct {
		limit *int
		value int
	}{{&l.Registrations, 500_000}, {&l.PerName, 4096}, {&l.Bytes, 128 << 20}} {
		if *v.limit <= 0 {
			*v.limit = v.value
		}
	}
	return l
}

// shards is how many parts the names are in. One who changes a part keeps readers out of that part alone, and for the time of one
// assignment.
const shards = 256

// Table is which names stand for which containers. Its methods may be called at the same time; those that look names up do not wait for each
// other, and hardly for one that changes the table.
type Table struct {
	limits Limits
	seed   maphash.Seed
	names  atomic.Int64
	count  atomic.Int64 // of registrations
	size   atomic.Int64 // bytes, about
	turn   atomic.Uint64

	// mu is held by who changes the table. He also takes the locks of what he changes, for those who read; he himself reads without them.
	mu     sync.Mutex
	shards [shards]shard

	hostsMu sync.RWMutex
	hosts   map[[16]byte]host
}

type shard struct {
	mu    sync.RWMutex
	nodes map[Name]node
}

// node is a name that has registrations, or names below it, or both.
type node struct {
	list  []entry // in the order in which the addresses came
	below int32   // names with registrations below this one
}

// NewTable returns an empty table with the default Limits.
func NewTable() *Table { return NewTableOf(Limits{}) }

// NewTableOf returns an empty table with limits of the caller's.
func NewTableOf(l Limits) *Table {
	t := &Table{limits: l.orDefaults(), seed: maphash.MakeSeed(), hosts: map[[16]byte]host{}}
	for i := range t.shards {
		t.shards[i].nodes = map[Name]node{}
	}
	return t
}

func (t *Table) shard(name Name) *shard {
	return &t.shards[maphash.String(t.seed, string(name))%shards]
}

// Register is Add for callers that need no reason: it reports whether r is new, which what was refused is not.
func (t *Table) Register(r Registration) bool {
	isNew, err := t.Add(r)
	return isNew && err == nil
}

// Add adds r, or refreshes the registration of the same name and address, and reports whether it is new. What cannot be a registration is
// fault.Invalid, what does not fit into the table's Limits fault.Exhausted; the table is then as before, except that what is there already is
// refreshed in all but longer texts for which there is no room.
func (t *Table) Add(r Registration) (isNew bool, err error) {
	r.Address = r.Address.Unmap()
	if err := r.validate(); err != nil {
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shard(r.Name)
	n := s.nodes[r.Name]
	if i := n.find(r.Address); i >= 0 {
		return false, t.refresh(s, &n.list[i], &r)
	}
	var space [detailsSpace]byte
	d := appendDetails(space[:0], &r)
	if err := t.room(&r, &n, len(d)); err != nil {
		return false, err
	}
	t.insert(s, r, d)
	return true, nil
}

// room says, as fault.Exhausted, what keeps a registration out. mu is held.
func (t *Table) room(r *Registration, n *node, details int) error {
	switch l := t.limits; {
	case len(n.list) >= l.PerName:
		return fault.Exhaustedf("name %s has %d registrations, which is the limit: %v is left out", r.Name, l.PerName, r.Address)
	case int(t.count.Load()) >= l.Registrations:
		return fault.Exhaustedf("table has %d registrations, which is the limit: %s at %v is left out", l.Registrations, r.Name, r.Address)
	case int(t.size.Load())+entrySize+details+t.newNodes(r.Name) > l.Bytes:
		return fault.Exhaustedf("table takes %d bytes and may take %d: %s at %v is left out", t.size.Load(), l.Bytes, r.Name, r.Address)
	}
	return nil
}

// newNodes returns how many bytes it takes to know a name and those above it, if they are not known. mu is held.
func (t *Table) newNodes(name Name) int {
	if n, ok := t.shard(name).nodes[name]; ok && len(n.list) > 0 {
		return 0
	}
	size := nodeSize + len(name)
	for above := range above(name) {
		if _, ok := t.shard(above).nodes[above]; !ok {
			size += nodeSize
		}
	}
	return size
}

// refresh lets e say what r says, as far as there is room. mu is held.
func (t *Table) refresh(s *shard, e *entry, r *Registration) (err error) {
	now := *e
	now.seen, now.updated, now.port, now.index = nanos(r.Seen), nanos(r.Updated), r.Port, narrow(r.Index)
	var space [detailsSpace]byte
	if d := appendDetails(space[:0], r); string(d) != e.of.details {
		if more := len(d) - len(e.of.details); more > 0 && int(t.size.Load())+more > t.limits.Bytes {
			err = fault.Exhaustedf("table takes %d bytes and may take %d: endpoint, group and zone of %s at %v stay as they were", t.size.Load(), t.limits.Bytes, r.Name, r.Address)
		} else {
			now.of = t.told(r.Address, d)
			t.size.Add(int64(more))
		}
	}
	changed := now.of != e.of || now.port != e.port || now.index != e.index
	s.mu.Lock()
	*e = now
	s.mu.Unlock()
	if changed {
		t.turn.Add(1)
	}
	return err
}

// told returns what is known of an address with the details d, from another of its names if that says the same. mu is held.
func (t *Table) told(a netip.Addr, d []byte) *told {
	h, known := t.hosts[a.As16()]
	if known && h.told.details == string(d) {
		return h.told
	}
	n := &told{address: a.As16(), details: string(d)}
	if known {
		h.told = n
		t.hostsMu.Lock()
		t.hosts[n.address] = h
		t.hostsMu.Unlock()
	}
	return n
}

// insert adds what is not there, the names above first: who finds a name finds those. mu is held.
func (t *Table) insert(s *shard, r Registration, d []byte) {
	n := s.nodes[r.Name]
	if len(n.list) == 0 {
		r.Name = Name(strings.Clone(string(r.Name))) // it came as part of a message
		for above := range above(r.Name) {
			t.alter(above, 1)
		}
		t.names.Add(1)
		t.size.Add(int64(len(r.Name)))
	} else {
		r.Name = t.kept(n, r.Name)
	}
	of := t.told(r.Address, d)
	n.list = append(n.list, entry{of: of, seen: nanos(r.Seen), updated: nanos(r.Updated), port: r.Port, index: narrow(r.Index)})
	t.store(s, r.Name, n)
	h := t.hosts[of.address]
	h.told = of
	h.add(r.Name)
	t.hostsMu.Lock()
	t.hosts[of.address] = h
	t.hostsMu.Unlock()
	t.count.Add(1)
	t.size.Add(int64(entrySize + len(of.details)))
	t.turn.Add(1)
}

// kept returns the text of a name that is kept already for one of its registrations. mu is held.
func (t *Table) kept(n node, name Name) Name {
	h := t.hosts[n.list[0].of.address]
	if i := h.find(name); i >= 0 {
		return h.names[i]
	}
	return name
}

// alter counts names below a name. mu is held.
func (t *Table) alter(name Name, by int32) {
	s := t.shard(name)
	n := s.nodes[name]
	n.below += by
	t.store(s, name, n)
}

// store keeps a node, or forgets it if nothing is left of it. mu is held.
func (t *Table) store(s *shard, name Name, n node) {
	before := len(s.nodes)
	s.mu.Lock()
	if len(n.list) == 0 && n.below == 0 {
		delete(s.nodes, name)
	} else {
		s.nodes[name] = n
	}
	s.mu.Unlock()
	t.size.Add(int64(len(s.nodes)-before) * nodeSize)
}

// Unregister removes the registration of a name and an address, and reports whether there was one. The zero address is that of none.
func (t *Table) Unregister(name Name, a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.shard(name)
	n := s.nodes[name]
	i := n.find(a.Unmap())
	if i < 0 {
		return false
	}
	t.remove(s, name, func(e *entry) bool { return e == &n.list[i] })
	return true
}

// Prune removes what was told of last before limit and returns how many registrations that were. Lookups go on meanwhile. Freshness says
// what the limit is, and when.
func (t *Table) Prune(limit time.Time) int {
	old := nanos(limit)
	return t.removeAll(func(e *entry) bool { return e.seen < old })
}

// RemoveOutside removes what is registered at addresses that are not in r, and returns how many registrations that were.
func (t *Table) RemoveOutside(r Ranges) int {
	return t.removeAll(func(e *entry) bool { return !r.Contains(e.of.addr()) })
}

func (t *Table) removeAll(gone func(*entry) bool) int {
	removed := 0
	for i := range t.shards {
		removed += t.removeFrom(&t.shards[i], gone)
	}
	return removed
}

func (t *Table) removeFrom(s *shard, gone func(*entry) bool) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	var hit []Name // a node that is forgotten takes another with it, maybe out of this map
	for name, n := range s.nodes {
		for i := range n.list {
			if gone(&n.list[i]) {
				hit = append(hit, name)
				break
			}
		}
	}
	removed := 0
	for _, name := range hit {
		removed += t.remove(s, name, gone)
	}
	return removed
}

// remove takes registrations from a name, and forgets the name with its last one. mu is held.
func (t *Table) remove(s *shard, name Name, gone func(*entry) bool) int {
	n := s.nodes[name]
	left := make([]entry, 0, len(n.list))
	for i := range n.list {
		e := &n.list[i]
		if !gone(e) {
			left = append(left, *e)
			continue
		}
		t.size.Add(-int64(entrySize + len(e.of.details)))
		t.forget(e.of.address, name)
	}
	removed := len(n.list) - len(left)
	if n.list = left; len(left) == 0 {
		n.list = nil
		t.names.Add(-1)
		t.size.Add(-int64(len(name)))
	}
	t.store(s, name, n)
	if len(left) == 0 {
		for above := range above(name) {
			t.alter(above, -1)
		}
	}
	t.count.Add(-int64(removed))
	t.turn.Add(1)
	return removed
}

// forget takes a name from an address, and the address with its last name. mu is held.
func (t *Table) forget(address [16]byte, name Name) {
	t.hostsMu.Lock()
	defer t.hostsMu.Unlock()
	h := t.hosts[address]
	if h.remove(name); h.empty() {
		delete(t.hosts, address)
	} else {
		t.hosts[address] = h
	}
}

// Len returns how many names and how many registrations there are.
func (t *Table) Len() (names, registrations int) { return int(t.names.Load()), int(t.count.Load()) }

// Size returns about how many bytes of memory the registrations take.
func (t *Table) Size() int { return int(t.size.Load()) }

// Turn returns a number that changes whenever a registration comes, goes or says something else, not when one is refreshed.
func (t *Table) Turn() uint64 { return t.turn.Load() }

// All returns every name with its registrations, in no order. Nothing is locked while the caller is at work: he may change the table;
// what comes or goes meanwhile may be told of or not.
func (t *Table) All() iter.Seq2[Name, []Registration] {
	return func(yield func(Name, []Registration) bool) {
		for i := range t.shards {
			for _, list := range t.shards[i].copied() {
				if !yield(list[0].Name, list) {
					return
				}
			}
		}
	}
}

func (s *shard) copied() [][]Registration {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([][]Registration, 0, len(s.nodes))
	for name, n := range s.nodes {
		if len(n.list) == 0 {
			continue
		}
		list := make([]Registration, 0, len(n.list))
		for i := range n.list {
			list = append(list, n.list[i].registration(name))
		}
		all = append(all, list)
	}
	return all
}

// Names returns the names that have registrations, sorted.
func (t *Table) Names() []Name {
	names, _ := t.Len()
	list := make([]Name, 0, names)
	for i := range t.shards {
		list = t.shards[i].appendNames(list)
	}
	slices.Sort(list)
	return list
}

func (s *shard) appendNames(list []Name) []Name {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for name, n := range s.nodes {
		if len(n.list) > 0 {
			list = append(list, name)
		}
	}
	return list
}

// Addresses returns every name with its addresses, in the order in which they came, sorted by name. Nothing is locked while the caller is
// at work, who must not keep the addresses. What comes meanwhile is not told of, what goes may be.
func (t *Table) Addresses() iter.Seq2[Name, []netip.Addr] {
	return func(yield func(Name, []netip.Addr) bool) {
		var list []entry
		var addrs []netip.Addr
		for _, name := range t.Names() {
			list, addrs = t.entries(list[:0], name), addrs[:0]
			for i := range list {
				addrs = append(addrs, list[i].of.addr())
			}
			if len(addrs) > 0 && !yield(name, addrs) {
				return
			}
		}
	}
}
