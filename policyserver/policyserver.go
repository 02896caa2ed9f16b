// Package policyserver is the program policy-server: the external API, for people and programs that change policies, and the internal API, for
// the agents of hosts, over one database.
//
// It is stateless: all it knows is in the database, several may share one, and any of them may be killed at any instruction. Which
// of the two APIs is served follows from the configuration's keys. The package puts rooms together (policy/policysql,
// policy/policyhttp, internal/service), finds out who callers are (auth) and what they may do (cc), and removes what is stale.
//
// Use: cfg, err := policyserver.Load(path); err = policyserver.Run(ctx, cfg, log).
package policyserver

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policyserver/auth"
	"code.cloudfoundry.org/silk/policyserver/cc"
	"code.cloudfoundry.org/silk/policyserver/follow"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

// Addresses are what a running policy-server listens on; "" for what it does not.
type Addresses struct{ External, Internal, Health, Debug string }

// Run serves until ctx ends, then returns nil. Health and debug are served from the start, the APIs as soon as the database
// is connected and its schema up to date. An error says what ended it: a file, a port, a database that could not be used.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		// What is kept is small beside what thousands of waiting connections need: see leasebench and policybench.
		debug.SetGCPercent(50)
	}
	// With few agents the heap is so small that it would be collected many times a second under load. This counts as heap, and
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
	if cfg.InternalListenPort != nil && cfg.InternalClients == nil {
		log.Warn("every client of the authorities in ca_cert_file may use the internal API: list the names of agents' certificates in internal_clients")
	}
	tasks, err := p.tasks()
	defer p.close()
	if err != nil {
		return err
	}
	return service.Run(ctx, log, tasks...)
}

// program is a policy-server that is being put together or runs.
type program struct {
	cfg       Config
	log       *slog.Logger
	opened    atomic.Pointer[policysql.Store] // nil until the database is connected
	metrics   *figures
	external  *tls.Config // nil: without TLS
	internal  *tls.Config
	outbound  []*outbound.Client
	uaa       *auth.UAA
	oidc      *auth.OIDC
	who       auth.Method
	cc        *cc.Client     // nil: there is no Cloud Controller
	cleaner   *cleaner       // nil without cc
	syncer    *follow.Syncer // nil: this server does not follow Cloud Controller
	listeners []net.Listener
	addresses Addresses
}

// build reads the files that the configuration names, before minutes are spent on a database.
func build(cfg Config, log *slog.Logger) (*program, error) {
	p := &program{cfg: cfg, log: log}
	p.metrics = newFigures(p.opened.Load)
	var err error
	if cfg.InternalListenPort != nil {
		certs := service.Certificates{CA: cfg.CACertFile, Cert: cfg.InternalServerCertFile, Key: cfg.InternalServerKeyFile}
		if p.internal, err = certs.Server(); err != nil {
			return nil, fmt.Errorf("tls of the internal api: %w", err)
		}
	}
	if cfg.ListenPort == nil {
		return p, p.buildSyncer()
	}
	if cfg.EnableTLS {
		certs := service.Certificates{Cert: cfg.ServerCertFile, Key: cfg.ServerKeyFile}
		if cfg.MTLS != nil {
			certs.CA = cfg.MTLS.CAFile
		}
		if p.external, err = certs.Open(); err != nil {
			return nil, fmt.Errorf("tls of the external api: %w", err)
		}
	}
	if err := p.buildAuth(); err != nil {
		return p, err
	}
	return p, p.buildSyncer()
}

// buildSyncer prepares what follows Cloud Controller's security groups, if the configuration says how that is reached.
func (p *program) buildSyncer() error {
	if p.cfg.CCInternalURL == "" {
		return nil
	}
	tc, err := outbound.Trust(p.cfg.SkipSSLValidation, p.cfg.CCInternalCA)
	if err == nil && !p.cfg.SkipSSLValidation && p.cfg.CCInternalCert != "" {
		tc, err = service.Certificates{CA: p.cfg.CCInternalCA, Cert: p.cfg.CCInternalCert, Key: p.cfg.CCInternalKey}.Client()
	}
	if err != nil {
		return fmt.Errorf("cloud controller's internal api: %w", err)
	}
	if p.uaa == nil {
		if err := p.askUAA(); err != nil {
			return err
		}
	}
	inside := cc.New(cc.Config{Base: p.cfg.CCInternalURL, Tokens: cc.Tokens{Token: p.uaa.Token, Forget: p.uaa.Forget}}, p.ask(tc, "cloud controller's internal api"))
	store := func() *policysql.SecurityGroups {
		if s := p.opened.Load(); s != nil {
			return s.SecurityGroups()
		}
		return nil
	}
	p.syncer = follow.New(follow.Source{Stamp: inside.GroupsStamp, List: p.cc.SecurityGroups}, store, follow.Options{
		Name: p.cfg.UUID, Every: seconds(p.cfg.ASGStamp), Blind: seconds(p.cfg.ASGPollInterval), Refresh: seconds(p.cfg.ASGRefresh), Limit: seconds(p.cfg.ASGPass),
	}, p.log)
	p.metrics.registry.MustRegister(&followCollector{p.syncer.Status})
	return nil
}

