package dns

import (
	"log/slog"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/registration"
)

// TestAWarmTableIsAskedWithoutWaiting: a question for a name that is not there asks whether the table is whole. While somebody works at it for long, all who
// answer would stand still, for others too.
func TestAWarmTableIsAskedWithoutWaiting(t *testing.T) {
	b := newBook(DefaultConfig(), slog.New(slog.DiscardHandler))
	b.restore(registration.NewTable(), time.Now())
	if !b.Warm() {
		t.Fatal("a table of just now is not warm")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	said := make(chan bool, 1)
	go func() { said <- b.Warm() }()
	select {
	case warm := <-said:
		if !warm {
			t.Error("it is not warm any more")
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits for who works at the table")
	}
}
