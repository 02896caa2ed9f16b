// Package leasesql keeps leases in a relational database: it is the lease.Registry of the controller. SQLite, PostgreSQL and MySQL or
// MariaDB (Galera included) serve alike, several controllers may share one database, and controllers of the earlier kind, which know
// only the table subnets, may run beside them.
//
// The package loads rows, lets the pure decisions of package lease judge them and stores the outcome, many requests in one
// transaction. It is no API (lease/leasehttp).
//
// Use: s, err := leasesql.Open(ctx, cfg, log); then s.Run(ctx) as a task; the methods of lease.Registry answer while Run runs.
package leasesql

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// Config is what a Store works with.
type Config struct {
	DB         sqldb.Config
	Pool       lease.Pool
	Expiration time.Duration // whole seconds after its last renewal at which a lease ends; at least 1 s
	Staleness  time.Duration // whole seconds after which a lease that was not renewed counts as stale; default an hour
	ReuseDelay time.Duration // whole seconds for which it is remembered at least that a subnet was freed, so that it is given out last; default an hour
	WatchWait  time.Duration // how long Watch waits for a change; default 50 s
}

// Store is a lease.Registry over a database. It is safe for concurrent use.
type Store struct {
	cfg  Config
	log  *slog.Logger
	db   *sqldb.DB
	feed *feed

	calls *queue        // from callers to the keeper
	renew *queue        // renewals that need no keeper, if the engine can do without; else calls
	ended chan struct{} // closed when Run returned

	keeper    keeper
	keepFreed int // free subnets beyond which the longest free are forgotten
}

const (
	pollEvery    = 250 * time.Millisecond // how often the revision is read
	compareEvery = time.Second            // how often subnets is compared with what is known
	auditEvery   = time.Minute            // how often it is read as a whole even if it seems unchanged
	maxAge       = time.Second            // of what Snapshot answers with
	showGap      = 50 * time.Millisecond  // between two revisions that watchers see
	maxBatch     = 256                    // requests in one transaction
	batchTime    = 10 * time.Second       // for a batch, retries included
	patience     = 10 * time.Second       // with a database whose revision went back
)

// Open connects to the database, brings its tables up to date and reads the leases. An unreachable database is fault.Unavailable once
// the configured timeout has passed.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Store, error) {
	if cfg.Expiration < time.Second {
		return nil, fault.Invalidf("lease expiration %v: expected at least 1s", cfg.Expiration)
	}
	if cfg.Staleness <= 0 {
		cfg.Staleness = time.Hour
	}
	if cfg.ReuseDelay <= 0 {
		cfg.ReuseDelay = time.Hour
	}
	if cfg.WatchWait <= 0 {
		cfg.WatchWait = 50 * time.Second
	}
	db, err := sqldb.Open(ctx, cfg.DB)
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, log: log, db: db, feed: newFeed(), calls: newQueue(), ended: make(chan struct{}), keepFreed: 1 << 16}
	s.renew = s.calls
	if db.Dialect().Arrays {
		s.renew = newQueue()
	}
	s.keeper.init(s)
	if err := s.start(ctx); err != nil {
		db.Close()
		return nil, fmt.Errorf("read leases from database: %w", err)
	}
	return s, nil
}

func (s *Store) start(ctx context.Context) error {
	if err := s.keeper.mend(ctx); err != nil {
		return err
	}
	_, err := s.keeper.reconcile(ctx)
	return err
}

// Close ends the connections to the database. Run must have returned.
func (s *Store) Close() error { return s.db.Close() }

// Run does the store's work until ctx ends, then returns nil. It must be called once.
func (s *Store) Run(ctx context.Context) error {
	defer close(s.ended)
	ctx, cancel := context.WithCancel(ctx)
	var beside sync.WaitGroup
	beside.Go(func() { s.keeper.show(ctx) })
	if s.renew != s.calls {
		defer s.renew.End()
		beside.Go(func() { s.renewals(ctx) })
	}
	defer s.calls.End()
	s.keeper.run(ctx)
	cancel()
	beside.Wait()
	return nil
}

// Acquire implements lease.Registry.
func (s *Store) Acquire(ctx context.Context, underlay netip.Addr, kind lease.Kind) (lease.Lease, error) {
	v, err := s.ask(ctx, lease.Request{Op: lease.Acquire, Lease: lease.Lease{Underlay: underlay}, Kind: kind})
	return v.Lease, err
}

// Renew implements lease.Registry.
func (s *Store) Renew(ctx context.Context, l lease.Lease) error {
	_, err := s.ask(ctx, lease.Request{Op: lease.Renew, Lease: l})
	return err
}

// Release implements lease.Registry.
func (s *Store) Release(ctx context.Context, underlay netip.Addr) error {
	_, err := s.ask(ctx, lease.Request{Op: lease.Release, Lease: lease.Lease{Underlay: underlay}})
	return err
}

// ask hands a request to the keeper and waits for its verdict. When ctx ends first, the request may still take effect.
func (s *Store) ask(ctx context.Context, q lease.Request) (lease.Verdict, error) {
	to := s.calls
	if q.Op == lease.Renew {
		to = s.renew
	}
	return to.Do(ctx, question{Request: q})
}

var errEnded = fault.Unavailablef("the lease store has stopped")

// Leases implements lease.Registry. The list is that of Snapshot: shared, and not to be changed.
func (s *Store) Leases(ctx context.Context) ([]lease.Lease, error) {
	sn, err := s.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	return sn.Leases, nil
}

