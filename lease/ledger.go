package lease

import (
	"container/heap"
	"encoding/binary"
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// State is what a registry last made known of a subnet.
type State uint8

// The states. A subnet that is not in a Ledger was never used, as far as is remembered.
const (
	Active  State = iota // leased
	Expired              // still its host's, but not renewed in time: not listed, and given to another host only when nothing else is left
	Free                 // was leased once
)

// Entry is one subnet of a Ledger. For a Free one, the lease is the last that held it.
type Entry struct {
	Lease
	State   State
	FreedAt int64  // seconds since 1970 by the registry's clock, of a Free one
	Changed uint64 // the counter of the revision that brought the entry
}

// Ledger knows every subnet that is or was leased, and finds a free one without looking at the whole pool. It is an index of what
// a registry's store holds, not the store itself, and serves one goroutine. What was done since Begin can be undone.
type Ledger struct {
	pool    Pool
	entries map[netip.Prefix]Entry
	held    map[netip.Addr]netip.Prefix // by host: what is Active or Expired
	lengths [33]int                     // number of held subnets of each prefix length
	inside  map[netip.Prefix]int        // by block of the pool: number of held subnets strictly inside it
	active  int                         // number of Active entries
	members [2]uint64                   // by kind: members of the pool that are held
	known   [2]uint64                   // by kind: members of the pool that have an entry
	freed   [2]freeQueue                // by kind: members that are Free; may hold outdated items as well
	cursor  [2]uint64                   // by kind: members below it have an entry or overlap a held subnet
	blocked map[netip.Prefix]bool       // what the store refused for a reason that is not known, or holds in rows that are no leases
	undo    []undo
	log     bool
	changes []Entry // what Changes returned, until something is changed again
}

type undo struct {
	subnet netip.Prefix
	was    Entry
	there  bool
}

// NewLedger returns an empty ledger.
func NewLedger(p Pool) *Ledger {
	return &Ledger{pool: p, entries: map[netip.Prefix]Entry{}, held: map[netip.Addr]netip.Prefix{}, inside: map[netip.Prefix]int{}, blocked: map[netip.Prefix]bool{}}
}

// Active returns how many leases are Active.
func (g *Ledger) Active() int { return g.active }

// Len returns the number of entries.
func (g *Ledger) Len() int { return len(g.entries) }

// All yields the entries in no particular order.
func (g *Ledger) All() iter.Seq[Entry] { return maps.Values(g.entries) }

// At returns the entry of a subnet.
func (g *Ledger) At(subnet netip.Prefix) (Entry, bool) {
	e, ok := g.entries[subnet]
	return e, ok
}

// Of returns the entry that a host holds.
func (g *Ledger) Of(host netip.Addr) (Entry, bool) {
	p, ok := g.held[host]
	return g.entries[p], ok
}

// Held returns how many members of a kind are Active or Expired.
func (g *Ledger) Held(k Kind) uint64 { return g.members[k] }

// Set puts e in the place of what is known of its subnet.
func (g *Ledger) Set(e Entry) {
	was, there := g.remember(e.Subnet)
	if there {
		g.drop(was)
	}
	g.entries[e.Subnet] = e
	k, i, member := g.pool.Index(e.Subnet)
	if member && !there {
		g.known[k]++
	}
	if e.State == Free {
		if member {
			g.queue(k, freeItem{e.FreedAt, i})
		}
		return
	}
	if e.State == Active {
		g.active++
	}
	g.held[e.Underlay] = e.Subnet
	g.lengths[e.Subnet.Bits()]++
	if member {
		g.members[k]++
	}
	if e.Subnet.Bits() > g.pool.bits {
		g.inside[g.block(e.Subnet)]++
	}
}

// queue adds to freed. Outdated items leave it at its head only, which nobody looks at while there are members that were never used: when most items
// must be outdated, it is made anew.
func (g *Ledger) queue(k Kind, item freeItem) {
	q := &g.freed[k]
	heap.Push(q, item)
	if uint64(len(*q)) < 2*g.known[k]+1024 {
		return
	}
	*q = (*q)[:0]
	for p, e := range g.entries {
		if kind, i, member := g.pool.Index(p); member && kind == k && e.State == Free {
			*q = append(*q, freeItem{e.FreedAt, i})
		}
	}
	heap.Init(q)
}

// Forget removes all knowledge of a subnet.
func (g *Ledger) Forget(subnet netip.Prefix) {
	was, there := g.remember(subnet)
	if !there {
		return
	}
	g.drop(was)
	delete(g.entries, subnet)
	if k, i, member := g.pool.Index(subnet); member {
		g.known[k]--
		g.cursor[k] = min(g.cursor[k], i)
	}
}

// drop takes e out of the indexes, not out of the entries.
func (g *Ledger) drop(e Entry) {
	if e.State == Free {
		return // its item in the queue is recognised as outdated
	}
	if e.State == Active {
		g.active--
	}
	if g.held[e.Underlay] == e.Subnet {
		delete(g.held, e.Underlay)
	}
	g.lengths[e.Subnet.Bits()]--
	k, _, member := g.pool.Index(e.Subnet)
	if member {
		g.members[k]--
	}
	if e.Subnet.Bits() > g.pool.bits {
		b := g.block(e.Subnet)
		if g.inside[b]--; g.inside[b] == 0 {
			delete(g.inside, b)
		}
	}
	if !member {
		g.cursor = [2]uint64{} // members that overlapped it may have become usable
	}
}

func (g *Ledger) block(p netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(p.Addr(), g.pool.bits).Masked()
}

func (g *Ledger) remember(subnet netip.Prefix) (Entry, bool) {
	was, there := g.entries[subnet]
	if g.log {
		g.undo, g.changes = append(g.undo, undo{subnet, was, there}), nil
	}
	return was, there
}

// Begin starts a series of changes that Changes lists and Rollback undoes, and forgets the one before.
func (g *Ledger) Begin() { g.undo, g.changes, g.log = g.undo[:0], nil, true }

// Rollback undoes everything since Begin.
func (g *Ledger) Rollback() {
	g.log = false
	for i := len(g.undo) - 1; i >= 0; i-- {
		if u := g.undo[i]; u.there {
			g.Set(u.was)
		} else {
			g.Forget(u.subnet)
		}
	}
	g.undo, g.changes = g.undo[:0], nil
}

// Commit ends the series: what was changed since Begin gets the counter of the revision that brings it, and stays.
func (g *Ledger) Commit(counter uint64) []Entry {
	changes := g.Changes()
	g.undo, g.changes, g.log = g.undo[:0], nil, false
	for i, e := range changes {
		e.Changed = counter
		changes[i], g.entries[e.Subnet] = e, e
	}
	return changes
}

// Changes returns the entries that differ from what they were at Begin, in the order in which they were first touched.
func (g *Ledger) Changes() []Entry {
	if g.changes != nil || len(g.undo) == 0 {
		return g.changes
	}
	all := make([]Entry, 0, len(g.undo))
	seen := make(map[netip.Prefix]bool, len(g.undo))
	for _, u := range g.undo {
		if seen[u.subnet] {
			continue
		}
		seen[u.subnet] = true
		if e, ok := g.entries[u.subnet]; ok && (!u.there || e != u.was) {
			all = append(all, e)
		}
	}
	g.changes = all
	return all
}

// Reused reports whether there was an entry, before, of any of the subnets that were changed since Begin.
func (g *Ledger) Reused() bool {
	return slices.ContainsFunc(g.undo, func(u undo) bool { return u.there })
}

// Block keeps what overlaps a subnet from being given out until Unblock: something in the store that is no lease stands in its way.
func (g *Ledger) Block(subnet netip.Prefix) { g.blocked[subnet] = true }

// Unblock ends all blocks.
func (g *Ledger) Unblock() {
	if len(g.blocked) > 0 {
		clear(g.blocked)
		g.cursor = [2]uint64{}
	}
}

// Overlaps returns a held entry that has addresses in common with subnet. Of a blocked one it knows only the subnet.
func (g *Ledger) Overlaps(subnet netip.Prefix) (Entry, bool) {
	for p := range g.blocked { // rare
		if p.Overlaps(subnet) {
			return Entry{Lease: Lease{Subnet: p}}, true
		}
	}
	for bits := 0; bits <= subnet.Bits() && bits <= 32; bits++ {
		if g.lengths[bits] == 0 {
			continue
		}
		if e, ok := g.entries[netip.PrefixFrom(subnet.Addr(), bits).Masked()]; ok && e.State != Free {
			return e, true
		}
	}
	if subnet.Bits() == 32 || subnet.Bits() == g.pool.bits && g.inside[subnet] == 0 {
		return Entry{}, false // nothing can be inside it, or nothing is
	}
	for _, p := range g.held { // rare: leases of another network's block length
		if subnet.Overlaps(p) {
			return g.entries[p], true
		}
	}
	return Entry{}, false
}

// probes is how many places are tried before the pool is searched in order.
const probes = 64

// choose finds a member of a kind that nobody holds: one that was never used, else the one that was freed longest ago. Hosts are spread
// over the pool by their address: after a loss of all data, a new host is unlikely to be given what another is about to ask back.
func (g *Ledger) choose(k Kind, host netip.Addr) (netip.Prefix, bool) {
	if size := g.pool.Size(k); g.known[k] < size {
		for n := range uint64(probes) {
			if p := g.pool.At(k, spread(host, n)%size); g.unused(p) {
				return p, true
			}
		}
		for ; g.cursor[k] < size; g.cursor[k]++ {
			if p := g.pool.At(k, g.cursor[k]); g.unused(p) {
				return p, true
			}
		}
	}
	return g.oldestFreed(k)
}

func (g *Ledger) unused(p netip.Prefix) bool {
	if _, ok := g.entries[p]; ok {
		return false
	}
	_, taken := g.Overlaps(p)
	return !taken
}

// oldestFreed leaves the queue as it is, but for outdated items: what is given out is outdated as soon as it has been Set.
func (g *Ledger) oldestFreed(k Kind) (netip.Prefix, bool) {
	q := &g.freed[k]
	var blocked []freeItem
	defer func() {
		for _, b := range blocked {
			heap.Push(q, b)
		}
	}()
	for len(*q) > 0 {
		item := (*q)[0]
		p := g.pool.At(k, item.index)
		if e, ok := g.entries[p]; ok && e.State == Free && e.FreedAt == item.at {
			if _, taken := g.Overlaps(p); !taken {
				return p, true
			}
			blocked = append(blocked, item)
		}
		heap.Pop(q)
	}
	return netip.Prefix{}, false
}

// spread maps a host to its n-th place, well mixed (the finalizer of splitmix64).
func spread(host netip.Addr, n uint64) uint64 {
	b := host.As16()
	x := binary.BigEndian.Uint64(b[:8]) ^ binary.BigEndian.Uint64(b[8:])
	x += (n + 1) * 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

type freeItem struct {
	at    int64
	index uint64
}

// freeQueue is a heap: the longest free first.
type freeQueue []freeItem

func (q freeQueue) Len() int { return len(q) }
func (q freeQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].index < q[j].index
}
func (q freeQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *freeQueue) Push(x any)   { *q = append(*q, x.(freeItem)) }
func (q *freeQueue) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}
