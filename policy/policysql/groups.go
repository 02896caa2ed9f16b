package policysql

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// SecurityGroups keeps security groups beside the policies of a Store, with revisions of the same epoch: it is the secgroup.Feed of
// policy-server. All of it is read from memory, which follows the database. It is safe for concurrent use.
type SecurityGroups struct {
	s *Store

	turn   turn      // of whoever reads or writes the tables; guards what follows
	behind time.Time // since when the database's revision has been lower than ours; zero: it is not
	renew  bool      // groups were lost: a new epoch is due
	odd    bool      // rows differ from what their writers said, and that has been told

	waiting atomic.Int64

	mu       sync.Mutex
	view     *groupView   // never nil after Open
	past     []pastGroups // newest last
	moved    chan struct{}
	verified time.Time // when the view was the database's newest; zero: unknown
}

// pastGroups is a view that somebody may be reading page by page.
type pastGroups struct {
	*groupView
	until time.Time
}

const (
	keepPast = 2 * time.Minute // for which a view is kept for who reads it page by page
	maxPast  = 16              // views kept
)

// SecurityGroups returns the security groups beside the policies.
func (s *Store) SecurityGroups() *SecurityGroups { return s.groups }

func newSecurityGroups(s *Store) *SecurityGroups {
	return &SecurityGroups{s: s, turn: newTurn(), moved: make(chan struct{})}
}

// run follows what other stores did, until ctx ends.
func (g *SecurityGroups) run(ctx context.Context) {
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-poll.C:
		}
		err := g.poll(ctx)
		if err != nil && ctx.Err() == nil && !failing {
			g.s.log.Warn("security groups could not be read", "error", err)
		}
		if failing && err == nil {
			g.s.log.Info("security groups were read again")
		}
		failing = err != nil
	}
}

func (g *SecurityGroups) poll(ctx context.Context) error {
	if g.fresh(pollEvery / 2) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	if err := g.turn.take(ctx); err != nil {
		return err
	}
	defer g.turn.end()
	err := g.sync(ctx)
	if g.renew || missing(err) {
		err = g.mend(ctx)
	}
	return err
}

// mend makes the tables, if they are not there, their row, and a new epoch if they had to be made again. The caller has the turn, or nobody
// else is there yet.
func (g *SecurityGroups) mend(ctx context.Context) error {
	db := g.s.db
	if _, err := db.Migrate(ctx, groupSchema, groupMigrationFiles()); err != nil {
		return err
	}
	err := g.probe(ctx)
	if sqldb.IsMissing(err) { // what was recorded as made is gone
		g.renew = true
		if _, err := db.Exec(ctx, "DELETE FROM silk_migrations WHERE name = ?", groupSchema); err != nil {
			return err
		}
		if _, err := db.Migrate(ctx, groupSchema, groupMigrationFiles()); err != nil {
			return err
		}
		err = g.probe(ctx)
	}
	if err != nil {
		return err
	}
	for _, row := range []string{
		"INSERT INTO silk_security_syncer (id, holder, until_at) VALUES (1, '', 0)",
		`INSERT INTO silk_security_revision (id, counter, digest, next_id, cc_stamp, imported_at)
			SELECT 1, COALESCE(MAX(changed), 0) + 1, '', COALESCE(MAX(id), 0) + 1, '', 0 FROM silk_security_groups`,
	} {
		_, err := db.Exec(ctx, row)
		switch v, _, _ := g.now(); {
		case err == nil && v != nil: // which had been there
			g.renew = true
		case err != nil && !sqldb.IsDuplicate(err):
			return fmt.Errorf("begin security groups: %w", err)
		}
	}
	if g.renew {
		if err := g.forget(ctx); err != nil {
			return err
		}
		r, err := g.s.RenewEpoch(ctx)
		if err != nil {
			return err
		}
		g.s.log.Warn("epoch renewed, since security groups were lost or changed by somebody else", "revision", r.String())
		g.renew = false
	}
	return g.sync(ctx)
}

