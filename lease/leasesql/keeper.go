package leasesql

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// keeper is the one goroutine of a store that writes: it keeps the ledger in step with the database, judges requests in batches and looks
// for what others did. Its fields belong to that goroutine, except what mu guards.
type keeper struct {
	s        *Store
	ledger   *lease.Ledger
	at       state                 // the revision that the ledger is at
	loaded   bool                  // the ledger holds what the database has at that revision
	rest     balance               // the balance of rows that are not in the ledger, because they cannot be read
	looked   time.Duration         // how long the last comparison took; it may take a fiftieth of the time
	renew    bool                  // the next mend begins a new epoch
	odd      int                   // how often in a row the balance was off and nothing to be found
	insert   []netip.Prefix        // what the last attempt wanted to insert
	unread   map[int64]lease.Lease // rows that cannot be read, and what of host and subnet is known
	grace    time.Time             // until when no lease is taken from its host
	unlogged []lease.Entry         // changes that were stored, but not logged yet
	behind   time.Time             // since when the database's revision has been lower than ours; zero: it is not
	kicks    chan struct{}

	mu   sync.Mutex
	nums figures
}

// figures are what the keeper lets others know.
type figures struct {
	members [2]uint64
	invalid int
}

func (k *keeper) init(s *Store) {
	k.s, k.ledger, k.kicks = s, lease.NewLedger(s.cfg.Pool), make(chan struct{}, 1)
}

func (k *keeper) figures() figures {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.nums
}

func (k *keeper) setFigures(invalid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nums.members = [2]uint64{k.ledger.Held(lease.Block), k.ledger.Held(lease.Single)}
	if invalid >= 0 && invalid != k.nums.invalid {
		k.s.log.Warn("rows of table subnets cannot be read as leases", "count", invalid)
		k.nums.invalid = invalid
	}
}