func (p *program) buildAuth() error {
	var methods []auth.Method
	for _, m := range p.cfg.Auth {
		switch m {
		case "mtls":
			methods = append(methods, p.cfg.MTLS.Authenticate)
		case "tokens":
			t, err := auth.OpenTokens(p.cfg.TokenFile, p.log)
			if err != nil {
				return err
			}
			methods = append(methods, t.Authenticate)
		case "oidc":
			tc, err := outbound.Trust(false, p.cfg.OIDC.CAFile)
			if err != nil {
				return fmt.Errorf("oidc: %w", err)
			}
			p.oidc = auth.NewOIDC(*p.cfg.OIDC, p.ask(tc, "the issuer of tokens"), p.log)
			methods = append(methods, p.oidc.Authenticate)
		case "uaa":
			if err := p.buildUAA(); err != nil {
				return err
			}
			methods = append(methods, p.uaa.Authenticate)
		}
	}
	p.who = auth.FirstOf(methods...)
	return nil
}

func (p *program) buildUAA() error {
	if err := p.askUAA(); err != nil {
		return err
	}
	p.cleaner = &cleaner{
		log: p.log, metrics: p.metrics, share: p.cfg.CleanupMaxShare, parts: p.cc.Parts, spaces: p.cc.Spaces,
		book: func() book { return p.opened.Load() },
	}
	return nil
}

// askUAA prepares to ask UAA, and with its token Cloud Controller.
func (p *program) askUAA() error {
	tc, err := outbound.Trust(p.cfg.SkipSSLValidation, p.cfg.UAACA, p.cfg.CCCA)
	if err != nil {
		return fmt.Errorf("uaa and cloud controller: %w", err)
	}
	p.uaa = auth.NewUAA(auth.UAAConfig{
		Base: fmt.Sprintf("%s:%d", p.cfg.UAAURL, p.cfg.UAAPort), Client: p.cfg.UAAClient, Secret: p.cfg.UAAClientSecret, Issuer: p.cfg.UAAIssuer,
	}, p.ask(tc, "uaa"), p.log)
	p.cc = cc.New(cc.Config{Base: p.cfg.CCURL, Tokens: cc.Tokens{Token: p.uaa.Token, Forget: p.uaa.Forget}, Chunk: p.cfg.CCChunk}, p.ask(tc, "cloud controller"))
	return nil
}

// ask returns a client of another system, whose connections are closed in the end.
func (p *program) ask(tc *tls.Config, name string) *outbound.Client {
	c := outbound.New(tc, seconds(p.cfg.RequestTimeout), name)
	p.outbound = append(p.outbound, c)
	return c
}

func (p *program) close() {
	for _, l := range p.listeners {
		l.Close()
	}
	for _, c := range p.outbound {
		c.Close()
	}
}

// listen opens a listener that is closed in the end. Idle connections are probed less often than watches return: probes would be most of an
// idle fleet's traffic.
func (p *program) listen(host string, port int) (net.Listener, error) {
	ln, err := (&net.ListenConfig{KeepAlive: policyhttp.MaxWait + 15*time.Second}).Listen(context.Background(), "tcp", hostPort(host, port))
	if err == nil {
		p.listeners = append(p.listeners, ln)
	}
	return ln, err
}

// keysEvery is the time between two looks at the keys of an issuer of tokens.
const keysEvery = 5 * time.Minute

