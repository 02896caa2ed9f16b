package dns

import (
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// pair is a name and an address that belong together.
type pair struct {
	name    registration.Name
	address netip.Addr
}

// book keeps the table: what is heard of goes in, what is stale out.
type book struct {
	table  *registration.Table
	ranges registration.Ranges
	log    *slog.Logger
	warmIn time.Duration // of connection, if that is less than sources take to tell of everything
	always bool          // there is no source but ourselves, so the table is never without anything

	mu       sync.Mutex
	fresh    *registration.Freshness
	own      map[pair]registration.Registration // of this host's containers: they are never stale
	restored time.Time                          // when the snapshot was taken that the table came from
	since    time.Time                          // of the connection, zero: there is none
	heard    time.Time                          // the last message
	latest   time.Duration
	quiet    quiet

	warm atomic.Bool // once it is so it stays so; set with mu held

	registers, unregisters, malformed, refused, full, pruned atomic.Uint64
}

// terms returns by which times registrations grow stale. Sources are asked to tell of everything once in resume_pruning_delay_seconds; those of our making
// do so in advertise_interval_seconds, and are not silent before.
func (c *Config) terms() registration.Terms {
	t := registration.Terms{
		Staleness: seconds(c.Staleness), Resume: max(seconds(c.ResumePruning), time.Nanosecond),
		Interval: max(seconds(c.ResumePruning), seconds(c.WarmDuration), time.Second),
	}
	if c.AdvertiseInterval < c.Staleness { // or silence alone would make everything stale
		t.Interval = max(t.Interval, seconds(c.AdvertiseInterval))
	}
	return t
}

// newBook returns a book whose table is to be set.
func newBook(cfg Config, log *slog.Logger) *book {
	return &book{
		ranges: cfg.ranges(), log: log, warmIn: seconds(cfg.WarmDuration), always: len(cfg.NATS.Hosts) == 0,
		fresh: registration.NewFreshness(cfg.terms(), time.Now()), own: map[pair]registration.Registration{},
	}
}

// restore takes over the table of a snapshot.
func (b *book) restore(t *registration.Table, taken time.Time) {
	b.table = t
	b.mu.Lock()
	defer b.mu.Unlock()
	b.restored = taken
	b.fresh.Restored(taken, time.Now())
}

// connected tells that registrations are heard from now on.
func (b *book) connected() {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fresh.Connected(now)
	b.since = now
}

// disconnected tells that they are not.
func (b *book) disconnected() {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.isWarm(now)
	b.fresh.Disconnected(now)
	b.since = time.Time{}
}

// clock returns the time at which what is told of now was seen.
func (b *book) clock() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fresh.Clock(time.Now())
}

// Warm reports whether a name that is not in the table can be said not to exist. Every question for such a name asks it, and must not wait for what is
// done with the table meanwhile.
func (b *book) Warm() bool {
	if b.warm.Load() {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.isWarm(time.Now())
}

func (b *book) isWarm(now time.Time) bool {
	if b.warm.Load() || b.always || b.fresh.Warm(now) || !b.since.IsZero() && now.Sub(b.since) >= b.warmIn {
		b.warm.Store(true)
	}
	return b.warm.Load()
}

// hear reads one message from NATS.
func (b *book) hear(subject string, payload []byte) {
	if subject == registration.SubjectRegister {
		b.register(payload)
	} else {
		b.unregister(payload)
	}
}

func (b *book) register(payload []byte) {
	b.registers.Add(1)
	m, err := registration.ParseMessage(payload)
	if err == nil {
		err = b.ranges.Accept(m.Host)
	}
	if err != nil {
		b.reject("registration was refused", err)
		return
	}
	for r, err := range m.Registrations(b.told(m.Updated)) {
		if err == nil && !b.isOwn(r.Name, r.Address) {
			_, err = b.table.Add(r)
		}
		if err != nil {
			b.reject("registration was refused", err)
		}
	}
}

func (b *book) unregister(payload []byte) {
	b.unregisters.Add(1)
	m, err := registration.ParseUnregister(payload)
	if err != nil {
		b.reject("unregistration was refused", err)
		return
	}
	for r, err := range m.Registrations(b.told(time.Time{})) {
		switch {
		case err != nil:
			b.reject("unregistration was refused", err)
		case m.Host.IsValid() && !b.isOwn(r.Name, m.Host):
			b.table.Unregister(r.Name, m.Host)
		}
	}
}

// told notes that something was heard, of a change that happened at updated, and returns the time by the table's clock.
func (b *book) told(updated time.Time) time.Time {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fresh.Heard(now)
	b.heard = now
	if !updated.IsZero() {
		b.latest = max(b.latest, now.Sub(updated))
	}
	return b.fresh.Clock(now)
}

// isOwn reports whether this host itself vouches for a name, so that nobody else can take it away.
func (b *book) isOwn(name registration.Name, a netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.own[pair{name, a}]
	return ok
}

// reject counts what was not taken, and tells of some of it.
func (b *book) reject(what string, err error) {
	switch {
	case errors.Is(err, fault.Denied):
		b.refused.Add(1)
	case errors.Is(err, fault.Exhausted):
		b.full.Add(1)
	default:
		b.malformed.Add(1)
	}
	b.mu.Lock()
	hidden, say := b.quiet.allow(time.Now())
	b.mu.Unlock()
	if say {
		b.log.Info(what, "error", err, "not_told", hidden)
	}
}

// vouch makes list what this host's containers are called. It returns which pairs are not theirs any more.
func (b *book) vouch(list []registration.Registration) (gone []pair, errs []error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := make(map[pair]registration.Registration, len(list))
	for _, r := range list {
		next[pair{r.Name, r.Address}] = r
	}
	for p := range b.own {
		if _, still := next[p]; !still {
			gone = append(gone, p)
			b.table.Unregister(p.name, p.address)
		}
	}
	b.own = next
	return gone, b.refreshOwn()
}

// refreshOwn says again what this host vouches for. mu is held.
func (b *book) refreshOwn() (errs []error) {
	seen := b.fresh.Clock(time.Now())
	for _, r := range b.own {
		r.Seen = seen
		if _, err := b.table.Add(r); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// adopt vouches for what an earlier process did, until the next list.
func (b *book) adopt(list []pair) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range list {
		b.own[p] = registration.Registration{Name: p.name, Address: p.address, Index: -1}
	}
}

// prune removes what is stale, if anything may be. The clock never goes back, so what is told of meanwhile is younger than the limit.
func (b *book) prune() {
	b.mu.Lock()
	b.refreshOwn()
	limit, ok := b.fresh.Limit(time.Now())
	b.mu.Unlock()
	if !ok {
		return
	}
	if n := b.table.Prune(limit); n > 0 {
		b.pruned.Add(uint64(n))
		b.log.Info("stale registrations removed", "registrations", n)
	}
}

// quiet lets one of many lines into the log.
type quiet struct {
	last   time.Time
	hidden int
}

// quietTime is the least time between two lines about the same.
const quietTime = 10 * time.Second

// allow reports whether a line may be written, and how many were not since the last one.
func (q *quiet) allow(now time.Time) (hidden int, ok bool) {
	if !q.last.IsZero() && now.Sub(q.last) < quietTime {
		q.hidden++
		return 0, false
	}
	hidden, q.last, q.hidden = q.hidden, now, 0
	return hidden, true
}