// run serves requests and looks at the database from time to time, until ctx ends.
func (k *keeper) run(ctx context.Context) {
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	var compared, audited time.Time
	failing := false
	for {
		select {
		case <-ctx.Done():
			k.report()
			return
		case c := <-k.s.calls.Calls():
			calls := k.s.calls.Gather(c)
			start := time.Now()
			k.serve(ctx, calls)
			k.s.calls.Served(len(calls), time.Since(start))
		case <-poll.C:
			k.report()
		}
		now := time.Now()
		var err error
		switch {
		case now.Sub(audited) >= auditEvery:
			err = k.look(ctx, true)
			audited, compared = now, now
		case now.Sub(compared) >= max(compareEvery, 50*k.looked):
			err = k.look(ctx, false)
			compared = now
			k.looked = time.Since(now)
			if err == nil {
				err = k.moveSome(ctx)
			}
		case now.Sub(k.verified()) >= pollEvery:
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

func (k *keeper) verified() time.Time {
	_, t := k.s.feed.revision()
	return t
}

// show lets watchers see new revisions, with a pause after each.
func (k *keeper) show(ctx context.Context) {
	gap := time.NewTimer(showGap)
	defer gap.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.kicks:
		}
		k.s.feed.show()
		gap.Reset(showGap)
		select {
		case <-ctx.Done():
			return
		case <-gap.C:
		}
	}
}

func (k *keeper) kick() {
	select {
	case k.kicks <- struct{}{}:
	default:
	}
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
	if k.renew {
		return k.mend(ctx)
	}
	err := k.sync(ctx)
	if missing(err) {
		return k.mend(ctx)
	}
	return err
}

// missing reports whether tables, or the row that every database of ours has, are not there.
func missing(err error) bool {
	return sqldb.IsMissing(err) || errors.Is(err, fault.NotFound)
}

// look is poll, followed by a comparison of subnets with what is known, and by what has to be done when they differ.
func (k *keeper) look(ctx context.Context, audit bool) error {
	if err := k.poll(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	b, err := readBalance(ctx, k.s.db, seconds(k.s.cfg.Expiration))
	if missing(err) {
		return k.mend(ctx)
	}
	if err != nil {
		return err
	}
	if b == k.rest {
		k.odd = 0
	}
	if b != k.rest || audit {
		k.ledger.Unblock()
		moved, err := k.reconcile(ctx)
		if err != nil {
			return err
		}
		if moved || b == k.rest {
			k.odd = 0
		} else if k.odd++; k.odd == 3 {
			k.s.log.Error("table silk_leases was changed by somebody else: it is read anew, in a new epoch")
			k.renew = true
		}
	}
	if audit {
		return k.prune(ctx)
	}
	return nil
}

// mend makes the tables, if they are not there, and a new epoch, if there is none, if tables had to be made again, or if one is due.
func (k *keeper) mend(ctx context.Context) error {
	if k.renew {
		k.loaded = false
	}
	if _, err := k.s.db.Migrate(ctx, schema, migrationFiles()); err != nil {
		return err
	}
	err := k.sync(ctx)
	if err == nil {
		_, err = k.s.db.Exec(ctx, "DELETE FROM subnets WHERE id = 0") // is it there? no row has this number
	}
	if sqldb.IsMissing(err) { // what was recorded as made is gone
		k.renew, k.loaded = true, false
		if _, err := k.s.db.Exec(ctx, "DELETE FROM silk_migrations WHERE name = ?", schema); err != nil {
			return err
		}
		if _, err := k.s.db.Migrate(ctx, schema, migrationFiles()); err != nil {
			return err
		}
		err = k.sync(ctx)
	}
	if errors.Is(err, fault.NotFound) {
		_, err = k.s.db.Exec(ctx, `INSERT INTO silk_lease_revision (id, epoch, counter, pruned)
			SELECT 1, ?, COALESCE(MAX(changed), 0) + 1, COALESCE(MAX(changed), 0) + 1 FROM `+records(k.s.db.Dialect())+" r", newEpoch())
		if err != nil && !sqldb.IsDuplicate(err) { // another store was faster
			return fmt.Errorf("begin epoch: %w", err)
		}
		k.renew = false
		if err = k.sync(ctx); err == nil {
			k.s.log.Info("lease tables prepared", "revision", k.at.String())
		}
	}
	if err != nil || !k.renew {
		return err
	}
	r, err := k.s.RenewEpoch(ctx)
	if err != nil {
		return err
	}
	k.s.log.Warn("epoch renewed", "revision", r.String())
	k.renew, k.odd = false, 0
	return k.sync(ctx)
}

// schema is the name under which the steps of this package's tables are recorded.
const schema = "lease"

// sync brings the ledger to the database's revision, by reading what changed since its own, or everything.
func (k *keeper) sync(ctx context.Context) error {
	start := time.Now()
	after := int64(-1)
	if k.loaded {
		after = int64(k.at.Counter)
	}
	st, entries, err := readChanges(ctx, k.s.db, after)
	if err != nil {
		return err
	}
	if k.loaded && st.Epoch == k.at.Epoch && st.Counter < k.at.Counter {
		return k.fellBehind(st)
	}
	k.behind = time.Time{}
	if k.loaded && st.Epoch == k.at.Epoch && st.pruned == k.at.pruned {
		for _, e := range entries {
			k.ledger.Set(e)
		}
		k.at = st
		k.s.feed.apply(st.Revision, entries, start)
	} else {
		if after >= 0 {
			if st, entries, err = readChanges(ctx, k.s.db, -1); err != nil {
				return err
			}
		}
		k.load(st, entries, start)
	}
	if len(entries) > 0 {
		k.kick()
		k.setFigures(-1)
	}
	if len(st.damaged) > 0 {
		return k.discard(ctx, st.damaged)
	}
	return nil
}

func (k *keeper) load(st state, entries []lease.Entry, start time.Time) {
	old := k.ledger
	k.ledger = lease.NewLedger(k.s.cfg.Pool)
	for _, e := range entries {
		k.ledger.Set(e)
	}
	if k.at.Epoch != "" && (st.Epoch != k.at.Epoch || st.Counter < k.at.Counter) {
		k.remember(old, st.now)
		k.grace = time.Now().Add(grace)
	}
	k.block()
	if k.loaded && st.Epoch != k.at.Epoch {
		k.s.log.Warn("epoch of the database changed", "was", k.at.String(), "is", st.String())
	}
	k.at, k.loaded, k.behind = st, true, time.Time{}
	k.s.feed.reset(st.Revision, entries, st.pruned, start)
	k.kick()
	k.setFigures(-1)
}

// block keeps addresses that rows name which cannot be read from being given out.
func (k *keeper) block() {
	for _, l := range k.unread {
		if l.Subnet.IsValid() {
			k.ledger.Block(l.Subnet)
		}
	}
}

// reconcile reads all of subnets and makes known what others changed there and what expired. It reports whether there was anything new.
func (k *keeper) reconcile(ctx context.Context) (moved bool, err error) {
	var unread map[int64]lease.Lease
	var rest balance
	err = k.s.db.Again(ctx, func(int) error {
		if err := k.sync(ctx); err != nil {
			return err
		}
		rows, now, err := readRows(ctx, k.s.db, "")
		if err != nil {
			return err
		}
		t := k.terms(cmp.Or(now, k.at.now))
		unread, rest = unreadable(rows, t)
		active, epoch := k.ledger.Active(), k.at.Epoch
		lost := lease.Difference(k.ledger, t, rows)
		if lease.Implausible(lost, active) {
			k.s.log.Error("many leases ended at once that nobody gave back: the epoch is renewed, so that hosts keep their paths for a while",
				"lost", lost, "active", active)
			epoch = newEpoch()
		}
		moved = len(k.ledger.Changes()) > 0
		was := k.at.Epoch
		if _, err = k.commit(ctx, &series{dialect: k.s.db.Dialect()}, epoch); err == nil && epoch != was {
			k.grace = time.Now().Add(grace)
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("reconcile leases: %w", err)
	}
	learnt := moved || !maps.Equal(unread, k.unread)
	if !maps.Equal(unread, k.unread) {
		k.ledger.Unblock()
	}
	k.rest, k.unread = rest, unread
	k.block()
	k.setFigures(len(unread))
	return learnt, nil
}

// unreadable returns rows that cannot be read, with what they name, and their share in the balance.
func unreadable(rows []lease.Row, t lease.Terms) (unread map[int64]lease.Lease, b balance) {
	unread = map[int64]lease.Lease{}
	for _, r := range rows {
		if !r.Invalid {
			continue
		}
		unread[r.ID] = r.Lease
		b.rows++
		b.ids += r.ID
		if !t.Expired(r) {
			b.active++
			b.activeIDs += r.ID
		}
	}
	return unread, b
}

func (k *keeper) terms(now int64) lease.Terms {
	exp, stale := seconds(k.s.cfg.Expiration), seconds(k.s.cfg.Staleness)
	return lease.Terms{Now: now, Expiration: exp, Fresh: min(exp/100, stale/4)}
}

// commit stores what w holds together with the changes of the ledger since its Begin, under epoch. If the ledger was not at the
// database's revision, or anything else fails, nothing is stored and the changes of the ledger are undone.
func (k *keeper) commit(ctx context.Context, w *series, epoch string) (counts []int64, err error) {
	changes := k.ledger.Changes()
	moved := len(changes) > 0 || epoch != k.at.Epoch || w.last != nil
	if moved {
		w.record(changes, k.at.Counter+1)
		w.advance(k.at, epoch, k.at.pruned)
	}
	start := time.Now()
	if len(w.list) > 0 {
		if counts, err = k.s.db.AtomicWhile(ctx, w.list, k.report); err != nil {
			k.ledger.Rollback()
			return nil, err
		}
	}
	if !moved {
		k.ledger.Rollback()
		return counts, nil
	}
	renewed := epoch != k.at.Epoch
	k.at.Revision = lease.Revision{Epoch: epoch, Counter: k.at.Counter + 1}
	changes = k.ledger.Commit(k.at.Counter)
	if renewed {
		all := slices.SortedFunc(k.ledger.All(), func(a, b lease.Entry) int { return cmp.Compare(a.Changed, b.Changed) })
		k.s.feed.reset(k.at.Revision, all, k.at.Counter, start)
	} else {
		k.s.feed.apply(k.at.Revision, changes, start)
	}
	k.setFigures(-1)
	k.unlogged = append(k.unlogged, changes...)
	k.kick()
	return counts, nil
}

// report logs what was stored since the last report, up to logged leases in one line, since making and writing a line takes longer than all else here. It is called
// while the database works on the next batch, or at the next look at it.
func (k *keeper) report() {
	for _, what := range []struct {
		state lease.State
		text  string
	}{{lease.Active, "leases given"}, {lease.Expired, "leases expired"}, {lease.Free, "leases ended"}} {
		var list []byte
		n := 0
		for i, e := range k.unlogged {
			if e.State == what.state {
				if n++; n > 1 {
					list = append(list, ' ')
				}
				list = e.Subnet.AppendTo(append(e.Underlay.AppendTo(list), '='))
			}
			if n == logged || n > 0 && i == len(k.unlogged)-1 {
				k.s.log.Info(what.text, "count", n, "leases", string(list))
				list, n = list[:0], 0
			}
		}
	}
	k.unlogged = k.unlogged[:0]
}

const logged = 64

// prune forgets the subnets that have been free for longest when there are too many to remember: they then count as never used.
func (k *keeper) prune(ctx context.Context) error {
	var freed []int64
	for e := range k.ledger.All() {
		if e.State == lease.Free {
			freed = append(freed, e.FreedAt)
		}
	}
	if len(freed) <= k.s.keepFreed {
		return nil
	}
	slices.Sort(freed)
	limit := min(freed[len(freed)-k.s.keepFreed/2-1], k.at.now-seconds(k.s.cfg.ReuseDelay))
	if _, err := k.moveGrants(ctx, allGrants); err != nil { // or they would say again what is forgotten here
		return err
	}
	var n int64
	err := k.s.db.Again(ctx, func(int) error {
		st, _, err := readChanges(ctx, k.s.db, maxCounter)
		if err != nil {
			return err
		}
		w := series{dialect: k.s.db.Dialect()}
		w.add(sqldb.Any, "DELETE FROM silk_leases WHERE state = ? AND freed_at <= ?", int64(lease.Free), limit)
		w.advance(st, st.Epoch, st.Counter+1)
		counts, err := k.s.db.Atomic(ctx, w.list)
		if err == nil {
			n = counts[0]
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("forget free subnets: %w", err)
	}
	k.s.log.Info("long free subnets forgotten", "count", n)
	return k.sync(ctx)
}
