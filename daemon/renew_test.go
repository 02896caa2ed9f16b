package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fleet runs the renewal loops of n daemons that start in the same second and returns how many renewals fell into each second of
// the first dur. fails says whether the controller is away at a time after the start.
func fleet(t *testing.T, n int, dur time.Duration, fails func(since time.Duration) bool) []int {
	seconds := make([]int, dur/time.Second)
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var all sync.WaitGroup
		for range n {
			d := &daemon{cfg: DefaultConfig(), log: slog.New(slog.DiscardHandler)}
			d.now.beats = map[string]time.Time{}
			d.renewal = d.renewalLoop(func(context.Context) error {
				since := time.Since(begin)
				mu.Lock()
				if i := int(since / time.Second); i < len(seconds) {
					seconds[i]++
				}
				mu.Unlock()
				if fails(since) {
					return errors.New("away")
				}
				return nil
			})
			all.Go(func() { d.renewing(ctx) })
		}
		time.Sleep(dur)
		cancel()
		all.Wait()
	})
	return seconds
}

// TestAFleetDoesNotMoveInStep starts 2,000 daemons in the same second: a controller sees an even load from the first interval on.
func TestAFleetDoesNotMoveInStep(t *testing.T) {
	const n = 2000
	seconds := fleet(t, n, 20*time.Minute, func(time.Duration) bool { return false })
	mean, most, total := n/30, 0, 0
	for i, s := range seconds {
		most = max(most, s)
		total += s
		if s > 2*mean {
			t.Errorf("%d renewals in second %d, want at most twice the mean of %d", s, i, mean)
		}
	}
	t.Logf("%d renewals in 20 minutes, at most %d in a second, mean %d", total, most, mean)
	if total < n*36 || total > n*44 {
		t.Errorf("%d renewals in 20 minutes, want about %d", total, n*40)
	}
}

// TestAFleetComesBackSpreadOut takes the controller away for five minutes.
func TestAFleetComesBackSpreadOut(t *testing.T) {
	const n = 2000
	away := func(since time.Duration) bool { return since > 5*time.Minute && since < 10*time.Minute }
	seconds := fleet(t, n, 20*time.Minute, away)
	most := 0
	for i, s := range seconds[300:] {
		if most = max(most, s); s > n/8 {
			t.Errorf("%d renewals in second %d of the outage or after it", s, i+300)
		}
	}
	t.Logf("at most %d renewals in a second during and after the outage", most)
}
