package policysql

import (
	"cmp"
	"context"
	"crypto/sha256"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

const (
	maxLog  = 8192                  // changes that are remembered, so that watchers who come from before them get just these
	showGap = 50 * time.Millisecond // between two moments at which watchers are told of changes
)

// entry is a change of one policy: it came, or it is gone. One that came and went between two looks at the database is unseen: it is in no view, but a watcher
// that was at another server meanwhile may have it.
type entry struct {
	counter uint64
	row     row
	gone    bool
	unseen  bool
}

// entries returns what c is to watchers when it is stored at a counter.
func (c change) entries(counter uint64) []entry {
	all := make([]entry, 0, len(c.remove)+len(c.add))
	for _, r := range c.remove {
		all = append(all, entry{counter: counter, row: r, gone: true})
	}
	for _, r := range c.add {
		all = append(all, entry{counter: counter, row: r})
	}
	return all
}

func sortEntries(all []entry) {
	slices.SortStableFunc(all, func(a, b entry) int { return cmp.Compare(a.counter, b.counter) })
}

// feed is what readers and watchers see: the newest view, what changed before it, and who waits for which groups. A change finds the watchers it touches by
// its two groups, and those of a set of groups have the set's seal kept for them.
type feed struct {
	latest atomic.Pointer[view]

	mu       sync.Mutex
	at       *view
	loads    int       // how often everything was replaced
	verified time.Time // when at was known to be the database's newest
	log      []entry   // every change after floor, by counter
	floor    uint64
	recent   map[identity.Group]uint64 // counter of the last change of each group in log
	topics   map[identity.Group]*topic // that some set has
	sets     map[[sha256.Size]byte]*set
	dirty    []*set // that changed since they were shown
	hosts    reports

	waiting atomic.Int64 // watchers

	kicks chan struct{} // show has something to do
	moved chan struct{} // closed when at, or what hosts have in force, changes
}

// topic is a group with the sets that have it.
type topic struct {
	name identity.Group
	sets []*set
}

// set is the groups of one host, or of several that have the same. Fields are guarded by feed.mu.
type set struct {
	key    [sha256.Size]byte
	groups []*topic
	count  int           // rules that touch the groups
	sum    policy.Digest // of them
	last   uint64        // counter of the last change that touched the groups; no lower than the floor when the set was made
	steps  []uint64      // counters of changes that touched the groups, all of them after from
	from   uint64
	shown  uint64 // what of last watchers may know
	dirty  bool
	wake   chan struct{} // closed when shown moves; nil: nobody waits
	users  int           // hosts and watchers
}

func newFeed() *feed {
	f := &feed{recent: map[identity.Group]uint64{}, topics: map[identity.Group]*topic{}, sets: map[[sha256.Size]byte]*set{},
		hosts: newReports(), kicks: make(chan struct{}, 1), moved: make(chan struct{})}
	f.at = newView(revision.Revision{}, 0, nil, nil)
	f.latest.Store(f.at)
	return f
}

// view returns the newest view.
func (f *feed) view() *view { return f.latest.Load() }

// head returns the newest revision and when it was last known to be the database's.
func (f *feed) head() (revision.Revision, time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at.head, f.verified
}

func (f *feed) oldest() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.floor
}

// confirm says that a revision was the database's newest at a time. It returns false when that is not what the newest view is of.
func (f *feed) confirm(r revision.Revision, at time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.at.head != r {
		return false
	}
	if at.After(f.verified) {
		f.verified = at
	}
	return true
}

// reset replaces everything. entries are sorted, and complete for what changed after floor.
func (f *feed) reset(v *view, entries []entry, floor uint64, verified time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v.head.Epoch != f.at.head.Epoch {
		f.hosts.void()
	}
	f.at, f.verified, f.log = v, verified, entries
	f.loads++
	f.latest.Store(v)
	f.trim(min(floor, v.head.Counter))
	for _, s := range f.sets {
		s.count, s.sum = seal(v, s.names())
		s.begin(f.lastOf(s.groups))
		f.touch(s)
	}
	f.move()
}

// apply takes over a new view, to which entries lead. They are complete for what changed after floor, or what was complete before.
func (f *feed) apply(v *view, entries []entry, floor uint64, verified time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at, f.verified = v, verified
	f.latest.Store(v)
	f.log = append(f.log, entries...)
	for _, e := range entries {
		f.recent[e.row.source.Group], f.recent[e.row.destination.Group] = e.counter, e.counter
		hash := policy.Digest(0).Add(e.row.rule())
		for _, s := range f.touched(e.row) {
			s.add(e, hash)
			s.step(e.counter)
			f.touch(s)
		}
	}
	if n := len(f.log); n > 2*maxLog {
		floor = max(floor, f.log[n-maxLog-1].counter)
	}
	if floor > f.floor {
		f.trim(floor)
	}
	f.move()
}

