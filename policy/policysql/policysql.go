// Package policysql keeps policies, and the tags of their groups, in a relational database: it is the policy.Book and the policy.Feed of
// policy-server. SQLite, PostgreSQL and MySQL or MariaDB (Galera included) serve alike, and several policy-servers may share one database.
//
// Everything is read from memory, which follows the database; requests that write are served many in one transaction. The package is no API
// (policy/policyhttp), and decides nothing about who may do what (policyserver).
//
// Use: s, err := policysql.Open(ctx, cfg, log); then s.Run(ctx) as a task; the other methods answer while Run runs.
package policysql

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/batch"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// Config is what a Store works with.
type Config struct {
	DB         sqldb.Config
	TagLength  int           // bytes of a tag as text; default 2
	MaxTag     identity.Tag  // the highest tag that is given; default identity.MaxTagOf(TagLength)
	Quarantine time.Duration // for which a freed tag is not given again, by the database's clock; default an hour, negative: none
	WatchWait  time.Duration // how long Watch waits for a change; default 50 s
	Lease      time.Duration // how long a host's report counts; default 180 s, three waits of an agent

	CloudController bool // somebody here follows Cloud Controller: what it has of security groups is changed only there
}

func (c Config) withDefaults() Config {
	if c.TagLength <= 0 {
		c.TagLength = 2
	}
	if c.MaxTag == 0 {
		c.MaxTag = identity.MaxTagOf(c.TagLength)
	}
	if c.Quarantine == 0 {
		c.Quarantine = time.Hour
	}
	if c.WatchWait <= 0 {
		c.WatchWait = 50 * time.Second
	}
	if c.Lease <= 0 {
		c.Lease = 180 * time.Second
	}
	c.Quarantine = max(c.Quarantine, 0)
	return c
}

// Store is a policy.Book and a policy.Feed over a database. It is safe for concurrent use.
type Store struct {
	cfg     Config
	log     *slog.Logger
	db      *sqldb.DB
	queue   *queue
	tags    *pool
	feed    *feed
	keeper  keeper
	beat    beat
	servers servers
	groups  *SecurityGroups
	torn    atomic.Bool // tables are missing that the keeper does not read
	asking  turn        // of whoever confirms what is in memory
	invalid atomic.Int64
	ahead   atomic.Int64 // microseconds by which the database's clock is ahead of this machine's

	patience   time.Duration // with a database whose revision went back
	auditEvery time.Duration // how often the tables are compared with what is known
}

const (
	maxAge    = time.Second          // of what reads answer with
	staleness = 5 * time.Second      // of what watchers are told that nothing has changed
	maxBatch  = 256                  // requests in one transaction
	maxWeight = 4096                 // policies in them, but for one request that has more
	maxGather = 2 * time.Millisecond // that a batch waits for callers
)

var errEnded = fault.Unavailablef("the policy store has stopped")

// Open connects to the database, brings its tables up to date and reads the policies. An unreachable database is fault.Unavailable once the
// configured timeout has passed.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Store, error) {
	db, err := sqldb.Open(ctx, cfg.DB)
	if err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s := &Store{cfg: cfg, log: log, db: db, tags: newPool(cfg.MaxTag, cfg.Quarantine), feed: newFeed(), asking: newTurn(), patience: patience, auditEvery: auditEvery}
	s.queue = batch.New[request, verdict](batch.Limits[request]{Calls: maxBatch, Weight: maxWeight, Weigh: weigh, Wait: maxGather}, errEnded)
	s.keeper.s, s.beat.s, s.beat.id = s, s, newEpoch()
	s.beat.turn, s.servers.turn = newTurn(), newTurn()
	s.groups = newSecurityGroups(s)
	if err := s.keeper.mend(ctx); err != nil {
		db.Close()
		return nil, fmt.Errorf("read policies from database: %w", err)
	}
	if err := s.groups.mend(ctx); err != nil {
		db.Close()
		return nil, fmt.Errorf("read security groups from database: %w", err)
	}
	return s, nil
}

// weigh is what a request contributes to a batch.
func weigh(q request) int { return len(q.policies) }

// Close ends the connections to the database. Run must have returned.
func (s *Store) Close() error { return s.db.Close() }

// Run does the store's work until ctx ends, then returns nil. It must be called once.
func (s *Store) Run(ctx context.Context) error {
	var others sync.WaitGroup
	defer others.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	others.Go(func() { s.feed.show(ctx) })
	others.Go(func() { s.beat.run(ctx) })
	others.Go(func() { s.groups.run(ctx) })
	s.keeper.run(ctx)
	return nil
}

// Ping asks the database for one row.
func (s *Store) Ping(ctx context.Context) error { return s.db.Ping(ctx) }

// Create implements policy.Book.
func (s *Store) Create(ctx context.Context, ps []policy.Policy) error {
	_, err := s.CreateWithin(ctx, ps, 0)
	return err
}