// probe fails when a table is missing.
func (g *SecurityGroups) probe(ctx context.Context) error {
	for _, table := range []string{"silk_security_groups", "silk_security_revision", "silk_security_syncer"} {
		if _, err := g.s.db.Exec(ctx, "DELETE FROM "+table+" WHERE id = 0"); err != nil { // no row is like this
			return err
		}
	}
	return nil
}

// forget makes what is in the tables the truth, whoever wrote it, and has everything read from Cloud Controller again.
func (g *SecurityGroups) forget(ctx context.Context) error {
	_, err := g.s.db.Exec(ctx, "UPDATE silk_security_revision SET counter = counter + 1, digest = '', cc_stamp = '' WHERE id = 1")
	return err
}

// fresh reports whether memory was confirmed lately.
func (g *SecurityGroups) fresh(age time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.verified) <= age
}

// now returns the newest view, and a channel that is closed when there is a newer one.
func (g *SecurityGroups) now() (v *groupView, moved <-chan struct{}, verified time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.view, g.moved, g.verified
}

// sync brings memory to the database's revision. The caller has the turn.
func (g *SecurityGroups) sync(ctx context.Context) error {
	start := time.Now()
	v, _, _ := g.now()
	after := int64(-1)
	if v != nil {
		st, err := readGroupState(ctx, g.s.db)
		if err != nil {
			return err
		}
		if v.is(st) {
			g.set(v, start)
			return nil
		}
		if st.Revision == v.Revision && st.any != (len(v.rows)+len(v.bad) > 0) {
			g.renew = true
			return fault.Unavailablef("security groups of revision %v are not there any more", v.Revision)
		}
		if st.Epoch == v.Epoch && st.Counter >= v.Counter {
			after = int64(v.Counter)
		}
	}
	st, err := readGroups(ctx, g.s.db, after)
	if err != nil {
		return err
	}
	if v != nil && st.Epoch == v.Epoch && st.Counter < v.Counter {
		return g.fellBehind(v.groupState, st.groupState)
	}
	g.behind = time.Time{}
	next, ok := v.follow(st, after)
	if !ok || after >= 0 && len(st.invalid) > 0 { // somebody else put rows there, or spoiled them
		if st, err = readGroups(ctx, g.s.db, -1); err != nil {
			return err
		}
		next, _ = v.follow(st, -1)
	}
	if len(st.invalid) > 0 {
		g.s.log.Warn("security groups cannot be read, and are ignored", "count", len(st.invalid), "first", st.invalid[:min(len(st.invalid), 10)])
	}
	if next.digest != "" && next.digest != next.sum.String() && !g.odd {
		g.s.log.Error("security groups were changed by somebody else: they are taken as they are, in a new epoch")
		g.renew, g.odd = true, true
	} else if next.digest == next.sum.String() {
		g.odd = false
	}
	g.set(next, start)
	return nil
}

// follow returns the view after what was read, which is everything or what changed after a counter. It is not ok when v lacks a row that
// did not change.
func (v *groupView) follow(st *storedGroups, after int64) (*groupView, bool) {
	if after < 0 {
		next := newGroupView(st.groupState, st.rows)
		next.bad = st.bad
		return next, true
	}
	rows := make([]groupRow, 0, len(st.ids))
	changed := st.rows
	for _, id := range st.ids {
		if len(changed) > 0 && changed[0].id == id {
			rows, changed = append(rows, changed[0]), changed[1:]
			continue
		}
		i, ok := slices.BinarySearchFunc(v.rows, groupRow{id: id}, byID)
		if !ok {
			return nil, false
		}
		rows = append(rows, v.rows[i])
	}
	return newGroupView(st.groupState, rows), true
}

// fellBehind handles a database that has forgotten revisions of its own epoch: see keeper.fellBehind.
func (g *SecurityGroups) fellBehind(was, is groupState) error {
	if g.behind.IsZero() {
		g.behind = time.Now()
		g.s.log.Warn("database went back to earlier security groups", "was", was.String(), "is", is.String())
	}
	if time.Since(g.behind) >= g.s.patience {
		g.renew, g.behind = true, time.Time{}
	}
	return fault.Unavailablef("the database has security groups of revision %v, but had those of %v", is.Revision, was.Revision)
}