// maxSteps is how many changes of a set are remembered by their counters.
const maxSteps = 32

// begin makes last the last change.
func (s *set) begin(last uint64) { s.last, s.shown, s.from, s.steps = last, last, last, nil }

// step notes a change, of which there may be several at a counter.
func (s *set) step(counter uint64) {
	if counter == s.last {
		return
	}
	if len(s.steps) == maxSteps {
		s.from = s.steps[maxSteps/2-1]
		s.steps = append(s.steps[:0], s.steps[maxSteps/2:]...)
	}
	s.last, s.steps = counter, append(s.steps, counter)
}

// reach returns up to which counter somebody has every change of the groups who has those up to a counter.
func (s *set) reach(counter uint64) uint64 {
	if i, _ := slices.BinarySearch(s.steps, counter+1); counter >= s.from && i < len(s.steps) {
		return s.steps[i] - 1
	}
	return counter
}

// add counts a change in.
func (s *set) add(e entry, hash policy.Digest) {
	switch {
	case e.unseen:
	case e.gone:
		s.count--
		s.sum -= hash
	default:
		s.count++
		s.sum += hash
	}
}

// touched returns the sets with a group of a row, each once.
func (f *feed) touched(r row) []*set {
	a, b := f.topics[r.source.Group], f.topics[r.destination.Group]
	switch {
	case a == nil && b == nil:
		return nil
	case a == nil || a == b:
		return b.sets
	case b == nil:
		return a.sets
	}
	if len(a.sets) > len(b.sets) {
		a, b = b, a
	}
	all := slices.Clone(b.sets)
	if len(a.sets) < 8 {
		for _, s := range a.sets {
			if !slices.Contains(b.sets, s) {
				all = append(all, s)
			}
		}
		return all
	}
	there := make(map[*set]bool, len(b.sets))
	for _, s := range b.sets {
		there[s] = true
	}
	for _, s := range a.sets {
		if !there[s] {
			all = append(all, s)
		}
	}
	return all
}

// touch marks a set as one whose watchers have something to hear.
func (f *feed) touch(s *set) {
	if !s.dirty {
		s.dirty = true
		f.dirty = append(f.dirty, s)
	}
	select {
	case f.kicks <- struct{}{}:
	default:
	}
}

// trim forgets changes up to a counter.
func (f *feed) trim(floor uint64) {
	i, _ := slices.BinarySearchFunc(f.log, floor+1, func(e entry, c uint64) int { return cmp.Compare(e.counter, c) })
	f.floor, f.log = floor, slices.Clone(f.log[i:])
	clear(f.recent)
	for _, e := range f.log {
		f.recent[e.row.source.Group], f.recent[e.row.destination.Group] = e.counter, e.counter
	}
}

// move tells those who wait for hosts to have something in force, and other stores, that there is news.
func (f *feed) move() {
	close(f.moved)
	f.moved = make(chan struct{})
	f.hosts.kick()
}

// show lets watchers hear of changes until ctx ends, with a pause after each time.
func (f *feed) show(ctx context.Context) {
	gap := time.NewTimer(showGap)
	defer gap.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.kicks:
		}
		f.wake()
		gap.Reset(showGap)
		select {
		case <-ctx.Done():
			return
		case <-gap.C:
		}
	}
}

func (f *feed) wake() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.dirty {
		s.dirty, s.shown = false, s.last
		if s.wake != nil {
			close(s.wake)
			s.wake = nil
		}
	}
	f.dirty = f.dirty[:0]
}

// names returns the groups of a set.
func (s *set) names() []identity.Group {
	names := make([]identity.Group, len(s.groups))
	for i, t := range s.groups {
		names[i] = t.name
	}
	return names
}

// seal returns how many rules touch groups, and their digest.
func seal(v *view, groups []identity.Group) (count int, sum policy.Digest) {
	rows, _ := v.touching(groups)
	for _, r := range rows {
		sum = sum.Add(r.rule())
	}
	return len(rows), sum
}

// lastOf returns the counter of the last change of any of groups, or the floor.
func (f *feed) lastOf(groups []*topic) uint64 {
	last := f.floor
	for _, t := range groups {
		last = max(last, f.recent[t.name])
	}
	return last
}

// keyOf returns by what a list of groups is known.
func keyOf(groups []identity.Group) [sha256.Size]byte {
	all := make([]byte, 0, 48*len(groups))
	for _, g := range groups {
		all = append(append(all, g...), 0xff)
	}
	return sha256.Sum256(all)
}

