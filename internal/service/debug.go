package service

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strconv"
	"strings"
)

// Debug returns the handler of a program's debug listener: /debug/pprof, /log-level (the body sets the level; always
// 200, so a GET is a liveness probe), /block-profile-rate and /mutex-profile-fraction.
func Debug(level *slog.LevelVar) *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("/debug/pprof/", pprof.Index)
	m.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	m.HandleFunc("/debug/pprof/profile", pprof.Profile)
	m.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	m.HandleFunc("/debug/pprof/trace", pprof.Trace)
	m.HandleFunc("/log-level", func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 64))
		if l, ok := ParseLevel(strings.TrimSpace(string(b))); ok {
			level.Set(l)
		}
	})
	m.HandleFunc("/block-profile-rate", number(runtime.SetBlockProfileRate))
	m.HandleFunc("/mutex-profile-fraction", number(func(n int) { runtime.SetMutexProfileFraction(max(n, 0)) }))
	return m
}

func number(set func(int)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 64))
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			http.Error(w, "body: expected a whole number", http.StatusBadRequest)
			return
		}
		set(n)
	}
}
