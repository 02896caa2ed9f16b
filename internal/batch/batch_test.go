package batch_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"code.cloudfoundry.org/silk/internal/batch"
)

var errEnded = errors.New("ended")

func limits(calls, weight int) batch.Limits[int] {
	return batch.Limits[int]{Calls: calls, Weight: weight, Weigh: func(q int) int { return q }, Wait: 2 * time.Millisecond}
}

// serve doubles numbers until ctx ends, in batches whose sizes it returns; each batch takes a while.
func serve(ctx context.Context, q *batch.Queue[int, int], while time.Duration) (sizes []int) {
	for {
		select {
		case <-ctx.Done():
			q.End()
			return sizes
		case c := <-q.Calls():
			all := q.Gather(c)
			start := time.Now()
			<-time.After(while)
			for _, c := range all {
				if c.Question < 0 {
					c.Answer(0, errors.New("negative"))
				} else {
					c.Answer(2*c.Question, nil)
				}
			}
			sizes = append(sizes, len(all))
			q.Served(len(all), time.Since(start))
		}
	}
}

// TestCallersShareBatches has callers that ask again at once end up in the same batches.
func TestCallersShareBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := batch.New[int, int](limits(100, 1<<30), errEnded)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan []int, 1)
		go func() { done <- serve(ctx, q, time.Millisecond) }()
		var wg sync.WaitGroup
		for c := range 10 {
			wg.Go(func() {
				for i := range 50 {
					if a, err := q.Do(t.Context(), 50*c+i); err != nil || a != 2*(50*c+i) {
						t.Errorf("the double of %d is %d, %v", 50*c+i, a, err)
					}
				}
			})
		}
		wg.Wait()
		cancel()
		if sizes := <-done; len(sizes) > 60 {
			t.Errorf("500 calls of 10 callers took %d batches, want about 50", len(sizes))
		}
		if _, err := q.Do(t.Context(), -1); !errors.Is(err, errEnded) {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestLimits(t *testing.T) {
	for _, c := range []struct{ calls, weight, most int }{{4, 1 << 30, 4}, {100, 10, 2}} {
		synctest.Test(t, func(t *testing.T) {
			q := batch.New[int, int](limits(c.calls, c.weight), errEnded)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan []int, 1)
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() { q.Do(t.Context(), 5) })
			}
			synctest.Wait()
			go func() { done <- serve(ctx, q, 0) }()
			wg.Wait()
			cancel()
			total := 0
			for _, n := range <-done {
				if total += n; n > c.most {
					t.Errorf("a batch of %d with %+v", n, c)
				}
			}
			if total != 20 {
				t.Errorf("%d calls were served, want 20", total)
			}
		})
	}
}

// TestWhoLeavesIsNotServed and who comes when the server has ended is told.
func TestWhoLeavesIsNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := batch.New[int, int](limits(100, 1<<30), errEnded)
		left, leave := context.WithCancel(t.Context())
		errs := make(chan error, 2)
		go func() { _, err := q.Do(left, 1); errs <- err }()
		synctest.Wait()
		leave()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("who left was told %v", err)
		}
		go func() { _, err := q.Do(t.Context(), -1); errs <- err }()
		synctest.Wait()
		if all := q.Gather(<-q.Calls()); len(all) != 1 || all[0].Question != -1 {
			t.Errorf("%d calls are to be served, want the one whose caller waits", len(all))
		}
		q.End()
		if err := <-errs; !errors.Is(err, errEnded) {
			t.Errorf("who waited at the end was told %v", err)
		}
		<-q.Ended()
	})
}
