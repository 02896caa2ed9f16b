package testkit

import (
	"testing"
	"time"
)

// Within looks again and again until nothing is wrong, and fails the test with what still is when that takes longer than d.
func Within(t testing.TB, d time.Duration, wrong func() string) {
	t.Helper()
	deadline := time.After(d)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		last := wrong()
		if last == "" {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v: %s", d, last)
		}
	}
}

// Until is Within for what is true or not.
func Until(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	Within(t, d, func() string {
		if ok() {
			return ""
		}
		return what
	})
}