// CreateWithin is Create for a caller with a quota: no source that gets a policy anew may then have more than quota policies; 0 is no limit. It returns a
// revision at which all of ps hold. Beyond the quota, or without a tag for a new group, it is fault.Exhausted (errors.Is with ErrQuota tells the
// first apart); a group whose tag is not of kind identity.App is fault.Conflict.
func (s *Store) CreateWithin(ctx context.Context, ps []policy.Policy, quota int) (revision.Revision, error) {
	return s.write(ctx, request{op: create, policies: ps, quota: quota})
}

// Delete implements policy.Book.
func (s *Store) Delete(ctx context.Context, ps []policy.Policy) error {
	_, err := s.Remove(ctx, ps)
	return err
}

// Remove is Delete. It returns a revision at which none of ps holds.
func (s *Store) Remove(ctx context.Context, ps []policy.Policy) (revision.Revision, error) {
	return s.write(ctx, request{op: remove, policies: ps})
}

func (s *Store) write(ctx context.Context, q request) (revision.Revision, error) {
	for i, p := range q.policies {
		if err := p.Validate(); err != nil {
			return revision.Revision{}, fmt.Errorf("policy %d: %w", i+1, err)
		}
	}
	q.policies = slices.Clone(q.policies) // the caller may leave before it is served
	v, err := s.queue.Do(ctx, q)
	return v.revision, err
}

// Tag implements policy.Feed.
func (s *Store) Tag(ctx context.Context, g identity.Group, kind string) (identity.Tag, error) {
	if err := g.Validate(); err != nil {
		return 0, err
	}
	if err := identity.Group(kind).Validate(); err != nil {
		return 0, fmt.Errorf("kind: %w", err)
	}
	if have := s.feed.view().group(g); have != nil && have.Kind == kind && kind != identity.App && s.fresh() {
		return have.Tag, nil // which stays
	}
	v, err := s.queue.Do(ctx, request{op: tag, group: identity.Tagged{Group: g, Kind: kind}})
	return v.tag, err
}

// fresh reports whether memory is as new as reads want it.
func (s *Store) fresh() bool {
	_, verified := s.feed.head()
	return time.Since(verified) <= maxAge
}

// confirm sees to it that what is in memory was the database's newest a moment ago. It asks itself, since the keeper may be busy with a large request; only
// when there is something new the keeper must fetch that.
func (s *Store) confirm(ctx context.Context) error {
	if s.fresh() {
		return nil
	}
	if err := s.asking.take(ctx); err != nil {
		return err
	}
	defer s.asking.end()
	if s.fresh() {
		return nil
	}
	start := time.Now()
	if st, err := readState(ctx, s.db); err == nil && s.feed.confirm(st.Revision, start) {
		return nil
	}
	_, err := s.queue.Do(ctx, request{op: verify})
	return err
}

// Snapshot returns the policies of one revision. Everything that this store did is in it, and what other stores did up to a second before the call. When the
// database cannot confirm that, the error is fault.Unavailable.
func (s *Store) Snapshot(ctx context.Context) (*Snapshot, error) {
	if err := s.confirm(ctx); err != nil {
		return nil, err
	}
	v := s.feed.view()
	return &Snapshot{Revision: v.head, Stamp: v.stamp, v: v}, nil
}

// List implements policy.Book. It is as new as Snapshot.
func (s *Store) List(ctx context.Context, f policy.Filter) ([]policy.Policy, error) {
	sn, err := s.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	rows := sn.v.selected(f)
	all := make([]policy.Policy, len(rows))
	for i, r := range rows {
		all[i] = r.policy()
	}
	return all, nil
}

// Rules returns the policies that f selects with their tags, sorted by policy.Compare. It is as new as Snapshot.
func (s *Store) Rules(ctx context.Context, f policy.Filter) ([]policy.Rule, error) {
	sn, err := s.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	return sn.Select(f), nil
}

// Tags returns all groups that have a tag, sorted by tag. It is as new as Snapshot.
func (s *Store) Tags(ctx context.Context) ([]identity.Tagged, error) {
	sn, err := s.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	all := slices.AppendSeq(make([]identity.Tagged, 0, sn.v.groups.n), sn.Tags())
	slices.SortFunc(all, func(a, b identity.Tagged) int { return int(a.Tag) - int(b.Tag) })
	return all, nil
}

// Stamp returns when policies changed last, for agents that ask whether they did: nanoseconds since 1970 in steps of 1000, never 0, and greater after
// each change, whatever the clocks do. It is as new as Snapshot.
func (s *Store) Stamp(ctx context.Context) (int64, error) {
	sn, err := s.Snapshot(ctx)
	if err != nil {
		return 0, err
	}
	return sn.Stamp, nil
}

// Watch implements policy.Feed. It waits for Config.WatchWait at most, without any work of the database. While the database is away it answers from memory what a
// caller does not have yet; to one that has everything it says so, at the end of the wait, with fault.Unavailable. So it does, at once, to one that comes
// from another epoch: which of the two is the newer cannot be known then.
func (s *Store) Watch(ctx context.Context, a policy.Ask) (policy.Update, error) {
	return s.WatchFor(ctx, a, s.cfg.WatchWait)
}

