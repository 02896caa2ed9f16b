package policyhttp

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/internal/httpjson"
)

// prober asks the database whether it is there, once for all who want to know at a time: anybody may ask, as often as they like.
type prober struct {
	ping  func(ctx context.Context) error
	turn  chan struct{} // of the one who asks; guards what follows
	began time.Time
	err   error
}

func newProber(ping func(ctx context.Context) error) *prober {
	return &prober{ping: ping, turn: make(chan struct{}, 1)}
}

// probeTime bounds one question to the database.
const probeTime = 5 * time.Second

// ask returns what the database said to a question that was put after the call.
func (p *prober) ask(ctx context.Context) error {
	called := time.Now()
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if p.began.After(called) {
		return p.err
	}
	// The caller may leave; the answer is for others too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTime)
	defer cancel()
	p.began = time.Now()
	p.err = p.ping(ctx)
	return p.err
}

// HealthHandler serves GET / and GET /health as the health listener of the deployed internal server does.
func HealthHandler(ping func(ctx context.Context) error, log *slog.Logger) http.Handler {
	started := time.Now()
	f := &httpjson.Failures{Log: log}
	database := newProber(ping)
	m := http.NewServeMux()
	m.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { writeUptime(w, started) })
	m.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*probeTime)
		defer cancel()
		if err := database.ask(ctx); err != nil {
			f.Write(r.Context(), slog.LevelWarn, "health", http.StatusInternalServerError, []any{"error", err})
			httpjson.WriteError(w, http.StatusInternalServerError, "check database failed")
		}
	})
	return m
}
