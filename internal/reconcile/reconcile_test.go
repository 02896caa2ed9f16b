package reconcile_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"code.cloudfoundry.org/silk/internal/reconcile"
)

func start(t *testing.T, l *reconcile.Loop) (stop func()) {
	t.Helper()
	l.Log = slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestLoopResyncsWithJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Time
		l := &reconcile.Loop{Resync: 10 * time.Second, Step: func(context.Context) error { at = append(at, time.Now()); return nil }}
		stop := start(t, l)
		defer stop()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(at) < 54 || len(at) > 67 {
			t.Fatalf("%d passes in 10 minutes, want about 60", len(at))
		}
		same := 0
		for i := 1; i < len(at); i++ {
			gap := at[i].Sub(at[i-1])
			if gap < 9*time.Second || gap > 11*time.Second {
				t.Errorf("gap %v, want 9 to 11 s", gap)
			}
			if gap == 10*time.Second {
				same++
			}
		}
		if same > 5 {
			t.Errorf("%d of %d gaps are exactly the interval", same, len(at))
		}
	})
}

func TestKickDuringAPassCausesOneMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		passes := 0
		var l *reconcile.Loop
		l = &reconcile.Loop{Step: func(context.Context) error {
			if passes++; passes == 1 {
				l.Kick()
				l.Kick()
			}
			return nil
		}}
		stop := start(t, l)
		synctest.Wait()
		if passes != 2 {
			t.Errorf("%d passes, want 2", passes)
		}
		stop()
	})
}

func TestMinGapHoldsKicksBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		passes := 0
		l := &reconcile.Loop{MinGap: time.Second, Step: func(context.Context) error { passes++; return nil }}
		stop := start(t, l)
		defer stop()
		for range 100 {
			l.Kick()
			time.Sleep(100 * time.Millisecond)
		}
		if passes < 9 || passes > 12 {
			t.Errorf("%d passes in 10 s, want about 10", passes)
		}
	})
}

func TestAKickAfterMinGapIsServedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last time.Time
		l := &reconcile.Loop{MinGap: time.Second, Step: func(context.Context) error { last = time.Now(); return nil }}
		stop := start(t, l)
		defer stop()
		time.Sleep(time.Second)
		kicked := time.Now()
		l.Kick()
		synctest.Wait()
		if !last.Equal(kicked) {
			t.Errorf("the pass came %v after the kick, want none: the last one ended a second before", last.Sub(kicked))
		}
	})
}

func TestFailuresBackOffAndAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		boom := errors.New("boom")
		l := &reconcile.Loop{Resync: time.Minute, Retry: time.Second, Step: func(context.Context) error { return boom }}
		stop := start(t, l)
		defer stop()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		s := l.Stats()
		if s.Failures != s.Passes || s.Failures < 12 || s.Failures > 30 {
			t.Errorf("%d failures in 10 minutes, want backing off to one a minute", s.Failures)
		}
		if !errors.Is(s.LastError, boom) || !s.LastSuccess.IsZero() {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestBackoffStaysInItsBounds(t *testing.T) {
	for n := 1; n < 80; n++ {
		d := reconcile.Backoff(time.Second, 30*time.Second, n)
		if d < 500*time.Millisecond || d > 30*time.Second {
			t.Fatalf("pause %d is %v", n, d)
		}
	}
}