// set makes a view the newest, as it was in the database at a time, and wakes who waits for another one.
func (g *SecurityGroups) set(v *groupView, at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.verified = later(g.verified, at)
	if v == g.view {
		return
	}
	old := g.view
	g.view = v
	if old == nil {
		return
	}
	if old.Revision != v.Revision {
		g.past = append(g.past, pastGroups{old, at.Add(keepPast)})
		g.past = slices.DeleteFunc(g.past, func(p pastGroups) bool { return at.After(p.until) })
		g.past = g.past[max(0, len(g.past)-maxPast):]
		close(g.moved)
		g.moved = make(chan struct{})
	}
}

// confirmed returns a view that was the database's newest a moment ago. It asks itself first, since whoever has the turn may be busy with a
// large change.
func (g *SecurityGroups) confirmed(ctx context.Context) (*groupView, error) {
	if !g.fresh(maxAge) {
		start := time.Now()
		v, _, _ := g.now()
		if st, err := readGroupState(ctx, g.s.db); err == nil && v.is(st) && g.confirm(v, start) {
			return v, nil
		}
		if err := g.turn.take(ctx); err != nil {
			return nil, err
		}
		defer g.turn.end()
		if !g.fresh(maxAge) {
			if err := g.sync(ctx); err != nil {
				return nil, ours(err)
			}
		}
	}
	v, _, _ := g.now()
	return v, nil
}

// is reports whether a state that was read is that of the view.
func (v *groupView) is(st groupState) bool {
	there := st.any == (len(v.rows)+len(v.bad) > 0)
	st.any = v.any
	return there && st == v.groupState
}

// confirm notes when a view was the database's newest. It is not ok if there is another one by now.
func (g *SecurityGroups) confirm(v *groupView, at time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.view != v {
		return false
	}
	g.verified = later(g.verified, at)
	return true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// List implements secgroup.Book. Everything that this store did is in it, and what others did up to a second before the call. When the
// database cannot confirm that, the error is fault.Unavailable.
func (g *SecurityGroups) List(ctx context.Context) ([]secgroup.Kept, error) {
	v, err := g.confirmed(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]secgroup.Kept, len(v.rows))
	for i, r := range v.rows {
		list[i] = r.Kept
	}
	return list, nil
}

// Page returns groups for all containers and for those of some spaces, at most limit (0: all), beginning where Next of another page says
// (0: with the first). The pages of a list are of one revision, whichever store of the database is asked for each, and however the groups
// change meanwhile; when a page is asked for more than two minutes after that revision passed, it is fault.Unavailable: begin again. Any
// other number is that of the group to begin with, in the newest list.
func (g *SecurityGroups) Page(ctx context.Context, spaces []string, from int64, limit int) (GroupPage, error) {
	v, err := g.confirmed(ctx)
	if err != nil {
		return GroupPage{}, err
	}
	id := from
	if of := from >> idBits; of > 0 {
		id = from & (1<<idBits - 1)
		if v = g.remembered(v, of<<idBits); v == nil {
			return GroupPage{}, fault.Unavailablef("the list of which a part is asked for has passed: begin again")
		}
	}
	return v.page(v.touched(spaces, nil), id, limit), nil
}

