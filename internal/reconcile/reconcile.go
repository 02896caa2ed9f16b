// Package reconcile is the one loop that Silk's long-running parts turn in: it makes the world agree with what is
// wanted, again and again, and early when somebody says that something changed.
//
// The loop carries no data: what it runs looks for itself.
package reconcile

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Loop calls Run at once, after every Resync, soon after every Kick, and with growing pauses after failures. Fill it
// and call its Run method; fields must not change afterwards.
type Loop struct {
	Name   string
	Step   func(ctx context.Context) error // one pass; an error is logged and retried
	Log    *slog.Logger
	Resync time.Duration // from the end of a pass to the next one, varied by up to a tenth; 0: only when kicked
	MinGap time.Duration // from the end of a pass to a kicked one
	Retry  time.Duration // first pause after a failure, doubled up to Resync (or a minute) and jittered; default 1 s

	once sync.Once
	kick chan struct{}

	mu    sync.Mutex
	stats Stats
}

// Stats tells how a loop fares.
type Stats struct {
	LastSuccess time.Time     // zero: none yet
	LastError   error         // of the last pass, nil if it succeeded
	Duration    time.Duration // of the last pass
	Passes      uint64
	Failures    uint64
}

func (l *Loop) init() { l.once.Do(func() { l.kick = make(chan struct{}, 1) }) }

// Kick asks for a pass soon. It never blocks; kicks during a pass cause one more pass.
func (l *Loop) Kick() {
	l.init()
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Stats returns a copy of the current figures.
func (l *Loop) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Run turns the loop until ctx ends and returns nil.
func (l *Loop) Run(ctx context.Context) error {
	l.init()
	failures := 0
	for ctx.Err() == nil {
		start := time.Now()
		err := l.Step(ctx)
		if ctx.Err() != nil {
			return nil
		}
		l.note(start, err)
		pause := jitter(l.Resync)
		if err != nil {
			failures++
			pause = l.backoff(failures)
			l.Log.Warn("pass failed", "loop", l.Name, "error", err, "retry_in", pause)
		} else {
			failures = 0
		}
		if !l.wait(ctx, pause, err == nil) {
			return nil
		}
	}
	return nil
}

// wait returns false when ctx ended. A kick ends a regular pause once MinGap is over; one that follows a failure is cut short
// to the first retry pause.
func (l *Loop) wait(ctx context.Context, pause time.Duration, succeeded bool) bool {
	ended := time.Now()
	var after <-chan time.Time
	if pause > 0 {
		t := time.NewTimer(pause)
		defer t.Stop()
		after = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-after:
		return true
	case <-l.kick:
	}
	gap := l.MinGap
	if !succeeded {
		gap = max(gap, min(pause, l.retry()))
	}
	if gap -= time.Since(ended); gap <= 0 {
		return true
	}
	return Sleep(ctx, gap)
}

func (l *Loop) note(start time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.stats.Passes++
	l.stats.Duration, l.stats.LastError = now.Sub(start), err
	if err != nil {
		l.stats.Failures++
		return
	}
	l.stats.LastSuccess = now
}

func (l *Loop) retry() time.Duration {
	if l.Retry > 0 {
		return l.Retry
	}
	return time.Second
}

func (l *Loop) backoff(failures int) time.Duration {
	limit := l.Resync
	if limit <= 0 {
		limit = time.Minute
	}
	return Backoff(l.retry(), limit, failures)
}

// Sleep waits for d and reports whether ctx is still alive.
func Sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Backoff returns the pause after the n-th failure in a row (n >= 1): first doubled n-1 times, at most limit, of which a
// random half to whole.
func Backoff(first, limit time.Duration, n int) time.Duration {
	d := first
	for i := 1; i < n && d < limit; i++ {
		d *= 2
	}
	d = min(d, max(limit, first))
	return d/2 + rand.N(d/2+1)
}

// jitter varies d by up to a tenth either way, so that loops started together drift apart.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return d
	}
	return d - d/10 + rand.N(d/5+1)
}
