// Package dns is silk-dns, service discovery: it hears on NATS what containers are called, keeps that, and answers DNS, the lookup API of the deployed
// service-discovery-controller and the HTTP API of the deployed bosh-dns-adapter. On a host it also tells others what the host's own containers are called.
//
// It decides little itself: registration knows messages, the table and when names are stale, dns/dnsserver answers DNS, registration/registrationhttp the
// two APIs. Here they are brought together with NATS, the endpoint records, the state directory and the configuration.
//
// Use: Load a configuration, Run it until the context ends.
package dns

import (
	"context"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/registration"
)

const (
	saveGap = 10 * time.Second // between two snapshots of a table that changes
	saveMax = time.Minute      // between two snapshots whatever happens: an old one makes no table whole
)

// Run is silk-dns: it returns nil when ctx ends, and an error when what is configured cannot be. level is what the debug and log-level listeners change.
func Run(ctx context.Context, cfg Config, level *slog.LevelVar, log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // a table is large for long; what is heard is garbage at once
	}
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "warning", w)
	}
	if cfg.Form == Adapter {
		return runAdapter(ctx, cfg, level, log)
	}
	p, err := open(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer p.state.close()
	return p.run(ctx, level)
}

// program is silk-dns with a table of its own.
type program struct {
	cfg    Config
	log    *slog.Logger
	state  *state
	book   *book
	ear    *ear
	crier  *crier // nil: nothing is advertised
	server *dnsserver.Server
	locals locals

	saving  *reconcile.Loop
	pruning *reconcile.Loop
	saved   struct { // of the last snapshot, for the loop alone
		turn uint64
		at   time.Time
		warm bool
	}
}

// open prepares everything and reads what was known last. Nothing listens yet.
func open(ctx context.Context, cfg Config, log *slog.Logger) (*program, error) {
	p := &program{cfg: cfg, log: log, book: newBook(cfg, log)}
	var err error
	if p.ear, err = newEar(cfg, log); err != nil {
		return nil, err
	}
	p.state = openState(ctx, cfg.StateDir, log)
	p.restore()
	if cfg.EndpointDir != "" {
		if p.crier, err = newCrier(cfg, p.book, p.ear, p.state, log); err != nil {
			p.state.close()
			return nil, err
		}
	}
	if len(cfg.ListenDNS) > 0 {
		if err := p.prepare(); err != nil {
			p.state.close()
			return nil, err
		}
	}
	p.locals = locals{addresses: linkLocals(cfg), log: log}
	p.ear.hear, p.ear.up, p.ear.down, p.ear.asked = p.book.hear, p.up, p.book.disconnected, p.asked
	p.saving = &reconcile.Loop{Name: "state", Step: p.save, Log: log, Resync: saveGap}
	p.pruning = &reconcile.Loop{Name: "pruning", Step: p.prune, Log: log, Resync: seconds(cfg.Pruning)}
	return p, nil
}

// prepare makes the DNS server.
func (p *program) prepare() error {
	sockets, listen, err := inherited(addrPorts(p.cfg.ListenDNS))
	if err != nil {
		return err
	}
	p.server, err = dnsserver.New(dnsserver.Config{
		Listen: listen, Sockets: sockets, Table: p.book.table, Domains: p.cfg.domains(), Reverse: reverse(p.cfg), TTL: seconds(p.cfg.TTL),
		Warm: p.book.Warm, Forward: addrPorts(p.cfg.Forward),
	}, p.log)
	return err
}

// restore begins with the table of the last snapshot, or an empty one.
func (p *program) restore() {
	t, taken := p.state.names(registration.Limits{}, p.book.ranges, p.book.clock())
	if t == nil {
		p.book.table = registration.NewTable()
		return
	}
	p.book.restore(t, taken)
	names, all := t.Len()
	p.log.Info("names restored", "names", names, "registrations", all, "taken", taken.UTC(), "warm", p.book.Warm())
}

// up is called when NATS is heard.
func (p *program) up() {
	p.book.connected()
	if p.crier != nil {
		p.crier.connected()
	}
}

// asked is called when somebody on NATS wants everything told again.
func (p *program) asked(interval time.Duration) {
	if p.crier != nil {
		p.crier.asked(interval)
	}
}

// run serves until ctx ends.
func (p *program) run(ctx context.Context, level *slog.LevelVar) error {
	var tasks []service.Task
	if len(p.locals.addresses) > 0 {
		p.locals.hold()
		tasks = append(tasks, service.Task{Name: "local-address", Run: p.locals.loop().Run})
	}
	if p.crier != nil {
		if err := p.crier.look(ctx); err != nil { // before anybody asks
			p.log.Warn("containers could not be listed", "error", err)
		}
	}
	serving, err := p.serve(level)
	if err != nil {
		return err
	}
	tasks = append(tasks, service.Task{Name: "state", Run: p.keep})
	tasks = append(tasks, serving...)
	tasks = append(tasks, service.Task{Name: "pruning", Run: p.pruning.Run})
	if p.crier != nil {
		tasks = append(tasks,
			service.Task{Name: "containers", Run: p.crier.looking.Run},
			service.Task{Name: "container-watch", Run: p.crier.watch},
			service.Task{Name: "advertising", Run: p.crier.run},
		)
	}
	return service.Run(ctx, p.log, append(tasks, service.Task{Name: "nats", Run: p.ear.run})...)
}

func (p *program) prune(context.Context) error {
	p.book.prune()
	return nil
}

// keep saves the table now and then, and at the end.
func (p *program) keep(ctx context.Context) error {
	err := p.saving.Run(ctx)
	p.saved.at = time.Time{}
	p.save(context.WithoutCancel(ctx)) // an error has been said
	return err
}

// save writes a snapshot if there is something new to write. The table of a cold start is not whole, and says so by being of long ago.
func (p *program) save(context.Context) error {
	now, warm, turn := time.Now(), p.book.Warm(), p.book.table.Turn()
	if turn == p.saved.turn && warm == p.saved.warm && now.Sub(p.saved.at) < min(saveMax, seconds(p.cfg.Staleness)/3) {
		return nil
	}
	taken := now
	if !warm {
		taken = time.Unix(0, 0)
	}
	err := p.state.saveNames(func(w io.Writer) error { return p.book.table.Encode(w, taken, p.book.clock()) })
	if err == nil {
		p.saved.turn, p.saved.warm, p.saved.at = turn, warm, now
	}
	return nil // it has been said, and will be tried again
}
