package policysql

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

const (
	beatEvery = 5 * time.Second        // how often a store with reporting hosts says that it is there
	beatGap   = 200 * time.Millisecond // between two rows that it writes
	claimLag  = 30 * time.Second       // between a report and the moment at which other stores can know of it, at most
)

// beat tells other stores what the hosts that report here have in force, in one row of silk_policy_servers, and which hosts these are.
type beat struct {
	s  *Store
	id string

	turn    turn // of whoever reads or writes the tables; guards what follows
	wrote   summary
	at      time.Time // when wrote was stored; zero: never
	told    time.Time // when the last successful tell began
	learnt  int64     // until when claims of other stores are known, by the database's clock
	failing bool
}

// turn is a lock for which one waits no longer than a context lasts.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) end() { <-t }

func (b *beat) run(ctx context.Context) {
	every := time.NewTicker(beatEvery)
	defer every.Stop()
	gap := time.NewTimer(beatGap)
	defer gap.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.s.feed.hosts.kicks:
		case <-every.C:
		}
		err := b.tell(ctx)
		if sqldb.IsMissing(err) {
			b.s.torn.Store(true)
			b.s.feed.hosts.kick()
		}
		if err != nil && ctx.Err() == nil && !b.failing {
			b.s.log.Warn("other policy-servers could not be told what is in force here", "error", err)
		}
		b.failing = err != nil
		gap.Reset(beatGap)
		select {
		case <-ctx.Done():
			return
		case <-gap.C:
		}
	}
}

// tell learns which hosts report to other stores by now, and stores what is to be said, if that is anything new or due.
func (b *beat) tell(ctx context.Context) error {
	asked := time.Now()
	if err := b.turn.take(ctx); err != nil {
		return err
	}
	defer b.turn.end()
	if b.told.After(asked) {
		return nil // by somebody else who began later
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	lease := b.s.cfg.Lease
	sum := b.s.feed.summary(lease, maxCounter, nil)
	idle := sum.reporting+sum.silent == 0 && time.Since(sum.deployed) > lease
	if idle && (b.at.IsZero() || b.wrote.reporting+b.wrote.silent == 0) {
		return nil
	}
	now, err := b.learn(ctx)
	if err != nil {
		return err
	}
	claims := b.s.feed.unclaimed(now) // before the summary, which must speak of each of them
	sum = b.s.feed.summary(lease, maxCounter, nil)
	gone := b.s.feed.forgotten(nil)
	if len(claims)+len(gone) == 0 && b.wrote.equal(sum) && time.Since(b.at) < beatEvery*9/10 {
		b.told = start
		return nil
	}
	list, err := json.Marshal(sum.lagging)
	if err != nil {
		return err
	}
	deployed := int64(0)
	if !sum.deployed.IsZero() {
		deployed = now - time.Since(sum.deployed).Microseconds()
	}
	w := &series{dialect: b.s.db.Dialect()}
	put(w, upsertHosts, claims, func(c claim) []any { return []any{c.host, b.id, c.at} })
	put(w, upsertServer, []summary{sum}, func(sum summary) []any {
		return []any{b.id, sum.epoch, int64(sum.seen), int64(sum.low), sum.reporting, sum.silent, sum.behind, string(list), deployed, now}
	})
	portions(gone, func(part []string) {
		args := []any{b.id}
		for _, host := range part {
			args = append(args, host)
		}
		w.add(sqldb.Any, "DELETE FROM silk_policy_hosts WHERE server = ? AND host IN "+sqldb.Marks(1, len(part)), args...)
	})
	if err := b.s.db.Again(ctx, func(int) error { _, err := b.s.db.Atomic(ctx, w.list); return err }); err != nil {
		b.s.feed.forgotten(gone)
		return fmt.Errorf("store what is in force: %w", err)
	}
	b.s.feed.claimed(claims)
	b.wrote, b.at, b.told = sum, time.Now(), start
	return nil
}

// learn drops hosts that report to other stores by now, and returns the time of the database.
func (b *beat) learn(ctx context.Context) (now int64, err error) {
	rows, err := b.s.db.Query(ctx, "SELECT host, claimed_at FROM silk_policy_hosts WHERE server <> ? AND claimed_at > ? UNION ALL SELECT '', "+micros[b.s.db.Dialect().Name],
		b.id, b.learnt-claimLag.Microseconds())
	if err != nil {
		return 0, fmt.Errorf("read where hosts report: %w", err)
	}
	defer rows.Close()
	var others []claim
	for rows.Next() {
		var c claim
		if err := rows.Scan(&c.host, &c.at); err != nil {
			return 0, fmt.Errorf("read where hosts report: %w", sqldb.Failure(err))
		}
		if c.host == "" {
			now = c.at
		} else {
			others = append(others, c)
		}
	}
	if err := rows.Err(); err != nil {
		return 0, fmt.Errorf("read where hosts report: %w", sqldb.Failure(err))
	}
	b.s.feed.concede(others, now)
	b.learnt = now
	return now, nil
}

// claim says when a host last reported to a store, by the database's clock.
type claim struct {
	host string
	at   int64
}

// concede drops hosts that reported to another store later than to this, and claims those anew that did not.
func (f *feed) concede(others []claim, now int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range others {
		h := f.hosts.hosts[c.host]
		switch {
		case h == nil:
		case now-time.Since(h.at).Microseconds() < c.at:
			f.yield(h)
		default:
			h.claimed = false
		}
	}
}

// unclaimed returns the hosts that other stores do not know to report here.
func (f *feed) unclaimed(now int64) (all []claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, h := range f.hosts.hosts {
		if !h.claimed {
			all = append(all, claim{h.name, now - time.Since(h.at).Microseconds()})
		}
	}
	return all
}

// forgotten returns hosts whose rows are to be removed, or puts them back.
func (f *feed) forgotten(back []string) (gone []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gone, f.hosts.gone = f.hosts.gone, back
	return gone
}

func (f *feed) claimed(claims []claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range claims {
		if h := f.hosts.hosts[c.host]; h != nil {
			h.claimed = true
		}
	}
}
