package registration

import "time"

// Terms are the times by which registrations grow stale.
type Terms struct {
	// Staleness is how long a registration holds without being told of, while its source is well; default 180 s.
	Staleness time.Duration

	// Resume is how long after each connection to the source nothing grows older: sources tell of everything again in that time. Default
	// 60 s.
	Resume time.Duration

	// Interval is how long a source takes to tell of everything once: after so long a connection the table is complete. A source of which
	// nothing is heard for longer is not well, whatever the connection says. Default 60 s.
	Interval time.Duration
}

// Freshness decides when what a source said is stale, and when the table is complete enough to say of a name that it is not there. A
// registration grows older only while the source is known to be well: connected for longer than Terms.Resume, and heard of within
// Terms.Interval. So a source that goes away, or is cut off, empties no table, however long it takes and however often it happens.
//
// It has no clock. Each method is told the time, best with a monotonic reading; one that is before what was told last is that one. It is not
// safe for concurrent use.
//
// Use: registrations are Seen at Clock; Limit goes to Table.Prune now and then.
type Freshness struct {
	terms Terms
	told  time.Time // last
	clock time.Time // the age of registrations is measured by it; it stands still while the source is not well

	connected bool
	since     time.Time // of the connection
	heard     time.Time // of the source, in this connection; its beginning counts
	warm      bool
}

// NewFreshness returns the state of a process that is not connected yet and has an empty table.
func NewFreshness(t Terms, now time.Time) *Freshness {
	def := func(d, v time.Duration) time.Duration {
		if d <= 0 {
			return v
		}
		return d
	}
	t = Terms{def(t.Staleness, 180*time.Second), def(t.Resume, 60*time.Second), def(t.Interval, 60*time.Second)}
	return &Freshness{terms: t, told: now, clock: now}
}

// Restored tells that the table came from a snapshot that was taken then. A recent one makes it warm: the source may be away now, but it
// was not for long enough that what it said would be stale. A snapshot of the future is as old as can be.
func (f *Freshness) Restored(taken, now time.Time) {
	f.advance(now)
	if age := now.Round(0).Sub(taken.Round(0)); age >= 0 && age < f.terms.Staleness {
		f.warm = true
	}
}

// Connected tells that the source can be heard from now on, again or for the first time. Told of twice, it is a connection that broke and
// came back.
func (f *Freshness) Connected(now time.Time) {
	now = f.advance(now)
	f.connected, f.since, f.heard = true, now, now
}

// Disconnected tells that the source cannot be heard.
func (f *Freshness) Disconnected(now time.Time) {
	f.advance(now)
	f.connected = false
}

// Heard tells that the source told of something.
func (f *Freshness) Heard(now time.Time) {
	if now = f.advance(now); f.connected {
		f.heard = now
	}
}

// Clock returns the time at which what is told of now was Seen. It may stand still, and is no time of day.
func (f *Freshness) Clock(now time.Time) time.Time {
	f.advance(now)
	return f.clock
}

// Limit returns what Table.Prune may remove: what was Seen before. It returns false while nothing may be pruned: the source is away, is
// not back for long, or is silent.
func (f *Freshness) Limit(now time.Time) (limit time.Time, ok bool) {
	now = f.advance(now)
	return f.clock.Add(-f.terms.Staleness), f.well(now)
}

// Warm reports whether a name that is not in the table can be said not to exist. Once it is so it stays so: what the source cannot tell
// of meanwhile is no reason to answer nothing.
func (f *Freshness) Warm(now time.Time) bool {
	f.advance(now)
	return f.warm
}

func (f *Freshness) well(now time.Time) bool {
	return f.connected && now.Sub(f.since) >= f.terms.Resume && now.Sub(f.heard) <= f.terms.Interval
}

// advance lets the clock go on as far as the source was well since the last time, and returns the later of now and that time.
func (f *Freshness) advance(now time.Time) time.Time {
	if now.Before(f.told) {
		now = f.told
	}
	if f.connected {
		from, to := f.told, now
		if begin := f.since.Add(f.terms.Resume); from.Before(begin) {
			from = begin
		}
		if end := f.heard.Add(f.terms.Interval); to.After(end) {
			to = end
		}
		if to.After(from) {
			f.clock = f.clock.Add(to.Sub(from))
		}
		f.warm = f.warm || now.Sub(f.since) >= f.terms.Interval
	}
	f.told = now
	return now
}
