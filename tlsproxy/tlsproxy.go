// Package tlsproxy is silk-tls, the part of Silk that ends TLS for containers: connections to a port of a container that its network names, 61443 by
// default, end in the container's own network namespace and reach another of its ports, 8080 by default, in clear. The bytes pass as they are.
//
// One process does it for all containers of the host, by sockets that it opens inside their namespaces. Which ports there are is in the endpoints'
// records (endpoint); what containers show comes from files of the platform or from the host's own authority (authority). It decides nothing about who
// may connect, but for clients that must show a certificate: policies do (policyagent), as for any port.
//
// Use: Load a configuration, Run it until the context ends.
package tlsproxy

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
)

// Descriptors that are kept from connections: for files and the debug server, and for each container, whose namespace and ports take some.
const (
	spareFiles     = 192
	filesContainer = 4
	manyContainers = 1024 // that the limit of descriptors is raised for
)

// Run is silk-tls: it returns nil when ctx ends, and an error when what is configured cannot be. level is what the debug listener changes.
func Run(ctx context.Context, cfg Config, level *slog.LevelVar, log *slog.Logger) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // memory is for connections
	}
	p, err := open(ctx, cfg, nil, log)
	if err != nil {
		return err
	}
	return p.run(ctx, level)
}

// proxy is the running program.
type proxy struct {
	cfg          Config
	log          *slog.Logger
	ns           *kernel.NS // the host's; nil: the process's own
	dir          *endpoint.Dir
	certificates certificates
	tasks        []service.Task    // of the certificates
	loops        []*reconcile.Loop // of the certificates, and follow
	who          asker             // nil: groups are not looked at
	state        *os.File          // the lock of the state directory; nil: there is none
	files        int               // descriptors that there may be
	said         complaints
	follow       *reconcile.Loop
	seen         pass

	mu       sync.Mutex
	sites    map[endpoint.Key]*site
	failures map[endpoint.Key]error // of containers without a site
	bad      int                    // records that cannot be read
	conns    int
	gone     figures // what happened at ports that are no more
	draining bool
}

// open makes ready what a configuration asks for. Run must follow, or close.
func open(ctx context.Context, cfg Config, ns *kernel.NS, log *slog.Logger) (*proxy, error) {
	dir, err := endpoint.Open(cfg.EndpointDir)
	if err != nil {
		return nil, err
	}
	p := &proxy{cfg: cfg, log: log, ns: ns, dir: dir, sites: map[endpoint.Key]*site{}, failures: map[endpoint.Key]error{}}
	p.files = descriptors(2*cfg.Connections + spareFiles + filesContainer*manyContainers)
	if n := p.limit(); n < cfg.Connections {
		log.Warn("there can be fewer connections than max_connections: raise LimitNOFILE of the unit", "limit", n)
	}
	p.follow = &reconcile.Loop{Name: "containers", Step: p.pass, Log: log, Resync: passResync, MinGap: passGap, Retry: passRetry}
	p.loops = []*reconcile.Loop{p.follow}
	if cfg.PolicyAgent != "" {
		agent, err := cfg.agent()
		if err != nil {
			return nil, err
		}
		p.who = askAgent(agent.Port())
	}
	if err := p.openCertificates(ctx); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// close lets go of the state directory.
func (p *proxy) close() {
	if p.state != nil {
		p.state.Close()
	}
}

// openCertificates chooses where certificates come from.
func (p *proxy) openCertificates(ctx context.Context) error {
	if p.cfg.Certificates == FromAuthority {
		return p.openIssued(ctx)
	}
	d, err := newDirectory(&p.cfg, p.log)
	if err != nil {
		return fmt.Errorf("certificate_directory: %w", err)
	}
	p.certificates = d
	return nil
}

// descriptors returns how many files this process may have open. It raises that to what is wanted, as far as it may.
func descriptors(want int) int {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return want
	}
	if l.Cur < uint64(want) {
		raised := syscall.Rlimit{Cur: uint64(want), Max: max(uint64(want), l.Max)}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised) != nil { // beyond the hard limit only for the privileged
			raised = syscall.Rlimit{Cur: l.Max, Max: l.Max}
			syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised)
		}
		if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
			return want
		}
	}
	return int(min(l.Cur, uint64(want)))
}

// limit returns how many connections there can be: each takes two descriptors. mu is held.
func (p *proxy) limit() int {
	return max(1, min(p.cfg.Connections, (p.files-spareFiles-filesContainer*len(p.sites))/2))
}

// enter counts a connection of a container that has mine, or says why there is no room for it.
func (p *proxy) enter(mine int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !may(p.limit(), p.conns, mine, len(p.sites)) {
		return refusalf(crowded, "%d connections of the host are open, %d of them the container's", p.conns, mine)
	}
	p.conns++
	return nil
}

func (p *proxy) left() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns--
}

// debugLimits leave time for a profile of a minute.
var debugLimits = service.Limits{Header: 5 * time.Second, Body: 15 * time.Second, Write: 5 * time.Minute, Idle: 2 * time.Minute}

// run serves until ctx ends.
func (p *proxy) run(ctx context.Context, level *slog.LevelVar) error {
	defer p.close()
	inside, err := net.Listen("tcp", p.cfg.debugAddress())
	if err != nil {
		return fmt.Errorf("debug server: %w", err)
	}
	tasks := append([]service.Task{service.HTTP("debug", inside, nil, p.debugHandler(level), debugLimits, p.log)}, p.tasks...)
	return service.Run(ctx, p.log, append(tasks, service.Task{Name: "containers", Run: p.serve})...)
}

// serve keeps ports like the records say until ctx ends; then it takes no more connections and leaves a moment to those there are.
func (p *proxy) serve(ctx context.Context) error {
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { p.watch(watching) })
	err := p.follow.Run(ctx)
	stop()
	watch.Wait()
	p.drain()
	return err
}

// drain ends all.
func (p *proxy) drain() {
	p.mu.Lock()
	p.draining = true
	sites := make([]*site, 0, len(p.sites))
	for _, s := range p.sites {
		sites = append(sites, s)
	}
	p.mu.Unlock()
	for _, s := range sites {
		s.deafen()
	}
	deadline := time.NewTimer(p.cfg.drain())
	defer deadline.Stop()
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	for left := true; left && p.count() > 0; {
		select {
		case <-deadline.C:
			left = false
		case <-tick.C:
		}
	}
	if n := p.count(); n > 0 {
		p.log.Warn("connections were cut off at the end", "connections", n)
	}
	for _, s := range sites {
		s.close()
	}
}

// drainLook is the time between two looks at whether all connections have ended.
const drainLook = 5 * time.Millisecond

// count returns how many connections there are.
func (p *proxy) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conns
}
