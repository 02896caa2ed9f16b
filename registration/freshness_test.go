package registration_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/registration"
)

const sec = time.Second

var start = time.Unix(1_000_000, 0)

func at(s int) time.Time { return start.Add(time.Duration(s) * sec) }

// heardUntil tells f each five seconds that the source is there.
func heardUntil(f *registration.Freshness, from, to int) {
	for s := from; s <= to; s += 5 {
		f.Heard(at(s))
	}
}

// aged returns by how much registrations have grown older since begin.
func aged(f *registration.Freshness, begin time.Time, now int) time.Duration {
	return f.Clock(at(now)).Sub(begin)
}

func TestOnlyTimeInWhichTheSourceIsWellCounts(t *testing.T) {
	f := registration.NewFreshness(registration.Terms{}, at(0))
	begin := f.Clock(at(0))
	step := func(now int, want time.Duration, prune bool) {
		t.Helper()
		limit, ok := f.Limit(at(now))
		if got := aged(f, begin, now); got != want || ok != prune || !limit.Equal(begin.Add(want-180*sec)) {
			t.Errorf("after %d s registrations are older by %v, may be pruned %v, before %v; want %v, %v", now, got, ok, limit.Sub(begin), want, prune)
		}
	}
	step(1000, 0, false)
	f.Connected(at(1000))
	heardUntil(f, 1000, 1100)
	step(1059, 40*sec, true) // time does not go back
	step(1100, 40*sec, true)
	heardUntil(f, 1105, 1200)
	step(1200, 140*sec, true)
	f.Disconnected(at(1210))
	step(1210, 150*sec, false)
	step(100_000, 150*sec, false)
	f.Connected(at(100_000))
	heardUntil(f, 100_000, 100_055)
	step(100_059, 150*sec, false)
	f.Connected(at(100_059)) // it broke, and nobody said so
	heardUntil(f, 100_060, 100_115)
	step(100_118, 150*sec, false)
	step(100_119, 150*sec, true)
	heardUntil(f, 100_120, 100_150)
	step(100_150, 181*sec, true)
}

// TestASilentSourceIsNotWell: a connection that hangs is broken long before anybody says so.
func TestASilentSourceIsNotWell(t *testing.T) {
	f := registration.NewFreshness(registration.Terms{}, at(0))
	f.Connected(at(0))
	heardUntil(f, 0, 100)
	begin := f.Clock(at(100))
	if _, ok := f.Limit(at(160)); !ok {
		t.Error("nothing may be pruned while the source is silent for its interval only")
	}
	if _, ok := f.Limit(at(161)); ok || aged(f, begin, 10_000) != 60*sec {
		t.Errorf("registrations of a source that is silent for long are older by %v, want 1m, and may be pruned: %v", aged(f, begin, 10_000), ok)
	}
	f.Heard(at(10_000))
	f.Heard(at(10_010))
	if _, ok := f.Limit(at(10_010)); !ok || aged(f, begin, 10_010) != 70*sec {
		t.Errorf("after the source is heard again registrations are older by %v, want 1m10s, and may be pruned: %v", aged(f, begin, 10_010), ok)
	}
}

func TestWarm(t *testing.T) {
	fresh := func() *registration.Freshness {
		return registration.NewFreshness(registration.Terms{Interval: 20 * sec}, at(0))
	}
	for _, c := range []struct {
		what string
		do   func(*registration.Freshness)
		cold int // s, -1 for never
		warm int // s, -1 for never
	}{
		{"never connected", func(*registration.Freshness) {}, 10_000, -1},
		{"connected", func(f *registration.Freshness) { f.Connected(at(5)) }, 24, 25},
		{"connected twice", func(f *registration.Freshness) { f.Connected(at(5)); f.Disconnected(at(20)); f.Connected(at(21)) }, 40, 41},
		{"gone after an interval", func(f *registration.Freshness) { f.Connected(at(5)); f.Disconnected(at(25)) }, -1, 25},
		{"gone before", func(f *registration.Freshness) { f.Connected(at(5)); f.Disconnected(at(24)) }, 10_000, -1},
		{"recent snapshot", func(f *registration.Freshness) { f.Restored(at(-179), at(0)) }, -1, 0},
		{"old snapshot", func(f *registration.Freshness) { f.Restored(at(-180), at(0)) }, 10_000, -1},
		{"snapshot of the future", func(f *registration.Freshness) { f.Restored(at(1), at(0)) }, 10_000, -1},
	} {
		f := fresh()
		c.do(f)
		if c.cold >= 0 && f.Warm(at(c.cold)) {
			t.Errorf("%s: warm after %d s", c.what, c.cold)
		}
		if c.warm >= 0 && !f.Warm(at(c.warm)) {
			t.Errorf("%s: cold after %d s", c.what, c.warm)
		}
	}
}

// TestNoOutageEmptiesATable: a source that tells of everything each 20 s while it is there comes and goes at random, and sometimes hangs.
// What it tells of stays, and what it no longer tells of goes once it is well for long enough.
func TestNoOutageEmptiesATable(t *testing.T) {
	for seed := range uint64(10) {
		r := rand.New(rand.NewPCG(seed, 9))
		table, now := registration.NewTable(), 0
		f := registration.NewFreshness(registration.Terms{Staleness: 90 * sec, Resume: 30 * sec, Interval: 20 * sec}, at(0))
		tell := func(name string) {
			r := reg(name, "10.255.0.1", -1)
			r.Seen = f.Clock(at(now))
			table.Register(r)
		}
		prune := func() {
			if limit, ok := f.Limit(at(now)); ok {
				table.Prune(limit)
			}
		}
		wellFor := func(seconds int, names ...string) {
			for end := now + seconds; now < end; now++ {
				if now%20 == 0 {
					f.Heard(at(now))
					for _, n := range names {
						tell(n)
					}
				}
				prune()
			}
		}
		f.Connected(at(now))
		wellFor(40, "stays", "goes")
		for range 50 {
			switch r.IntN(3) {
			case 0:
				f.Disconnected(at(now))
				now += r.IntN(3600)
				f.Connected(at(now))
			case 1:
				for end := now + r.IntN(3600); now < end; now++ { // it hangs
					prune()
				}
				f.Connected(at(now))
			}
			wellFor(20+r.IntN(60), "stays")
			if _, ok := table.Lookup("stays"); !ok {
				t.Fatalf("seed %d: what the source tells of was pruned after %d s", seed, now)
			}
		}
		if wellFor(130, "stays"); table.Standing([]byte("goes")) != registration.Absent {
			t.Errorf("seed %d: what the source no longer tells of is still there", seed)
		}
	}
}