// WatchFor is Watch with another limit of the wait.
func (s *Store) WatchFor(ctx context.Context, a policy.Ask, wait time.Duration) (policy.Update, error) {
	if len(a.Host) > maxHost {
		return policy.Update{}, fault.Invalidf("host %.40q... has %d bytes: expected at most %d", a.Host, len(a.Host), maxHost)
	}
	if !slices.IsSorted(a.Groups) || len(slices.Compact(slices.Clone(a.Groups))) != len(a.Groups) {
		a.Groups = distinct(a.Groups)
	}
	if head, _ := s.feed.head(); !a.Since.IsZero() && a.Since.Epoch != head.Epoch {
		if err := s.confirm(ctx); err != nil {
			return policy.Update{}, err
		}
	}
	a.Host = strings.Clone(a.Host)
	set := s.feed.join(a.Groups)
	defer s.feed.part(set)
	s.feed.report(a, set, s.cfg.Lease)
	if u, _, ok := s.feed.watch(set, a.Since, wait <= 0); ok {
		return u, nil
	}
	return s.wait(ctx, set, a.Since, wait)
}

// wait is the part of WatchFor that may take long.
func (s *Store) wait(ctx context.Context, set *set, since revision.Revision, wait time.Duration) (policy.Update, error) {
	limit := time.NewTimer(wait)
	defer limit.Stop()
	s.feed.waiting.Add(1)
	defer s.feed.waiting.Add(-1)
	last := false
	for {
		u, wake, ok := s.feed.watch(set, since, last)
		if ok {
			if _, verified := s.feed.head(); !u.Changes() && time.Since(verified) > staleness {
				return policy.Update{}, fault.Unavailablef("the database has not answered for %v", time.Since(verified).Round(time.Second))
			}
			return u, nil
		}
		select {
		case <-wake:
		case <-limit.C:
			last = true
		case <-ctx.Done():
			return policy.Update{}, ctx.Err()
		case <-s.queue.Ended():
			return policy.Update{}, errEnded
		}
	}
}

// DeployedPoll records that an agent of the deployed kind, which does not report, asked for policies at a time.
func (s *Store) DeployedPoll(at time.Time) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	s.feed.reportsNothing(at)
}

// RenewEpoch makes every revision so far a thing of the past: to be called after the database was restored from a copy, so that agents do not
// at once take for gone what the copy lacks. It works without Run; running stores follow within a second.
func (s *Store) RenewEpoch(ctx context.Context) (revision.Revision, error) {
	var to state
	err := s.db.Again(ctx, func(int) error {
		st, err := readState(ctx, s.db)
		if err != nil {
			return err
		}
		to = st.next()
		to.Epoch = newEpoch()
		w := series{dialect: s.db.Dialect()}
		w.advance(st, to)
		_, err = s.db.Atomic(ctx, w.list)
		return err
	})
	if err != nil {
		return revision.Revision{}, fmt.Errorf("renew epoch: %w", err)
	}
	return to.Revision, nil
}

func newEpoch() string {
	b := make([]byte, 8)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Stats are figures of a store.
type Stats struct {
	Revision   revision.Revision
	Policies   int
	Tags       int // that can be given at all
	Used       int // of Tags, those in use
	Quarantine int // of Tags, those freed so recently that they are not given
	Invalid    int // rows that cannot be read, and are ignored
	Watchers   int // that wait now
	Hosts      int // that report to this store

	TagsLow bool // 85 % of the tags are in use or in quarantine
}

// Stats returns figures from memory.
func (s *Store) Stats() Stats {
	v := s.feed.view()
	st := Stats{Revision: v.head, Policies: v.rows.n, Tags: int(s.cfg.MaxTag), Invalid: int(s.invalid.Load())}
	st.Used, st.Quarantine = s.tags.figures(time.Now().UnixMicro() + s.ahead.Load())
	st.TagsLow = (st.Used+st.Quarantine)*100 >= st.Tags*85
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	st.Watchers, st.Hosts = int(s.feed.waiting.Load()), len(s.feed.hosts.hosts)
	return st
}

// DBStats returns the figures of the connection pool.
func (s *Store) DBStats() sql.DBStats { return s.db.Stats() }

// DBCounts returns what was asked of the database so far; see sqldb.DB.Counts.
func (s *Store) DBCounts() sqldb.Counts { return s.db.Counts() }

// note counts rows that cannot be read, and names the first of them.
func (s *Store) note(invalid []string, anew bool) {
	n := int64(len(invalid))
	if !anew {
		n += s.invalid.Load()
	}
	s.invalid.Store(n)
	if len(invalid) > 0 {
		s.log.Warn("rows of the policy tables cannot be read, and are ignored", "count", len(invalid), "first", invalid[:min(len(invalid), 10)])
	}
}