// remembered returns the view that a token is of.
func (g *SecurityGroups) remembered(newest *groupView, token int64) *groupView {
	if newest.token(0) == token {
		return newest
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range slices.Backward(g.past) {
		if p.token(0) == token && p.Epoch == newest.Epoch && time.Now().Before(p.until) {
			return p.groupView
		}
	}
	return nil
}

// Watch implements secgroup.Feed. It waits for Config.WatchWait at most, without any work of the database.
func (g *SecurityGroups) Watch(ctx context.Context, a secgroup.Ask) (secgroup.Update, error) {
	return g.WatchFor(ctx, a, g.s.cfg.WatchWait)
}

// WatchFor is Watch with another limit of the wait. While the database is away it answers from memory what the asker does not have; to one
// that has everything it says so, at the end of the wait, with fault.Unavailable, and at once to one that comes from another epoch.
func (g *SecurityGroups) WatchFor(ctx context.Context, a secgroup.Ask, wait time.Duration) (secgroup.Update, error) {
	if v, _, _ := g.now(); !a.Since.IsZero() && a.Since.Epoch != v.Epoch {
		if _, err := g.confirmed(ctx); err != nil {
			return secgroup.Update{}, err
		}
	}
	limit := time.NewTimer(wait)
	defer limit.Stop()
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	for last := wait <= 0; ; {
		v, moved, verified := g.now()
		places := v.touched(a.Spaces, a.Members)
		u := secgroup.Update{Revision: v.Revision, Count: len(places), Sum: v.digestOf(places)}
		if a.Since.IsZero() || a.Since.Epoch != v.Epoch || a.Sum != u.Sum {
			u.Full, u.Groups = true, v.records(places)
			return u, nil
		}
		if last {
			if age := time.Since(verified); age > staleness {
				return u, fault.Unavailablef("the database has not answered for %v", age.Round(time.Second))
			}
			return u, nil
		}
		select {
		case <-moved:
		case <-limit.C:
			last = true
		case <-ctx.Done():
			return secgroup.Update{}, ctx.Err()
		case <-g.s.queue.Ended():
			return secgroup.Update{}, errEnded
		}
	}
}

// GroupStats are figures of security groups.
type GroupStats struct {
	Revision revision.Revision
	Groups   int
	Invalid  int // rows that cannot be read, and are ignored
	Watchers int
}

// Stats returns figures from memory.
func (g *SecurityGroups) Stats() GroupStats {
	v, _, _ := g.now()
	return GroupStats{v.Revision, len(v.rows), len(v.bad), int(g.waiting.Load())}
}

// write stores what decide makes of the newest groups, as one transaction, and returns the revision at which that holds. Decide may be
// called more than once.
func (g *SecurityGroups) write(ctx context.Context, decide func(v *groupView) (groupChange, error)) (revision.Revision, error) {
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	if err := g.turn.take(ctx); err != nil {
		return revision.Revision{}, err
	}
	defer g.turn.end()
	var at revision.Revision
	err := g.s.db.Again(ctx, func(int) error {
		if err := g.sync(ctx); err != nil {
			return ours(err)
		}
		v, _, _ := g.now()
		at = v.Revision
		c, err := decide(v)
		if err != nil || c.empty() {
			return err
		}
		start := time.Now()
		next := v.after(c)
		_, err = g.s.db.Atomic(ctx, c.series(g.s.db.Dialect(), v.groupState, next.groupState))
		if err != nil {
			if sqldb.IsDuplicate(err) { // of a group that another store made
				return sqldb.Stale()
			}
			return err
		}
		at = next.Revision
		g.set(next, start)
		return nil
	})
	if sqldb.IsMissing(err) {
		err = fault.New(fault.Unavailable, errors.Join(err, errors.New("the tables of security groups are being made again")))
	}
	return at, err
}

// after returns the view that a change leads to. Without any change of groups the revision stays.
func (v *groupView) after(c groupChange) *groupView {
	to := v.groupState
	if c.stamp != nil {
		to.stamp = *c.stamp
	}
	if len(c.put)+len(c.remove) > 0 {
		to.Counter++
	}
	for i := range c.put {
		c.put[i].changed = to.Counter
		c.put[i].tidy()
		c.put[i].digest = c.put[i].Record.Digest()
		to.next = max(to.next, c.put[i].id+1)
	}
	next := newGroupView(to, v.with(c))
	next.bad = maps.Clone(v.bad)
	maps.DeleteFunc(next.bad, func(_ string, id int64) bool { return slices.Contains(c.remove, id) })
	next.digest = next.sum.String()
	return next
}

var (
	_ secgroup.Feed = (*SecurityGroups)(nil)
	_ secgroup.Book = (*SecurityGroups)(nil)
)
