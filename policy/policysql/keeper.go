package policysql

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/batch"
	"code.cloudfoundry.org/silk/internal/sqldb"
)

type (
	queue = batch.Queue[request, verdict]
	call  = batch.Call[request, verdict]
)

const (
	pollEvery  = 200 * time.Millisecond // how often the revision is read
	auditEvery = time.Minute            // how often what is known is compared with the tables, and what was removed is forgotten
	batchTime  = 20 * time.Second       // for a batch, retries included
	patience   = 10 * time.Second       // with a database whose revision went back
)

// keeper is the one goroutine of a store that writes policies: it keeps what is in memory in step with the database, and judges requests in batches.
type keeper struct {
	s      *Store
	at     state    // what is known is of this revision
	loaded bool     // it is what the database has
	byTag  []*group // by tag
	held   []freedTag
	behind time.Time // since when the database's revision has been lower than ours; zero: it is not
	renew  bool      // the next mend begins a new epoch
	odd    int       // how often in a row the tables were not what they should be
	rest   *tally    // what the tables have more than memory, since it cannot be read; nil: to be found out
}

// run serves requests and looks at the database from time to time, until ctx ends.
func (k *keeper) run(ctx context.Context) {
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	audited := time.Now()
	failing := false
	for {
		select {
		case <-ctx.Done():
			k.s.queue.End()
			return
		case c := <-k.s.queue.Calls():
			calls := k.s.queue.Gather(c)
			start := time.Now()
			k.serve(ctx, calls)
			k.s.queue.Served(len(calls), time.Since(start))
		case <-poll.C:
		}
		var err error
		switch _, verified := k.s.feed.head(); {
		case time.Since(audited) >= k.s.auditEvery:
			audited = time.Now()
			err = k.audit(ctx)
		case time.Since(verified) >= pollEvery/2:
			err = k.poll(ctx)
		}
		if err != nil && ctx.Err() == nil && !failing {
			k.s.log.Warn("database did not answer", "error", err)
		}
		if failing && err == nil {
			k.s.log.Info("database answered again")
		}
		failing = err != nil
	}
}

// serve answers calls. When they fail together for a reason that is not the database's, one of them may be to blame: the halves are tried alone.
func (k *keeper) serve(ctx context.Context, calls []*call) {
	if len(calls) == 0 {
		return
	}
	requests := make([]request, len(calls))
	for i, c := range calls {
		requests[i] = c.Question
	}
	verdicts, errs, err := k.judge(ctx, requests)
	switch {
	case ctx.Err() != nil && err != nil:
		err = errEnded
	case err != nil && len(calls) > 1 && !errors.Is(err, fault.Unavailable):
		k.s.log.Error("batch failed: its halves are tried alone", "requests", len(calls), "error", err)
		k.serve(ctx, calls[:len(calls)/2])
		k.serve(ctx, calls[len(calls)/2:])
		return
	}
	for i, c := range calls {
		if err != nil {
			c.Answer(verdict{}, ours(err))
		} else {
			c.Answer(verdicts[i], errs[i])
		}
	}
}

// ours gives a failure of the store or its database no kind but Unavailable or none: a verdict on the request is something else.
func ours(err error) error {
	if errors.Is(err, fault.Unavailable) || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.New(fault.Internal, err)
}

