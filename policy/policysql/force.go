package policysql

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/revision"
)

// askEvery is how often the rows of other stores are read while somebody waits for them.
const askEvery = 200 * time.Millisecond

// InForce says how far a revision has got.
type InForce struct {
	InForce   bool     // every host that reports has it in its kernel, and no agent of the deployed kind polled within Config.Lease
	Known     int      // hosts that reported within a day
	Reporting int      // of Known, those that reported within Config.Lease
	Unknown   int      // of Known, the others; nothing waits for them
	Lagging   []string // of Reporting, those that do not have it, sorted, at most 100
	Behind    int      // how many lag, at least
	OldAgents bool     // an agent of the deployed kind, which reports nothing, polled within Config.Lease
}

// Force waits until r is in force on every host that reports, to whichever store of this database, or until timeout; then it says what is known. It fails
// only when ctx ends, the database does not answer or r is of another epoch (fault.Conflict). Of hosts that report to this store only those matter that
// have one of groups, unless groups is nil. It does not wait for agents of the deployed kind, since they say nothing.
func (s *Store) Force(ctx context.Context, r revision.Revision, groups []identity.Group, timeout time.Duration) (InForce, error) {
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	again := time.NewTicker(askEvery)
	defer again.Stop()
	ask, late := false, false
	for {
		moved := s.feed.moves()
		if ask || late || s.feed.summary(s.cfg.Lease, r.Counter, groups).behind == 0 {
			f, err := s.far(ctx, r, groups, late)
			switch {
			case err == nil && (f.Behind == 0 || late):
				f.InForce = f.Behind == 0 && !f.OldAgents
				return f, nil
			case err != nil && (late || !errors.Is(err, fault.Unavailable)):
				return InForce{}, err
			}
			moved = nil // it is others that lag, of whom only the database knows
		}
		ask = false
		select {
		case <-moved:
			if err := breathe(ctx); err != nil { // many hosts report at once
				return InForce{}, err
			}
		case <-again.C:
			ask = true
		case <-limit.C:
			late = true
		case <-ctx.Done():
			return InForce{}, ctx.Err()
		case <-s.queue.Ended():
			return InForce{}, errEnded
		}
	}
}