// Snapshot returns the active leases with their revision. Answers made from it can be kept as long as the revision stands. Everything
// that this store did is in it. What other stores did up to a second before the call is in it too; what controllers of the earlier kind did, and what
// expired, within some two seconds. When the database cannot confirm that, the error is fault.Unavailable.
func (s *Store) Snapshot(ctx context.Context) (*lease.Snapshot, error) {
	if _, verified := s.feed.revision(); time.Since(verified) > maxAge {
		if _, err := s.calls.Do(ctx, question{verify: true}); err != nil {
			return nil, err
		}
	}
	return s.feed.snapshot(), nil
}

// Watch implements lease.Registry. It waits for Config.WatchWait at most, without any work of the database. Lists in the update are shared and must
// not be changed. While the database is away it answers from memory what a caller does not have yet; to one that has everything it
// says so, at the end of the wait, with fault.Unavailable. So it does, at once, to one that comes from another epoch: which of the two is the newer cannot
// be known then, and one that asks several controllers would swing between them.
func (s *Store) Watch(ctx context.Context, since lease.Revision) (lease.Update, error) {
	if head, _ := s.feed.revision(); !since.IsZero() && since.Epoch != head.Epoch {
		if _, err := s.Snapshot(ctx); err != nil {
			return lease.Update{}, err
		}
	}
	wait := time.NewTimer(s.cfg.WatchWait)
	defer wait.Stop()
	for {
		u, wake, ok := s.feed.watch(since)
		if ok {
			return u, nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return lease.Update{}, ctx.Err()
		case <-s.ended:
			return lease.Update{}, errEnded
		case <-wait.C:
			return s.unchanged(since)
		}
	}
}

// unchanged answers a watcher that has waited long enough. One that has seen a later revision of the same epoch gets everything: the database was
// restored to an earlier state, or it will see the changes twice.
func (s *Store) unchanged(since lease.Revision) (lease.Update, error) {
	if _, verified := s.feed.revision(); time.Since(verified) > 5*time.Second {
		return lease.Update{}, fault.Unavailablef("the database has not answered for %v", time.Since(verified).Round(time.Second))
	}
	at := s.feed.current()
	if at.Revision != since {
		return at.Full(), nil
	}
	return unchanged(at), nil
}

// RenewEpoch makes every revision so far a thing of the past: to be called after the database was restored from a copy, so that
// clients do not at once take for gone what the copy lacks. It works without Run; running stores follow within a second.
func (s *Store) RenewEpoch(ctx context.Context) (lease.Revision, error) {
	r := lease.Revision{Epoch: newEpoch()}
	err := s.db.Again(ctx, func(int) error {
		st, _, err := readChanges(ctx, s.db, maxCounter)
		if err != nil {
			return err
		}
		r.Counter = st.Counter + 1
		w := series{dialect: s.db.Dialect()}
		w.advance(st, r.Epoch, st.pruned)
		_, err = s.db.Atomic(ctx, w.list)
		return err
	})
	if err != nil {
		return lease.Revision{}, fmt.Errorf("renew epoch: %w", err)
	}
	return r, nil
}

// maxCounter is more than any counter.
const maxCounter = 1<<63 - 1

func newEpoch() string {
	b := make([]byte, 8)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Ping asks the database for one row.
func (s *Store) Ping(ctx context.Context) error { return s.db.Ping(ctx) }

// Stats are figures about the leases in the database.
type Stats struct {
	Total   int // rows, expired ones included
	Blocks  int // of Total, those that are blocks
	Singles int // of Total, those that are single addresses
	Stale   int // not renewed for the staleness threshold, expired ones included
	Expired int // not renewed for the expiration
	Invalid int // rows that cannot be read as a lease, and are neither listed nor given out

	BlockPool, SinglePool uint64 // members of the pool
	FreeBlocks            uint64 // members that no row holds
	FreeSingles           uint64

	Revision lease.Revision
}

// Stats counts the leases: all by the database, at the time of the call, but what is free and invalid by what is known at Revision.
func (s *Store) Stats(ctx context.Context) (Stats, error) {
	now := s.db.Dialect().Now
	st := Stats{BlockPool: s.cfg.Pool.Size(lease.Block), SinglePool: s.cfg.Pool.Size(lease.Single)}
	err := s.db.QueryRow(ctx, `SELECT COUNT(*), COALESCE(SUM(CASE WHEN overlay_subnet LIKE '%/32' THEN 1 ELSE 0 END), 0),
		COALESCE(SUM(CASE WHEN last_renewed_at <= `+now+` - ? THEN 1 ELSE 0 END), 0), COALESCE(SUM(CASE WHEN last_renewed_at <= `+now+` - ? THEN 1 ELSE 0 END), 0)
		FROM subnets`, seconds(s.cfg.Staleness), seconds(s.cfg.Expiration)).Scan(&st.Total, &st.Singles, &st.Stale, &st.Expired)
	if err != nil {
		return Stats{}, fmt.Errorf("count leases: %w", err)
	}
	st.Blocks = st.Total - st.Singles
	held := s.keeper.figures()
	st.FreeBlocks, st.FreeSingles, st.Invalid = st.BlockPool-held.members[lease.Block], st.SinglePool-held.members[lease.Single], held.invalid
	st.Revision, _ = s.feed.revision()
	return st, nil
}

// DBStats returns the figures of the connection pool.
func (s *Store) DBStats() sql.DBStats { return s.db.Stats() }

// DBCounts returns what was asked of the database so far; see sqldb.DB.Counts.
func (s *Store) DBCounts() sqldb.Counts { return s.db.Counts() }

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

// unavailable reports whether a failure is the database's and may pass.
func unavailable(err error) bool { return errors.Is(err, fault.Unavailable) }