// judge decides requests and stores what they come to, in one transaction. What is in memory may be out of date: the end of the transaction
// finds that out. When there is nothing to store, the database is asked instead.
func (k *keeper) judge(ctx context.Context, requests []request) (verdicts []verdict, errs []error, err error) {
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	for tries := 0; ; tries++ {
		err = k.s.db.Again(ctx, func(n int) error {
			if n > 0 {
				if err := k.sync(ctx); err != nil {
					return err
				}
			}
			verdicts, errs, err = k.attempt(ctx, requests, n > 0)
			return err
		})
		if err == nil || tries == 2 {
			return verdicts, errs, err
		}
		switch {
		case missing(err):
			err = k.mend(ctx)
		case sqldb.IsDuplicate(err), sqldb.IsOrphan(err): // another store gave the group a tag; MySQL's upsert writes that row, and then ours is nowhere
			was := k.at.Revision
			if err = k.sync(ctx); err == nil && k.at.Revision != was {
				tries--
			} else if err == nil { // which is not known here
				k.loaded = false
				err = k.sync(ctx)
			}
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// attempt is one try of judge; synced says that what is in memory was just confirmed.
func (k *keeper) attempt(ctx context.Context, requests []request, synced bool) ([]verdict, []error, error) {
	for {
		d := newDraft(k.s.feed.view(), k.s.tags, k.at.now())
		verdicts, errs := make([]verdict, len(requests)), make([]error, len(requests))
		for i, q := range requests {
			verdicts[i].tag, errs[i] = d.judge(q)
		}
		c := d.change()
		if !c.empty() {
			if err := k.commit(ctx, c); err != nil {
				d.drop()
				return nil, nil, err
			}
		} else if !synced {
			if err := k.sync(ctx); err != nil {
				return nil, nil, err
			}
			synced = true
			continue
		}
		for i := range verdicts {
			verdicts[i].revision = k.at.Revision
		}
		return verdicts, errs, nil
	}
}

// commit stores a change. If what is in memory was not the database's newest, or anything else fails, nothing is stored.
func (k *keeper) commit(ctx context.Context, c change) error {
	w, to, now := &series{dialect: k.s.db.Dialect()}, k.at.next(), k.at.now()
	w.record(c, to.Counter, now)
	w.advance(k.at, to)
	var next *view
	var entries []entry
	start := time.Now()
	_, err := k.s.db.AtomicWhile(ctx, w.list, func() {
		next, entries = k.s.feed.view().with(c, to.Revision, to.stamp), c.entries(to.Counter)
	})
	if err != nil {
		return fmt.Errorf("store policies: %w", err)
	}
	for _, g := range c.freed {
		k.byTag[g.Tag] = nil
		k.s.tags.set(g.Tag, now)
	}
	for _, g := range c.tagged {
		k.byTag[g.Tag] = g
	}
	k.at = to
	k.s.feed.apply(next, entries, 0, start)
	return nil
}

// poll follows what other stores did. It makes what is missing anew.
func (k *keeper) poll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	if replaced, err := k.s.db.Replaced(); err != nil {
		return err
	} else if replaced {
		k.s.log.Warn("database file was replaced")
		k.renew = true
	}
	if k.renew || k.s.torn.Swap(false) {
		return k.mend(ctx)
	}
	err := k.sync(ctx)
	if missing(err) {
		return k.mend(ctx)
	}
	if err == nil && len(k.held) > 0 {
		err = k.hold(ctx)
	}
	return err
}

// sync brings memory to the database's revision, by reading what changed since its own, or everything. Nearly always nothing did, which one row says.
func (k *keeper) sync(ctx context.Context) error {
	start := time.Now()
	after := int64(-1)
	if k.loaded {
		after = int64(k.at.Counter)
		st, err := readState(ctx, k.s.db)
		if err != nil {
			return err
		}
		if st.Revision == k.at.Revision {
			k.at, k.behind = st, time.Time{}
			k.s.ahead.Store(st.micros - st.read.UnixMicro())
			k.s.feed.confirm(st.Revision, start)
			return nil
		}
	}
	st, err := read(ctx, k.s.db, after)
	if err != nil {
		return err
	}
	if k.loaded && st.Epoch == k.at.Epoch && st.Counter < k.at.Counter {
		return k.fellBehind(st.state)
	}
	k.behind = time.Time{}
	k.s.ahead.Store(st.micros - st.state.read.UnixMicro())
	if k.loaded && st.Epoch == k.at.Epoch && k.at.Counter >= st.pruned {
		k.follow(st, start)
		return nil
	}
	if after >= 0 {
		if st, err = read(ctx, k.s.db, -1); err != nil {
			return err
		}
	}
	k.load(st, start)
	return nil
}

// follow takes over what others did since the revision in memory.
func (k *keeper) follow(st *stored, start time.Time) {
	var c change
	var entries []entry
	v := k.s.feed.view()
	if st.Revision == k.at.Revision {
		return
	}
	var gone []storedRow // which are in no view
	for _, r := range st.rows {
		if old, ok := k.row(r); ok && v.has(old.policy()) {
			c.remove = append(c.remove, old)
			entries = append(entries, entry{counter: r.changed, row: old, gone: true})
		} else if r.gone {
			gone = append(gone, r)
		}
	}
	for _, g := range st.groups {
		old := k.byTag[g.Tag]
		if old != nil && !g.free && old.Tagged == g.Tagged {
			continue
		}
		if old != nil {
			c.freed = append(c.freed, old)
		}
		if now := k.place(g, st.now()); now != nil {
			c.tagged = append(c.tagged, now)
		}
	}
	for _, r := range st.rows {
		if r.gone {
			continue
		}
		now, ok := k.row(r)
		if !ok {
			k.orphan(st, r)
			continue
		}
		c.add = append(c.add, now)
		entries = append(entries, entry{counter: r.changed, row: now})
	}
	floor := uint64(0)
	of := st.owners()
	for _, r := range gone {
		if now, ok := k.former(r, of); ok {
			entries = append(entries, entry{counter: r.changed, row: now, gone: true, unseen: true})
		} else {
			floor = max(floor, r.changed)
		}
	}
	k.at = st.state
	k.s.note(st.invalid, false)
	sortEntries(entries)
	k.s.feed.apply(v.with(c, st.Revision, st.stamp), entries, floor, start)
}

// place takes over a row of silk_policy_groups, and returns the group if it is one. A tag that was freed after the present time, by a clock that has gone back
// since, was freed now.
func (k *keeper) place(g storedGroup, now int64) *group {
	k.byTag[g.Tag] = nil
	switch {
	case g.free:
		k.s.tags.set(g.Tag, min(g.freedAt, now))
		return nil
	case g.bad: // its tag is used, by nobody here
		k.s.tags.set(g.Tag, used)
		return nil
	}
	k.s.tags.set(g.Tag, used)
	k.byTag[g.Tag] = newGroup(g.Tagged)
	return k.byTag[g.Tag]
}

// row returns a row of silk_policies with its groups as they are known.
func (k *keeper) row(r storedRow) (row, bool) {
	s, d := k.byTag[r.source], k.byTag[r.destination]
	return newRow(s, d, r.ports, r.protocol), s != nil && d != nil
}

// orphan takes note of a policy of a tag that no group has, which somebody else must have taken away. The tag is given to nobody: the policy would be that group's.
func (k *keeper) orphan(st *stored, r storedRow) {
	st.invalid = append(st.invalid, fmt.Sprintf("policy from tag %v to tag %v: no group has it", r.source, r.destination))
	for _, t := range []identity.Tag{r.source, r.destination} {
		if k.byTag[t] == nil {
			k.s.tags.set(t, used)
		}
	}
}

// owner is whose a tag is, or was last, and the counter at which it got it.
type owner struct {
	*group
	since uint64
}

// owners returns those of the tags that were read.
func (s *stored) owners() map[identity.Tag]owner {
	of := make(map[identity.Tag]owner, len(s.groups))
	for _, g := range s.groups {
		o := owner{since: g.assigned}
		if !g.bad {
			o.group = newGroup(g.Tagged)
		}
		of[g.Tag] = o
	}
	return of
}

// former returns a removed row with the groups whose it was. It is not ok when nobody can tell any more.
func (k *keeper) former(r storedRow, of map[identity.Tag]owner) (row, bool) {
	whose := func(t identity.Tag) *group {
		o, read := of[t]
		switch {
		case !read:
			return k.byTag[t]
		case o.since > r.changed:
			return nil
		}
		return cmp.Or(k.byTag[t], o.group)
	}
	s, d := whose(r.source), whose(r.destination)
	return newRow(s, d, r.ports, r.protocol), s != nil && d != nil
}

// load replaces everything by what was read.
func (k *keeper) load(st *stored, start time.Time) {
	was, tags, again := k.byTag, k.s.tags.states(), k.at.Epoch != ""
	k.byTag = make([]*group, int(identity.MaxTag)+1)
	k.s.tags.reset()
	groups := make([]*group, 0, len(st.groups))
	for _, g := range st.groups {
		if now := k.place(g, st.now()); now != nil {
			groups = append(groups, now)
		}
	}
	of := st.owners()
	floor := st.pruned
	if cut := len(st.rows) - maxLog; cut > 0 {
		floor = max(floor, st.rows[cut-1].changed)
	}
	rows, entries := make([]row, 0, len(st.rows)), []entry{}
	for _, r := range st.rows {
		now, ok := k.row(r)
		if r.gone {
			if now, ok = k.former(r, of); !ok {
				floor = max(floor, r.changed)
				continue
			}
		} else if !ok {
			k.orphan(st, r)
			continue
		} else {
			rows = append(rows, now)
		}
		entries = append(entries, entry{counter: r.changed, row: now, gone: r.gone})
	}
	if again && (st.Epoch != k.at.Epoch || st.Counter < k.at.Counter || len(k.held) > 0) {
		k.remember(was, tags, st.now())
	}
	if k.loaded && st.Epoch != k.at.Epoch {
		k.s.log.Warn("epoch of the database changed", "was", k.at.String(), "is", st.String())
	}
	k.at, k.loaded, k.behind, k.rest = st.state, true, time.Time{}, nil
	k.s.note(st.invalid, true)
	k.s.feed.reset(newView(st.Revision, st.stamp, rows, groups), entries, floor, start)
}