// join returns the set of groups, which are sorted and without duplicates, with one user more. A new one is sealed without the lock: what changed meanwhile
// is counted in.
func (f *feed) join(groups []identity.Group) *set {
	key := keyOf(groups)
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		if s := f.sets[key]; s != nil {
			s.users++
			return s
		}
		v, loads := f.at, f.loads
		f.mu.Unlock()
		count, sum := seal(v, groups)
		f.mu.Lock()
		if f.sets[key] != nil || f.loads != loads || f.at != v && v.head.Counter < f.floor {
			continue
		}
		s := &set{key: key, count: count, sum: sum, users: 1, groups: make([]*topic, len(groups))}
		for i, g := range groups {
			s.groups[i] = f.topic(v, g)
		}
		for _, e := range f.since(s, v.head.Counter) {
			s.add(e, policy.Digest(0).Add(e.row.rule()))
		}
		for _, t := range s.groups {
			t.sets = append(t.sets, s)
		}
		s.begin(f.lastOf(s.groups))
		f.sets[key] = s
		return s
	}
}

// topic returns the topic of a group, by the name that is in memory already if possible.
func (f *feed) topic(v *view, name identity.Group) *topic {
	t := f.topics[name]
	if t == nil {
		if g := v.group(name); g != nil {
			name = g.Group
		} else {
			name = identity.Group(strings.Clone(string(name))) // which may be a part of something large
		}
		t = &topic{name: name}
		f.topics[t.name] = t
	}
	return t
}

// leave ends one use of a set. The caller holds mu.
func (f *feed) leave(s *set) {
	if s.users--; s.users > 0 {
		return
	}
	delete(f.sets, s.key)
	for _, t := range s.groups {
		i := slices.Index(t.sets, s)
		t.sets[i] = t.sets[len(t.sets)-1]
		t.sets[len(t.sets)-1] = nil
		if t.sets = t.sets[:len(t.sets)-1]; len(t.sets) == 0 {
			delete(f.topics, t.name)
		}
	}
}

// since returns the changes after a counter that touch a set. The caller holds mu.
func (f *feed) since(s *set, counter uint64) (all []entry) {
	i, _ := slices.BinarySearchFunc(f.log, counter+1, func(e entry, c uint64) int { return cmp.Compare(e.counter, c) })
	if i == len(f.log) {
		return nil
	}
	if changes := f.log[i:]; len(changes) <= 16 { // as nearly always
		for _, e := range changes {
			if s.has(f.topics[e.row.source.Group]) || s.has(f.topics[e.row.destination.Group]) {
				all = append(all, e)
			}
		}
		return all
	}
	mine := make(map[identity.Group]struct{}, len(s.groups))
	for _, t := range s.groups {
		mine[t.name] = struct{}{}
	}
	for _, e := range f.log[i:] {
		_, from := mine[e.row.source.Group]
		_, to := mine[e.row.destination.Group]
		if from || to {
			all = append(all, e)
		}
	}
	return all
}

func (s *set) has(t *topic) bool { return t != nil && slices.Contains(s.groups, t) }

// part ends the use of a set by a watcher.
func (f *feed) part(s *set) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leave(s)
}

// watch answers an ask from since about a set, or, when ok is false, returns what to wait for. last says that the wait is over: then there is always an answer.
func (f *feed) watch(s *set, since revision.Revision, last bool) (u policy.Update, wake <-chan struct{}, ok bool) {
	f.mu.Lock()
	v := f.at
	u = policy.Update{Revision: v.head, Count: s.count, Sum: s.sum}
	if since.IsZero() || since.Epoch != v.head.Epoch || since.Counter < f.floor || last && since.Counter > v.head.Counter {
		f.mu.Unlock()
		return full(u, v, s), nil, true
	}
	if s.shown <= since.Counter && !last {
		defer f.mu.Unlock()
		if s.wake == nil {
			s.wake = make(chan struct{})
		}
		return policy.Update{}, s.wake, false
	}
	entries := f.since(s, since.Counter)
	f.mu.Unlock()
	if len(entries) > 8 && len(entries) > u.Count {
		return full(u, v, s), nil, true
	}
	return delta(u, entries), nil, true
}

func full(u policy.Update, v *view, s *set) policy.Update {
	u.Full, u.Set = true, rules(v.sortedTouching(s.names()))
	return u
}

// delta completes u by the last of the changes of each policy.
func delta(u policy.Update, entries []entry) policy.Update {
	lasts := make(map[policy.Policy]entry, len(entries))
	for _, e := range entries {
		lasts[e.row.policy()] = e
	}
	for _, e := range slices.SortedFunc(maps.Values(lasts), func(a, b entry) int { return byDestination(a.row, b.row) }) {
		if e.gone {
			u.Gone = append(u.Gone, e.row.policy())
		} else {
			u.Set = append(u.Set, e.row.rule())
		}
	}
	return u
}
