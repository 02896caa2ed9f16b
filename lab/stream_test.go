package lab_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/lab"
)

// stream looks names up from a container without pause, until stop, which returns how many lookups there were and what failed.
type stream struct {
	stop chan struct{}
	done chan struct{}
	n    int
	bad  []string

	began  time.Time // of the failures that are going on; zero: none are
	failed []time.Duration
}

// note keeps for how long lookups failed on end: from when the first of them began until one began that succeeds.
func (st *stream) note(begun time.Time, ok bool) {
	switch {
	case !ok && st.began.IsZero():
		st.began = begun
	case ok && !st.began.IsZero():
		st.failed, st.began = append(st.failed, begun.Sub(st.began)), time.Time{}
	}
}

// pauses returns for how long lookups failed on end. The stream has ended.
func (st *stream) pauses() []time.Duration {
	if !st.began.IsZero() {
		return append(st.failed, time.Since(st.began))
	}
	return st.failed
}

// startStream asks each name in turn, from within a container, and expects its addresses. What is tried again counts as one lookup, as by the resolver
// of a C library with attempts of a second each.
func startStream(t *testing.T, s lab.Status, from string, attempts int, timeout time.Duration, names map[string][]string) *stream {
	t.Helper()
	c := clientOf(t, s, from)
	st := &stream{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(st.done)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			for name, want := range names {
				select {
				case <-st.stop:
					return
				case <-tick.C:
				}
				st.n++
				begun := time.Now()
				var got []string
				var err error
				for range attempts {
					if got, err = c.addresses(name, timeout); err == nil {
						break
					}
				}
				st.note(begun, err == nil)
				if err != nil || !slices.Equal(got, want) {
					st.bad = append(st.bad, fmt.Sprintf("%s at %s after %v: %v, %v, want %v", name, begun.Format("05.000"), time.Since(begun).Round(time.Millisecond), got, err, want))
				}
			}
		}
	}()
	t.Cleanup(func() { st.end() })
	return st
}

func (st *stream) end() (n int, bad []string) {
	select {
	case <-st.stop:
	default:
		close(st.stop)
	}
	<-st.done
	return st.n, st.bad
}