func (p *program) tasks() ([]service.Task, error) {
	debugging, err := p.listen(p.cfg.DebugServerHost, *p.cfg.DebugServerPort)
	if err != nil {
		return nil, fmt.Errorf("listen for debugging: %w", err)
	}
	p.addresses.Debug = debugging.Addr().String()
	lim := service.DefaultLimits
	lim.Write = 5 * time.Minute // profiles take as long as they are asked to
	tasks := []service.Task{service.HTTP("debug", debugging, nil, p.debugHandler(), lim, p.log)}
	if p.cfg.HealthCheckPort != nil {
		health, err := p.listen("127.0.0.1", *p.cfg.HealthCheckPort)
		if err != nil {
			return nil, fmt.Errorf("listen for health checks: %w", err)
		}
		p.addresses.Health = health.Addr().String()
		tasks = append(tasks, service.HTTP("health", health, nil, p.healthHandler(), service.DefaultLimits, p.log))
	}
	tasks = append(tasks, p.storeTask())
	if p.cleaner != nil { // callers have UAA's tokens
		tasks = append(tasks, p.loop("uaa keys", keysEvery, p.uaa.KeepKeys))
	}
	if p.oidc != nil {
		tasks = append(tasks, p.loop("oidc keys", keysEvery, p.oidc.KeepKeys))
	}
	if p.cfg.ListenPort != nil {
		tasks = append(tasks, p.apiTask("external", p.cfg.ListenHost, *p.cfg.ListenPort, p.external, p.externalHandler, &p.addresses.External))
	}
	if p.cfg.InternalListenPort != nil {
		tasks = append(tasks, p.apiTask("internal", p.cfg.InternalListenHost, *p.cfg.InternalListenPort, p.internal, p.internalHandler, &p.addresses.Internal))
	}
	tasks = append(tasks, p.startedTask(), p.loop("look", 15*time.Second, (&watcher{p: p}).look))
	if p.syncer != nil {
		tasks = append(tasks, service.Task{Name: "security groups", Run: p.syncer.Run})
	}
	if p.cleaner != nil {
		tasks = append(tasks, service.Task{Name: "cleaner", Run: func(ctx context.Context) error {
			return p.cleaner.run(ctx, seconds(p.cfg.CleanupInterval))
		}})
	}
	return tasks, nil
}

func (p *program) loop(name string, every time.Duration, step func(ctx context.Context) error) service.Task {
	l := &reconcile.Loop{Name: name, Step: step, Log: p.log, Resync: every}
	return service.Task{Name: name, Run: l.Run}
}

// storeTask opens the database, is ready then, and does the store's work.
func (p *program) storeTask() service.Task {
	ready := make(chan struct{})
	return service.Task{Name: "store", Ready: ready, Run: func(ctx context.Context) error {
		p.log.Info("connecting to the database", "type", p.cfg.Database.Type, "host", p.cfg.Database.Host, "path", p.cfg.Database.Path)
		s, err := policysql.Open(ctx, p.cfg.store(), p.log)
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

// store is what the store works with.
func (c *Config) store() policysql.Config {
	db := *c.Database
	db.MaxOpen, db.MaxIdle, db.MaxLifetime = c.MaxOpenConnections, c.MaxIdleConnections, seconds(c.ConnectionsMaxLifetime)
	quarantine := seconds(*c.TagQuarantine)
	if quarantine == 0 {
		quarantine = -1 // none: 0 would be the store's default
	}
	return policysql.Config{
		DB: db, TagLength: c.TagLength, MaxTag: identity.Tag(c.MaxTag), Quarantine: quarantine, WatchWait: policyhttp.MaxWait,
		CloudController: c.CCInternalURL != "",
	}
}

// apiTask listens only when it is started: who connects before there is a database is refused at once and asks another server.
func (p *program) apiTask(name, host string, port int, tc *tls.Config, handler func() http.Handler, addr *string) service.Task {
	ready := make(chan struct{})
	return service.Task{Name: name, Ready: ready, Run: func(ctx context.Context) error {
		ln, err := p.listen(host, port)
		if err != nil {
			return err
		}
		*addr = ln.Addr().String()
		lim := service.DefaultLimits
		lim.Head = 1 << 20            // agents and people name what they ask for in the request's line
		lim.Header = 20 * time.Second // which bounds TLS handshakes too: a whole fleet that comes at once has to get through
		lim.Body = 40 * time.Second
		t := service.HTTP(name, ln, tc, handler(), lim, p.log)
		served := make(chan error, 1)
		go func() { served <- t.Run(ctx) }()
		<-t.Ready
		close(ready)
		return <-served
	}}
}

// startedTask says that everything is served, once.
func (p *program) startedTask() service.Task {
	ready := make(chan struct{})
	return service.Task{Name: "started", Ready: ready, Run: func(ctx context.Context) error {
		a := p.addresses
		p.log.Info("serving", "external", a.External, "internal", a.Internal, "health", a.Health, "debug", a.Debug)
		if p.cfg.Started != nil {
			p.cfg.Started(a)
		}
		close(ready)
		<-ctx.Done()
		return nil
	}}
}
