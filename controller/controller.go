// Package controller is the program silk-controller: the lease API over a database.
//
// It is stateless: all it knows is in the database, several controllers may share one, and any of them may be killed at any
// instruction. The package puts rooms together (lease/leasesql, lease/leasehttp, internal/service) and decides nothing about
// leases itself.
//
// Use: cfg, err := controller.Load(path); err = controller.Run(ctx, cfg, log).
package controller

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
)

// Addresses are what a running controller listens on.
type Addresses struct{ API, Health, Debug string }

// Run serves until ctx ends, then returns nil. Health and debug are served from the start, the API as soon as the database
// is connected and its schema up to date. An error says what ended it: a file, a port, a database that could not be used.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		// Most of the memory is that of thousands of waiting connections: with Go's default of 100 each costs up to 73 KiB at
		// the worst moment between two collections, so up to 57 KiB. leasebench measures both this and the speed.
		debug.SetGCPercent(60)
	}
	// With few daemons the heap is so small that it would be collected many times a second under load. This counts as heap, and
	// as it is never touched it takes no memory.
	ballast := make([]byte, 32<<20)
	defer runtime.KeepAlive(ballast)
	for _, w := range cfg.Warnings {
		log.Warn("configuration has a key without effect", "warning", w)
	}
	p, err := build(cfg, log)
	if err != nil {
		return err
	}
	health, err := net.Listen("tcp", hostPort("127.0.0.1", cfg.HealthCheckPort))
	if err != nil {
		return fmt.Errorf("listen for health checks: %w", err)
	}
	defer health.Close()
	debugging, err := net.Listen("tcp", hostPort("127.0.0.1", cfg.DebugServerPort))
	if err != nil {
		return fmt.Errorf("listen for debugging: %w", err)
	}
	defer debugging.Close()
	p.addresses = Addresses{Health: health.Addr().String(), Debug: debugging.Addr().String()}
	level := cfg.Level
	if level == nil {
		level = new(slog.LevelVar)
	}
	lim := service.DefaultLimits
	lim.Write = 5 * time.Minute // profiles take as long as they are asked to
	loop := &reconcile.Loop{Name: "capacity", Step: p.watchCapacity, Log: log, Resync: seconds(cfg.MetricsEmit)}
	tasks := []service.Task{
		service.HTTP("debug", debugging, nil, service.Debug(level), lim, log),
		service.HTTP("health", health, nil, p.health(), service.DefaultLimits, log),
		p.storeTask(),
		p.apiTask(),
		{Name: "capacity", Run: loop.Run},
	}
	if p.ca != nil {
		p.ca.look(ctx) // what is wrong with it is no reason to give no leases
		look := &reconcile.Loop{Name: "container-ca", Step: p.ca.look, Log: log, Resync: rootEvery}
		tasks = append(tasks, service.Task{Name: "container-ca", Run: look.Run})
	}
	return service.Run(ctx, log, tasks...)
}

// program is a controller that is being put together or runs.
type program struct {
	cfg       Config
	log       *slog.Logger
	store     leasesql.Config
	certs     service.Certificates
	opened    atomic.Pointer[leasesql.Store] // nil until the database is connected
	metrics   *figures
	alarms    map[lease.Kind]*alarm // of the capacity loop only
	addresses Addresses
	ca        *containerCA // nil: there is none
}

