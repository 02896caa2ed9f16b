package policysql

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
)

// missing reports whether tables, or the row that every database of ours has, are not there.
func missing(err error) bool {
	return sqldb.IsMissing(err) || errors.Is(err, fault.NotFound)
}

// fellBehind handles a database that has forgotten revisions of its own epoch: a node of a cluster that lags, for a while; or one that was restored
// from a copy. Then the epoch is renewed.
func (k *keeper) fellBehind(st state) error {
	if k.behind.IsZero() {
		k.behind = time.Now()
		k.s.log.Warn("database went back to an earlier revision", "was", k.at.String(), "is", st.String())
	}
	if time.Since(k.behind) < k.s.patience {
		return fault.Unavailablef("the database is at revision %v, but was at %v: waiting for it to catch up", st.Revision, k.at.Revision)
	}
	k.renew = true
	return fault.Unavailablef("the database was restored to an earlier revision: reading it anew")
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
		err = k.probe(ctx)
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
		_, err = k.s.db.Exec(ctx, `INSERT INTO silk_policy_revision (id, epoch, counter, pruned, stamp, imported_at)
			SELECT 1, ?, COALESCE(MAX(changed), 0) + 1, COALESCE(MAX(changed), 0) + 1, `+micros[k.s.db.Dialect().Name]+` * 1000, 0 FROM silk_policies`, newEpoch())
		if err != nil && !sqldb.IsDuplicate(err) { // another store was faster
			return fmt.Errorf("begin epoch: %w", err)
		}
		k.renew = false
		if err = k.sync(ctx); err == nil {
			k.s.log.Info("policy tables prepared", "revision", k.at.String())
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

// probe fails when a table is missing, which the revision does not show.
func (k *keeper) probe(ctx context.Context) error {
	for _, none := range []string{"silk_policies WHERE source_tag = 0", "silk_policy_groups WHERE tag = 0", "silk_policy_servers WHERE id = ''", "silk_policy_hosts WHERE host = ''"} {
		if _, err := k.s.db.Exec(ctx, "DELETE FROM "+none); err != nil { // no row is like this
			return err
		}
	}
	return nil
}

// remember keeps tags from being given that a lost or restored database takes for free, while hosts may still know them as another group's.
func (k *keeper) remember(was []*group, tags []int64, now int64) {
	k.held = nil
	for t, state := range tags {
		tag := identity.Tag(t)
		have := k.s.tags.state[t]
		if state == used && (was[t] == nil || k.byTag[t] == nil || k.byTag[t].Group != was[t].Group) {
			state = now
		}
		if have != used && state > have {
			k.s.tags.set(tag, state)
			k.held = append(k.held, freedTag{state, tag})
		}
	}
	if len(k.held) > 0 {
		k.s.log.Warn("tags that the database has forgotten are in quarantine", "count", len(k.held))
	}
}

// hold stores what remember found.
func (k *keeper) hold(ctx context.Context) error {
	held := slices.DeleteFunc(slices.Clone(k.held), func(t freedTag) bool { return k.s.tags.state[t.tag] != t.at }) // given meanwhile
	w, to := &series{dialect: k.s.db.Dialect()}, k.at
	to.Counter++
	w.free(held, to.Counter)
	w.advance(k.at, to)
	if _, err := k.s.db.Atomic(ctx, w.list); err != nil {
		return unlessConflict(err)
	}
	k.held = nil
	return k.sync(ctx)
}

// tally is what tables amount to.
type tally struct{ rows, rowSum, groups, groupSum int64 }

// audit is poll, followed by a comparison of the tables with what is known: whoever changes them without the revision is found out here. What no store needs any
// more is removed.
func (k *keeper) audit(ctx context.Context) error {
	if err := k.poll(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	var r state
	var there tally
	err := k.s.db.QueryRow(ctx, `SELECT r.epoch, r.counter, p.n, p.s, g.n, g.s FROM silk_policy_revision r,
		(SELECT COUNT(*) AS n, COALESCE(SUM(source_tag * 3 + destination_tag * 5 + protocol * 7 + first_port * 11 + last_port * 13), 0) AS s FROM silk_policies WHERE gone = 0) p,
		(SELECT COUNT(*) AS n, COALESCE(SUM(tag), 0) AS s FROM silk_policy_groups WHERE name IS NOT NULL) g WHERE r.id = 1`).
		Scan(&r.Epoch, &r.Counter, &there.rows, &there.rowSum, &there.groups, &there.groupSum)
	if missing(err) {
		return k.mend(ctx)
	}
	if err != nil {
		return fmt.Errorf("compare policies: %w", err)
	}
	if r.Revision != k.at.Revision {
		return nil // another time
	}
	for row := range k.s.feed.view().rows.all() {
		there.rows--
		there.rowSum -= int64(row.source.Tag)*3 + int64(row.destination.Tag)*5 + int64(row.protocol)*7 + int64(row.ports.First)*11 + int64(row.ports.Last)*13
	}
	for g := range k.s.feed.view().groups.all() {
		there.groups--
		there.groupSum -= int64(g.Tag)
	}
	switch {
	case k.rest == nil:
		k.rest = &there
	case *k.rest == there:
	default:
		k.s.log.Error("policy tables were changed by somebody else: they are read anew, in a new epoch")
		k.renew = true
		return nil
	}
	return k.prune(ctx)
}

// prune forgets removed policies that are so long ago that nobody is told of them any more, and stores and hosts that are gone.
func (k *keeper) prune(ctx context.Context) error {
	w, to := &series{dialect: k.s.db.Dialect()}, k.at
	day := k.at.now() - forget.Microseconds()
	w.add(sqldb.Any, "DELETE FROM silk_policy_servers WHERE beat_at < ?", day)
	w.add(sqldb.Any, "DELETE FROM silk_policy_hosts WHERE claimed_at < ? AND server NOT IN (SELECT id FROM silk_policy_servers)", day)
	floor := k.s.feed.oldest()
	if floor > k.at.pruned {
		to.Counter++
		to.pruned = floor
		w.add(sqldb.Any, "DELETE FROM silk_policies WHERE gone = 1 AND changed <= ?", int64(floor))
		w.advance(k.at, to)
	}
	if _, err := k.s.db.Atomic(ctx, w.list); err != nil {
		return unlessConflict(fmt.Errorf("forget removed policies: %w", err))
	}
	return k.sync(ctx)
}

// unlessConflict is for upkeep that is tried again later anyway when another store was faster.
func unlessConflict(err error) error {
	if sqldb.IsConflict(err) {
		return nil
	}
	return err
}
