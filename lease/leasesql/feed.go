package leasesql

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/lease"
)

// feed is what readers see of the leases: the list, and what changed since a revision. Writers hand it changes; it makes a new list only
// when somebody asks for one, and tells waiting watchers of new revisions only when publish is called, so that their number and
// the number of revisions do not multiply.
type feed struct {
	mu       sync.Mutex
	head     lease.Revision
	verified time.Time                    // when head was known to be the database's revision
	list     *lease.Snapshot              // at some revision up to head
	pending  map[netip.Prefix]lease.Entry // what changed from list to head
	log      []lease.Entry                // every change since floor, by counter; of older ones perhaps only the last of a subnet
	kept     int                          // length of log after it was last compacted
	floor    uint64

	shown *lease.Snapshot         // what watchers are told
	asked bool                    // somebody watched since shown was last replaced, and may be waiting
	late  bool                    // show left its work undone since
	wake  chan struct{}           // closed when shown is replaced
	memo  map[uint64]lease.Update // by counter of what a watcher has: its update to shown
}

// maxMemo bounds memo: daemons come from few revisions, and somebody who asks from every one that there ever was must not fill the memory.
const maxMemo = 32

func newFeed() *feed {
	empty := lease.NewSnapshot(lease.Revision{}, nil)
	return &feed{list: empty, shown: empty, pending: map[netip.Prefix]lease.Entry{}, wake: make(chan struct{})}
}

// reset replaces everything. entries are sorted by counter and complete for what changed after floor.
func (f *feed) reset(head lease.Revision, entries []lease.Entry, floor uint64, verified time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var active []lease.Lease
	for _, e := range entries {
		if e.State == lease.Active {
			active = append(active, e.Lease)
		}
	}
	lease.Sort(active)
	f.head, f.verified, f.log, f.kept, f.floor = head, verified, slices.Clone(entries), len(entries), floor
	f.list = lease.NewSnapshot(head, active)
	clear(f.pending)
	f.publish()
}

// apply adds changes, which lead to head and are sorted by counter.
func (f *feed) apply(head lease.Revision, changes []lease.Entry, verified time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.head, f.verified = head, verified
	f.log = append(f.log, changes...)
	for _, e := range changes {
		f.pending[e.Subnet] = e
	}
}

// revision returns the revision of the newest data and when it was last known to be the database's.
func (f *feed) revision() (lease.Revision, time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.head, f.verified
}

// snapshot returns the list at head.
func (f *feed) snapshot() *lease.Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.refresh()
}

// refresh merges what is pending into a new list. The caller holds mu.
func (f *feed) refresh() *lease.Snapshot {
	if f.list.Revision == f.head {
		return f.list
	}
	if len(f.pending) == 0 {
		f.list = lease.NewSnapshot(f.head, f.list.Leases)
		return f.list
	}
	var added []lease.Lease
	for _, e := range f.pending {
		if e.State == lease.Active {
			added = append(added, e.Lease)
		}
	}
	lease.Sort(added)
	merged := make([]lease.Lease, 0, len(f.list.Leases)+len(added))
	for _, old := range f.list.Leases {
		if _, changed := f.pending[old.Subnet]; changed {
			continue
		}
		for len(added) > 0 && bySubnet(added[0], old) < 0 {
			merged, added = append(merged, added[0]), added[1:]
		}
		merged = append(merged, old)
	}
	f.list = lease.NewSnapshot(f.head, append(merged, added...))
	clear(f.pending)
	return f.list
}

// bySubnet orders leases as lease.Sort does; no two of a list have the same subnet.
func bySubnet(a, b lease.Lease) int {
	return cmp.Or(a.Subnet.Addr().Compare(b.Subnet.Addr()), cmp.Compare(a.Subnet.Bits(), b.Subnet.Bits()))
}

// show makes watchers see the newest list. While there are none it leaves that to the first one that comes, but not for so long that the log grows without
// bounds: to make the list costs as much as hundreds of leases.
func (f *feed) show() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.late = !f.asked && !f.grown(); !f.late {
		f.publish()
	}
}

// publish is show for a caller that holds mu.
func (f *feed) publish() {
	if f.shown == f.refresh() {
		return
	}
	f.shown, f.memo, f.asked = f.list, map[uint64]lease.Update{}, false // whoever waits is woken, and asks again
	f.compact()
	close(f.wake)
	f.wake = make(chan struct{})
}

// compact drops changes that later ones of the same subnet replaced, whenever the log has doubled. It may be done only when all of the
// log has been shown.
func (f *feed) compact() {
	if !f.grown() {
		return
	}
	f.log = lastOfEach(f.log)
	f.kept = len(f.log)
}

// grown reports whether compact has something to do.
func (f *feed) grown() bool { return len(f.log) >= 2*f.kept+1024 }

// lastOfEach returns the last change of each subnet, in their order.
func lastOfEach(changes []lease.Entry) []lease.Entry {
	last := make(map[netip.Prefix]int, len(changes))
	for i, e := range changes {
		last[e.Subnet] = i
	}
	kept := make([]lease.Entry, 0, len(last))
	for i, e := range changes {
		if last[e.Subnet] == i {
			kept = append(kept, e)
		}
	}
	return kept
}

// watch returns the update from since to what is shown, or, when since is what is shown or later, ok false and what to wait for.
func (f *feed) watch(since lease.Revision) (u lease.Update, wake <-chan struct{}, ok bool) {
	f.mu.Lock()
	if f.late {
		f.late = false
		f.publish()
	}
	f.asked = true
	shown, wake := f.shown, f.wake
	if since.Epoch == shown.Revision.Epoch && since.Counter >= shown.Revision.Counter {
		f.mu.Unlock()
		return lease.Update{}, wake, false
	}
	if since.Epoch != shown.Revision.Epoch || since.Counter < f.floor {
		f.mu.Unlock()
		return shown.Full(), nil, true
	}
	u, ok = f.memo[since.Counter]
	var changes []lease.Entry
	if !ok {
		from, _ := slices.BinarySearchFunc(f.log, since.Counter+1, func(e lease.Entry, c uint64) int { return cmp.Compare(e.Changed, c) })
		to, _ := slices.BinarySearchFunc(f.log, shown.Revision.Counter+1, func(e lease.Entry, c uint64) int { return cmp.Compare(e.Changed, c) })
		changes = f.log[from:max(from, to):max(from, to)]
	}
	f.mu.Unlock()
	if ok {
		return u, nil, true
	}
	u = delta(shown, changes)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.shown == shown {
		if len(f.memo) == maxMemo {
			clear(f.memo)
		}
		f.memo[since.Counter] = u
	}
	return u, nil, true
}

// unchanged returns the update that says so, at the revision that is shown if since is that or earlier.
func unchanged(at *lease.Snapshot) lease.Update {
	return lease.Update{Revision: at.Revision, Count: len(at.Leases), Sum: at.Sum()}
}

// current returns what is shown.
func (f *feed) current() *lease.Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shown
}

// delta returns the update that changes amount to, or a full one when that is shorter.
func delta(at *lease.Snapshot, changes []lease.Entry) lease.Update {
	u := unchanged(at)
	for _, e := range lastOfEach(changes) {
		if e.State == lease.Active {
			u.Set = append(u.Set, e.Lease)
		} else {
			u.Gone = append(u.Gone, e.Subnet)
		}
	}
	if len(u.Set)+len(u.Gone) > len(at.Leases) && len(u.Set)+len(u.Gone) > 8 {
		return at.Full()
	}
	lease.Sort(u.Set)
	slices.SortFunc(u.Gone, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return u
}
