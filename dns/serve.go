package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/internal/localsocket"
	"code.cloudfoundry.org/silk/internal/metrics"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

// Addresses says where a program listens; what it does not serve is empty.
type Addresses struct {
	DNS                              []netip.AddrPort
	Lookup, Adapter, LogLevel, Debug string
}

var (
	apiLimits     = service.Limits{Body: 15 * time.Second, Write: 15 * time.Second, Idle: 2 * time.Minute}
	adapterLimits = service.Limits{Header: 5 * time.Second, Body: 10 * time.Second, Write: 30 * time.Second, Idle: 2 * time.Minute}
	debugLimits   = service.Limits{Header: 5 * time.Second, Body: 15 * time.Second, Write: 5 * time.Minute, Idle: 2 * time.Minute} // a profile takes a minute
)

// listeners are opened together: if one cannot be, none is.
type listeners struct {
	log   *slog.Logger
	open  []net.Listener
	tasks []service.Task
	errs  []error
}

// add has h served at host and port, and returns where that is. An empty port is none.
func (l *listeners) add(name, host, port string, serve func(ln net.Listener) (service.Task, error)) string {
	if port == "" {
		return ""
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		l.errs = append(l.errs, fmt.Errorf("%s: Address (%s) not available: %w", name, host, err))
		return ""
	}
	l.open = append(l.open, ln)
	t, err := serve(ln)
	if err != nil {
		l.errs = append(l.errs, fmt.Errorf("%s: %w", name, err))
		return ""
	}
	l.tasks = append(l.tasks, t)
	return ln.Addr().String()
}

// done returns the tasks, or closes everything and returns what went wrong.
func (l *listeners) done() ([]service.Task, error) {
	if len(l.errs) == 0 {
		return l.tasks, nil
	}
	for _, ln := range l.open {
		ln.Close()
	}
	return nil, errors.Join(l.errs...)
}

// serve opens what answers.
func (p *program) serve(level *slog.LevelVar) ([]service.Task, error) {
	var at Addresses
	l := &listeners{log: p.log}
	requests := metrics.NewRequests(prefix, "api")
	if p.cfg.lookupOn() {
		at.Lookup = l.add("lookup", p.cfg.Address, p.cfg.Port, func(ln net.Listener) (service.Task, error) {
			tc, err := p.cfg.serverTLS()
			if err != nil {
				return service.Task{}, err
			}
			limits := apiLimits
			limits.Header = p.cfg.headerTimeout()
			h := registrationhttp.Controller(p.book.table, p.book.Warm, requests.Observe("lookup"))
			return service.HTTP("lookup", ln, tc, h, limits, p.log), nil
		})
	}
	host, port := p.cfg.adapter()
	at.Adapter = l.add("adapter", host, port, func(ln net.Listener) (service.Task, error) {
		h := registrationhttp.Adapter(registrationhttp.OfTable(p.book.table, p.book.Warm), p.log, registrationhttp.AdapterOptions{Observe: requests.Observe("adapter")})
		return service.HTTP("adapter", ln, nil, h, adapterLimits, p.log), nil
	})
	show := &show{p: p, requests: requests}
	p.cfg.inside(l, &at, level, p.log, show.handler(level))
	tasks, err := l.done()
	if err != nil {
		return nil, err
	}
	if debug, err := netip.ParseAddrPort(at.Debug); err == nil {
		// Programs of the host that have to know that it is silk-dns ask here: anybody can take a port while it is away.
		h := registrationhttp.NamesHandler(p.book.table, p.book.Warm)
		tasks = append(tasks, localsocket.Task("names", registrationhttp.NamesSocket(debug.Port()), h, p.log))
	}
	if p.server != nil {
		tasks = append([]service.Task{{Name: "dns", Run: p.server.Run, Ready: p.server.Ready()}}, tasks...)
	}
	return append(tasks, p.cfg.started(p.log, func() Addresses {
		if p.server != nil {
			at.DNS = p.server.Addresses()
		}
		return at
	})), nil
}