func build(cfg Config, log *slog.Logger) (*program, error) {
	pool, err := lease.NewPool(cfg.Network, cfg.SubnetPrefixLength)
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	db := *cfg.Database
	db.MaxOpen, db.MaxIdle, db.MaxLifetime = cfg.MaxOpenConnections, cfg.MaxIdleConnections, seconds(cfg.ConnectionsMaxLifetime)
	p := &program{
		cfg: cfg, log: log, alarms: map[lease.Kind]*alarm{},
		certs: service.Certificates{CA: cfg.CACertFile, Cert: cfg.ServerCertFile, Key: cfg.ServerKeyFile},
		store: leasesql.Config{
			DB: db, Pool: pool, Expiration: seconds(cfg.LeaseExpiration), Staleness: seconds(cfg.StalenessThreshold),
			ReuseDelay: seconds(cfg.ReuseDelay), WatchWait: 2 * leasehttp.MaxWait, // the API bounds waits itself
		},
	}
	for _, k := range kinds {
		p.alarms[k] = new(alarm)
	}
	p.metrics = newFigures(p.opened.Load)
	if cfg.ContainerCA.CertFile != "" {
		p.ca = newContainerCA(cfg, log, p.metrics.registry)
	}
	if _, err := p.certs.Server(); err != nil { // before minutes are spent on a database
		return nil, fmt.Errorf("mutual tls: %w", err)
	}
	return p, nil
}

// storeTask opens the database, is ready then, and does the store's work.
func (p *program) storeTask() service.Task {
	ready := make(chan struct{})
	return service.Task{Name: "store", Ready: ready, Run: func(ctx context.Context) error {
		p.log.Info("connecting to the database", "type", p.cfg.Database.Type, "host", p.cfg.Database.Host, "path", p.cfg.Database.Path)
		s, err := leasesql.Open(ctx, p.store, p.log)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("connect to the database: %w", err)
		}
		defer s.Close()
		p.opened.Store(s)
		close(ready)
		return s.Run(ctx)
	}}
}

// apiTask listens only when it is started: who connects before there is a database is refused at once and asks another
// controller.
func (p *program) apiTask() service.Task {
	ready := make(chan struct{})
	return service.Task{Name: "api", Ready: ready, Run: func(ctx context.Context) error {
		tc, err := p.certs.Server()
		if err != nil {
			return fmt.Errorf("mutual tls: %w", err)
		}
		ln, err := net.Listen("tcp", hostPort(p.cfg.ListenHost, p.cfg.ListenPort))
		if err != nil {
			return err
		}
		defer ln.Close()
		h := leasehttp.Handler(p.opened.Load(), p.log, leasehttp.HandlerOptions{
			BindUnderlay: p.cfg.BindUnderlayToCertificate, Observe: p.metrics.requests.Observe(),
		})
		if p.ca != nil {
			h = p.ca.beside(h, p.opened.Load(), p.metrics.requests)
		}
		t := service.HTTP("api", ln, tc, p.metrics.inFlight(h), service.DefaultLimits, p.log)
		served := make(chan error, 1)
		go func() { served <- t.Run(ctx) }()
		<-t.Ready
		p.addresses.API = ln.Addr().String()
		p.log.Info("serving", "api", p.addresses.API, "health", p.addresses.Health, "debug", p.addresses.Debug)
		if p.cfg.Started != nil {
			p.cfg.Started(p.addresses)
		}
		close(ready)
		return <-served
	}}
}

// watchCapacity warns when the range has become full to another of the steps.
func (p *program) watchCapacity(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st, err := p.opened.Load().Stats(ctx)
	if err != nil {
		return fmt.Errorf("count leases: %w", err)
	}
	for _, k := range kinds {
		size, free := room(st, k)
		if step := p.alarms[k].look(size-free, size); step > 0 {
			p.log.Warn("the overlay range is filling up: enlarge network or release what is not used", "kind", k.String(),
				"percent", step, "used", size-free, "size", size, "network", p.cfg.Network)
		}
		p.metrics.alarm.WithLabelValues(k.String()).Set(float64(p.alarms[k].step))
	}
	return nil
}

// room returns how many leases of a kind there can be and how many are free.
func room(st leasesql.Stats, k lease.Kind) (size, free uint64) {
	if k == lease.Single {
		return st.SinglePool, st.FreeSingles
	}
	return st.BlockPool, st.FreeBlocks
}

// health serves GET /health and GET /metrics.
func (p *program) health() http.Handler {
	return p.metrics.serve(func(ctx context.Context) error {
		s := p.opened.Load()
		if s == nil {
			return fmt.Errorf("the database is not connected yet")
		}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return s.Ping(ctx)
	}, p.log)
}
