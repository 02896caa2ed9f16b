// Package service holds what every long-running program of Silk shares: tasks that start in order and stop in
// reverse, HTTP listeners with timeouts, mutual TLS, the debug endpoints, logs.
//
// It knows no nouns. A program's Run builds its tasks and hands them to Run here.
package service

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Task is a long-running part. Run returns nil when its context ends; anything else, or an earlier return, ends the program.
type Task struct {
	Name  string
	Run   func(ctx context.Context) error
	Ready <-chan struct{} // closed when the next task may start; nil: at once
}

// Run starts tasks in order and stops them in reverse order when ctx ends or one of them returns. It returns nil after a clean
// stop, else what the failing tasks returned.
func Run(ctx context.Context, log *slog.Logger, tasks ...Task) error {
	type exit struct {
		i   int
		err error
	}
	exits := make(chan exit, len(tasks))
	cancels := make([]context.CancelFunc, 0, len(tasks))
	running := map[int]bool{}
	var errs []error
	note := func(e exit, expected bool) {
		delete(running, e.i)
		switch {
		case e.err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", tasks[e.i].Name, e.err))
		case !expected:
			errs = append(errs, fmt.Errorf("%s: stopped by itself", tasks[e.i].Name))
		}
	}
start:
	for i, t := range tasks {
		tctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		cancels = append(cancels, cancel)
		running[i] = true
		go func() { exits <- exit{i, t.Run(tctx)} }()
		if t.Ready == nil {
			continue
		}
		select {
		case <-t.Ready:
		case <-ctx.Done():
			break start
		case e := <-exits:
			note(e, false)
			break start
		}
	}
	if len(errs) == 0 && ctx.Err() == nil {
		log.Info("running")
		select {
		case <-ctx.Done():
		case e := <-exits:
			note(e, false)
		}
	}
	for i := len(cancels) - 1; i >= 0; i-- {
		cancels[i]()
		for running[i] {
			e := <-exits
			note(e, e.i >= i || ctx.Err() != nil)
		}
	}
	log.Info("exited")
	return errors.Join(errs...)
}

// Signals returns a context that ends on SIGINT or SIGTERM.
func Signals() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
}

// Exit is the end of main: 0 for a nil error, else the error on standard error and 1.
func Exit(program string, err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintf(os.Stderr, "%s error: %v\n", program, err)
	os.Exit(1)
}

// Logger returns a JSON logger on w's level variable, and the variable.
func Logger(program string, level slog.Level) (*slog.Logger, *slog.LevelVar) {
	v := new(slog.LevelVar)
	v.Set(level)
	return slog.New(slog.NewJSONHandler(os.Stdout, &slog.HandlerOptions{Level: v})).With("source", program), v
}

// ParseLevel reads debug, info, warn, error or fatal (which means error), their first letters or digits 0 to 3, in
// any case.
func ParseLevel(s string) (slog.Level, bool) {
	switch s {
	case "debug", "DEBUG", "d", "0":
		return slog.LevelDebug, true
	case "info", "INFO", "i", "1":
		return slog.LevelInfo, true
	case "warn", "WARN", "w":
		return slog.LevelWarn, true
	case "error", "ERROR", "e", "2", "fatal", "FATAL", "f", "3":
		return slog.LevelError, true
	}
	return 0, false
}

// Limits bound what one connection may cost a listener.
type Limits struct {
	Header time.Duration // to read a request's header
	Body   time.Duration // to read the whole request
	Write  time.Duration // from the end of the header to the end of the answer; long polls extend theirs
	Idle   time.Duration // between requests
	Head   int           // of a request's header, in bytes; 0: 64 KiB
}

// DefaultLimits suit JSON APIs with short bodies.
var DefaultLimits = Limits{Header: 5 * time.Second, Body: 15 * time.Second, Write: 60 * time.Second, Idle: 120 * time.Second}

// connections logs what net/http has to say: that a handler panicked is an error of ours, all else, such as failed handshakes, is what peers do.
type connections struct{ log *slog.Logger }

// Write implements io.Writer.
func (c connections) Write(b []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.HasPrefix(b, []byte("http: panic serving")) {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, string(bytes.TrimSpace(b)))
	return len(b), nil
}

// HTTP returns a task that serves h on ln, with TLS if tc is not nil. When it is stopped it closes the listener and idle
// connections and gives running requests 10 s.
func HTTP(name string, ln net.Listener, tc *tls.Config, h http.Handler, lim Limits, log *slog.Logger) Task {
	ready := make(chan struct{})
	return Task{Name: name, Ready: ready, Run: func(ctx context.Context) error {
		base, cancel := context.WithCancel(context.Background())
		defer cancel()
		s := &http.Server{
			Handler: h, ReadHeaderTimeout: lim.Header, ReadTimeout: lim.Body, WriteTimeout: lim.Write, IdleTimeout: lim.Idle,
			MaxHeaderBytes: cmp.Or(lim.Head, 64<<10), ErrorLog: stdlog.New(connections{log}, "", 0),
			BaseContext: func(net.Listener) context.Context { return base },
		}
		if tc != nil {
			ln = tls.NewListener(ln, tc)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(ln) }()
		close(ready)
		select {
		case err := <-served:
			return err
		case <-ctx.Done():
		}
		cancel() // long polls answer at once
		stop, done := context.WithTimeout(context.Background(), 10*time.Second)
		defer done()
		if err := s.Shutdown(stop); err != nil {
			s.Close()
		}
		<-served
		return nil
	}}
}
