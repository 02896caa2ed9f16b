package leasehttp

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	logEvery = 10 * time.Second
	logLines = 20 // of one operation and status in logEvery
)

// failures writes failed requests to the log, but not one line for each when a fleet meets an outage: beyond logLines they are counted, and the
// next line that is written says how many were left out. Metrics count all of them.
type failures struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[failure]*failed // a handful: both members come from our own code
}

type failure struct {
	operation string
	status    int
}

type failed struct {
	since          time.Time
	lines, omitted int
}

func (f *failures) write(ctx context.Context, level slog.Level, operation string, status int, args []any) {
	if !f.log.Enabled(ctx, level) {
		return
	}
	omitted, ok := f.admit(failure{operation, status})
	if !ok {
		return
	}
	if omitted > 0 {
		args = append(args, "omitted", omitted)
	}
	f.log.Log(ctx, level, "request failed", append(args, "operation", operation, "status", status)...)
}

// admit returns how many lines were left out before this one, or false to leave this one out too.
func (f *failures) admit(k failure) (omitted int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kinds == nil {
		f.kinds = map[failure]*failed{}
	}
	s := f.kinds[k]
	if s == nil {
		s = &failed{}
		f.kinds[k] = s
	}
	if now := time.Now(); now.Sub(s.since) >= logEvery {
		s.since, s.lines = now, 0
	}
	if s.lines == logLines {
		s.omitted++
		return 0, false
	}
	s.lines++
	omitted, s.omitted = s.omitted, 0
	return omitted, true
}
