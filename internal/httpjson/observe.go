package httpjson

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	logEvery = 10 * time.Second
	logLines = 20 // of one operation and status in logEvery
)

// Failures writes failed requests to the log, but not one line for each when a fleet meets an outage: beyond logLines they are counted, and the
// next line that is written says how many were left out. Metrics count all of them.
type Failures struct {
	Log *slog.Logger

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

// Write logs that an operation failed with a status, or counts it.
func (f *Failures) Write(ctx context.Context, level slog.Level, operation string, status int, args []any) {
	if !f.Log.Enabled(ctx, level) {
		return
	}
	omitted, ok := f.admit(failure{operation, status})
	if !ok {
		return
	}
	if omitted > 0 {
		args = append(args, "omitted", omitted)
	}
	f.Log.Log(ctx, level, "request failed", append(args, "operation", operation, "status", status)...)
}

// admit returns how many lines were left out before this one, or false to leave this one out too.
func (f *Failures) admit(k failure) (omitted int, ok bool) {
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

// Recorder remembers the status of an answer.
type Recorder struct {
	http.ResponseWriter
	Code int // http.StatusOK until another is written
}

// WriteHeader implements http.ResponseWriter.
func (r *Recorder) WriteHeader(status int) {
	r.Code = status
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController find the connection.
func (r *Recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// maxPath bounds a path in the log, in bytes: listeners let lines of a megabyte in.
const maxPath = 200

// Attrs are the facts about a request for the log, the path without its end if it is long.
func Attrs(r *http.Request) []any {
	a := []any{"method", r.Method, "path", r.URL.Path[:min(len(r.URL.Path), maxPath)], "remote", r.RemoteAddr}
	if tp := r.Header.Get("Traceparent"); IsTraceparent(tp) {
		a = append(a, "traceparent", tp)
	}
	return a
}

// IsTraceparent reports whether s has the form of a W3C Trace Context traceparent of version 00.
func IsTraceparent(s string) bool {
	if len(s) != 55 {
		return false
	}
	for i := range len(s) {
		dash := i == 2 || i == 35 || i == 52
		if dash != (s[i] == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(s[i])) {
			return false
		}
	}
	return true
}