// breathe waits a little.
func breathe(ctx context.Context) error {
	t := time.NewTimer(20 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// moves returns a channel that is closed when there is news of what is in force here.
func (f *feed) moves() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.moved
}

// far finds out once how far r has got. In the end it also looks for the names of hosts that lag.
func (s *Store) far(ctx context.Context, r revision.Revision, groups []identity.Group, names bool) (InForce, error) {
	if err := s.beat.tell(ctx); err != nil { // so that no host is counted twice
		return InForce{}, err
	}
	t, err := s.tally(ctx, r, groups, nil)
	if err == nil && t.more == 0 && len(t.lagging) > 0 { // do they still report where that is said of them?
		var places map[string]string
		if places, err = s.places(ctx, slices.Collect(maps.Keys(t.lagging))); err == nil {
			t, err = s.tally(ctx, r, groups, places)
		}
	}
	if err == nil && names && len(t.blind) > 0 {
		err = s.name(ctx, t)
	}
	if err != nil {
		return InForce{}, err
	}
	return t.result(), nil
}

// tally adds up what the hosts that report here have in force and what other stores say. places says where hosts report, of those that lagged before.
func (s *Store) tally(ctx context.Context, r revision.Revision, groups []identity.Group, places map[string]string) (*tallyForce, error) {
	all, err := s.servers.read(ctx, s.db)
	if err != nil {
		return nil, err
	}
	head, _ := s.feed.head()
	if r.Epoch != head.Epoch {
		return nil, fault.Conflictf("revision %v is of another epoch than %v", r, head)
	}
	t := &tallyForce{r: r, lease: s.cfg.Lease.Microseconds(), self: s.beat.id, places: places, lagging: map[string]bool{}}
	t.add(s.feed.summary(s.cfg.Lease, r.Counter, groups), head)
	for _, v := range all {
		t.server(v)
	}
	return t, nil
}

// places returns the stores to which hosts last reported.
func (s *Store) places(ctx context.Context, hosts []string) (map[string]string, error) {
	all := map[string]string{}
	for part := range slices.Chunk(hosts, chunk) {
		marks, args := sqldb.In(part)
		if err := s.hosts(ctx, all, "host IN "+marks, args...); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// name finds the names of hosts that report to stores which have not seen the revision.
func (s *Store) name(ctx context.Context, t *tallyForce) error {
	marks, args := sqldb.In(t.blind)
	all := map[string]string{}
	if err := s.hosts(ctx, all, "server IN "+marks+" ORDER BY host LIMIT 100", args...); err != nil {
		return err
	}
	for host := range all {
		if t.more > 0 && !t.lagging[host] {
			t.lagging[host] = true
			t.more--
		}
	}
	return nil
}

func (s *Store) hosts(ctx context.Context, into map[string]string, where string, args ...any) error {
	rows, err := s.db.Query(ctx, "SELECT host, server FROM silk_policy_hosts WHERE "+where, args...)
	if err != nil {
		return fmt.Errorf("read where hosts report: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var host, at string
		if err := rows.Scan(&host, &at); err != nil {
			return fmt.Errorf("read where hosts report: %w", sqldb.Failure(err))
		}
		into[host] = at
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read where hosts report: %w", sqldb.Failure(err))
	}
	return nil
}

// server is a row of silk_policy_servers, with how many hosts last reported there.
type server struct {
	id         string
	epoch      string
	seen, low  uint64
	silent     int
	behind     int
	lagging    []late
	deployed   int64
	beat       int64
	owned      int
	now        int64
	unreadable bool
}

// servers reads what stores said of themselves, once for all who want to know at a time.
type servers struct {
	turn turn // guards what follows
	at   time.Time
	all  []server
}

func (c *servers) read(ctx context.Context, q sqldb.Querier) ([]server, error) {
	asked := time.Now()
	if err := c.turn.take(ctx); err != nil {
		return nil, err
	}
	defer c.turn.end()
	if c.at.After(asked) {
		return c.all, nil
	}
	start := time.Now()
	all, err := readServers(ctx, q)
	if err == nil {
		c.at, c.all = start, all
	}
	return all, err
}

func readServers(ctx context.Context, q sqldb.Querier) ([]server, error) {
	rows, err := q.Query(ctx, `SELECT h.server, h.n, COALESCE(s.epoch, ''), COALESCE(s.seen, 0), COALESCE(s.low, 0), COALESCE(s.silent, 0), COALESCE(s.behind, 0),
		COALESCE(s.lagging, '[]'), COALESCE(s.deployed_at, 0), COALESCE(s.beat_at, 0), `+micros[q.Dialect().Name]+`
		FROM (SELECT server, COUNT(*) AS n FROM silk_policy_hosts GROUP BY server) h LEFT JOIN silk_policy_servers s ON s.id = h.server
		UNION ALL SELECT id, 0, epoch, seen, low, silent, behind, lagging, deployed_at, beat_at, `+micros[q.Dialect().Name]+` FROM silk_policy_servers
			WHERE id NOT IN (SELECT server FROM silk_policy_hosts)`)
	if err != nil {
		return nil, fmt.Errorf("read what is in force elsewhere: %w", err)
	}
	defer rows.Close()
	var all []server
	for rows.Next() {
		var v server
		var list string
		if err := rows.Scan(&v.id, &v.owned, &v.epoch, &v.seen, &v.low, &v.silent, &v.behind, &list, &v.deployed, &v.beat, &v.now); err != nil {
			return nil, fmt.Errorf("read what is in force elsewhere: %w", sqldb.Failure(err))
		}
		v.unreadable = json.Unmarshal([]byte(list), &v.lagging) != nil
		all = append(all, v)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read what is in force elsewhere: %w", sqldb.Failure(err))
	}
	return all, nil
}

// tallyForce adds up what stores say.
type tallyForce struct {
	r       revision.Revision
	lease   int64             // microseconds
	self    string            // this store
	places  map[string]string // of some hosts, the store to which they report
	f       InForce
	lagging map[string]bool // hosts
	more    int             // hosts that lag and have no name here
	blind   []string        // stores that have not seen r
}

// add counts the hosts that report here.
func (t *tallyForce) add(here summary, head revision.Revision) {
	t.f.Known, t.f.Unknown = here.reporting+here.silent, here.silent
	t.f.OldAgents = !here.deployed.IsZero() && time.Since(here.deployed).Microseconds() < t.lease
	t.name(here.lagging, t.self)
	t.more += here.behind - len(here.lagging)
	if head.Counter < t.r.Counter {
		t.more++ // this store itself
	}
}

// name notes hosts that lag, as a store says, unless they report to another one by now: then that one speaks for them.
func (t *tallyForce) name(hosts []late, store string) {
	for _, l := range hosts {
		if at, ok := t.places[l.Host]; l.Counter < t.r.Counter && (!ok || at == store) {
			t.lagging[l.Host] = true
		}
	}
}

// server counts the hosts that report to another store.
func (t *tallyForce) server(v server) {
	if v.deployed > 0 && v.now-v.deployed < t.lease {
		t.f.OldAgents = true
	}
	if v.id == t.self || v.owned == 0 {
		return
	}
	t.f.Known += v.owned
	if v.now-v.beat > t.lease {
		t.f.Unknown += v.owned
		return
	}
	t.f.Unknown += min(v.silent, v.owned)
	switch {
	case v.owned <= v.silent:
	case v.epoch != t.r.Epoch || v.seen < t.r.Counter || v.unreadable:
		t.blind = append(t.blind, v.id)
		t.more += v.owned - v.silent
	case v.low < t.r.Counter:
		t.name(v.lagging, v.id)
		if n := len(v.lagging); n > 0 && v.behind > n && v.lagging[n-1].Counter < t.r.Counter {
			t.more += v.behind - n
		}
	}
}

func (t *tallyForce) result() InForce {
	f := t.f
	f.Behind = len(t.lagging) + t.more
	f.Lagging = slices.Sorted(maps.Keys(t.lagging))
	f.Lagging = f.Lagging[:min(maxNames, len(f.Lagging))]
	f.Reporting = f.Known - f.Unknown
	return f
}