// inside opens the listeners that people and their tools use.
func (c *Config) inside(l *listeners, at *Addresses, level *slog.LevelVar, log *slog.Logger, h *http.ServeMux) {
	if c.LogLevelPort > 0 {
		at.LogLevel = l.add("log-level", c.LogLevelAddress, strconv.Itoa(c.LogLevelPort), func(ln net.Listener) (service.Task, error) {
			limits := debugLimits
			limits.Header = c.headerTimeout()
			return service.HTTP("log-level", ln, nil, logLevel(level, log, h), limits, log), nil
		})
	}
	if c.DebugPort != nil {
		at.Debug = l.add("debug", c.DebugHost, strconv.Itoa(*c.DebugPort), func(ln net.Listener) (service.Task, error) {
			return service.HTTP("debug", ln, nil, h, debugLimits, log), nil
		})
	}
}

// started tells that everything before it listens.
func (c *Config) started(log *slog.Logger, at func() Addresses) service.Task {
	ready := make(chan struct{})
	return service.Task{Name: "started", Ready: ready, Run: func(ctx context.Context) error {
		a := at()
		log.Info("serving", "form", c.Form.String(), "dns", fmt.Sprint(a.DNS), "lookup", a.Lookup, "adapter", a.Adapter, "log_level", a.LogLevel, "debug", a.Debug)
		if c.Started != nil {
			c.Started(a)
		}
		close(ready)
		<-ctx.Done()
		return nil
	}}
}

// logLevel is the log-level listener of the deployed programs (section 2.6 of the contract). For a form without a debug listener it shows metrics and health too.
func logLevel(level *slog.LevelVar, log *slog.Logger, inner http.Handler) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/log-level", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 64))
		switch string(b) {
		case "info":
			level.Set(slog.LevelInfo)
		case "debug":
			level.Set(slog.LevelDebug)
		default:
			log.Warn("Invalid log level requested", "level", string(b))
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		log.Info("log level changed", "level", string(b))
		w.WriteHeader(http.StatusNoContent)
	})
	m.Handle("/metrics", inner)
	m.Handle("/health", inner)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		m.ServeHTTP(w, r)
	})
}

// reverse returns the ranges of which all names are known here: those that an operator says, not those that are only believed. Who believes every address
// does not say that he knows them all.
func reverse(cfg Config) []netip.Prefix {
	if cfg.Form != Own {
		return nil
	}
	return slices.DeleteFunc(cfg.ranges(), func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// runAdapter is the deployed adapter: it has no table, and asks controllers.
func runAdapter(ctx context.Context, cfg Config, level *slog.LevelVar, log *slog.Logger) error {
	tc, err := service.Certificates{CA: cfg.CACert, Cert: cfg.ClientCert, Key: cfg.ClientKey}.Client()
	if err != nil {
		return err
	}
	lookup, err := registrationhttp.NewLookup(cfg.controllers(), tc, registrationhttp.LookupOptions{})
	if err != nil {
		return err
	}
	defer lookup.Close()
	var at Addresses
	l := &listeners{log: log}
	requests := metrics.NewRequests(prefix, "api")
	at.Adapter = l.add("adapter", cfg.Address, cfg.Port, func(ln net.Listener) (service.Task, error) {
		h := registrationhttp.Adapter(lookup.Resolve, log, registrationhttp.AdapterOptions{Observe: requests.Observe("adapter")})
		return service.HTTP("adapter", ln, nil, h, adapterLimits, log), nil
	})
	show := &show{requests: requests}
	cfg.inside(l, &at, level, log, show.handler(level))
	tasks, err := l.done()
	if err != nil {
		return err
	}
	return service.Run(ctx, log, append(tasks, cfg.started(log, func() Addresses { return at }))...)
}
