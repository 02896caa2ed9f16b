// Package dnsserver answers DNS, over udp and tcp, from a registration.Table: for names in configured domains it is the authority, other
// names it refuses or passes on to resolvers.
//
// It knows nothing of where registrations come from, of configuration files or of the program around it, and keeps no answers of others.
// What is answered is in docs/operate/dns-answers.md.
//
// Use: New with a Config, then Run; both Run and what it started are over when its context ends. A Server is a prometheus.Collector.
package dnsserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// Config says what a Server answers, and where. The zero value of a field that is not said to be required is its default.
type Config struct {
	// Listen has the addresses to answer on, by udp and by tcp. An address need not be on the host yet. An unspecified address (0.0.0.0,
	// ::) stands for all of its own family; answers leave from the address that was asked. Port 0 takes a free one, the same for both
	// protocols.
	Listen []netip.AddrPort

	// Sockets are open already, to be answered on as well. Run closes them.
	Sockets []Socket

	Table   *registration.Table // required
	Domains []registration.Name // whose names are all in the table, or do not exist
	Reverse []netip.Prefix      // ranges whose addresses have all their names in the table, or none: for PTR
	TTL     time.Duration       // of all answers, also that there is none; whole seconds, at most a week. Default 0: nobody may keep them

	// Warm reports whether the table is known to be complete. While it is not, a name that is not there is a failure of the server, not a
	// name that does not exist, which resolvers and applications would remember. Default: always.
	Warm func() bool

	// Forward has the resolvers that are asked for all other names, in order of preference. None: those names are refused.
	Forward []netip.AddrPort
	// ForwardTimeout is for one resolver to answer, default 1.5 s. An answer takes three times that at most; a resolver that failed twice
	// rests for ten times that.
	ForwardTimeout time.Duration
	ForwardMax     int // questions under way to resolvers, default 1024: more are answered with a failure at once

	UDPSize      int           // most bytes of an answer by udp, default 1232 (dnsflagday.net/2020); 512 to 4096
	Connections  int           // of tcp, in all, default 1024: more are closed at once
	PerSource    int           // connections from one address, default 64
	IdleTimeout  time.Duration // until a connection without a whole question is closed, default 10 s
	WriteTimeout time.Duration // until one that does not take its answers is closed, default 5 s
}

// maxDomain bounds a domain in bytes: "hostmaster." must find room in front of it.
const maxDomain = registration.MaxName - len("hostmaster.")

// Server answers. Make it with New.
type Server struct {
	cfg    Config
	log    *slog.Logger
	zones  []zone // the longer name first
	ttl    uint32
	counts counts
	conns  share
	onward *forwarder // nil: other names are refused

	ready chan struct{}

	mu   sync.Mutex
	open []Socket // while Run runs
}

// New checks the configuration; all that is wrong with it is in the error, which is fault.Invalid. It opens nothing.
func New(cfg Config, log *slog.Logger) (*Server, error) {
	cfg.ForwardTimeout = cmp.Or(cfg.ForwardTimeout, 1500*time.Millisecond)
	cfg.ForwardMax = cmp.Or(cfg.ForwardMax, 1024)
	cfg.UDPSize = cmp.Or(cfg.UDPSize, 1232)
	cfg.Connections = cmp.Or(cfg.Connections, 1024)
	cfg.PerSource = cmp.Or(cfg.PerSource, 64)
	cfg.IdleTimeout = cmp.Or(cfg.IdleTimeout, 10*time.Second)
	cfg.WriteTimeout = cmp.Or(cfg.WriteTimeout, 5*time.Second)
	if cfg.Warm == nil {
		cfg.Warm = func() bool { return true }
	}
	if err := cfg.validate(); err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	s := &Server{cfg: cfg, log: log, zones: newZones(cfg.Domains), ttl: uint32(cfg.TTL / time.Second), ready: make(chan struct{})}
	s.conns.limit, s.conns.each = cfg.Connections, cfg.PerSource
	if len(cfg.Forward) > 0 {
		s.onward = newForwarder(cfg, &s.counts)
	}
	return s, nil
}

func (c *Config) validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Table == nil {
		wrong("no table")
	}
	if len(c.Listen)+len(c.Sockets) == 0 {
		wrong("no address to listen on")
	}
	for _, a := range c.Listen {
		if !a.Addr().IsValid() || a.Addr().Is4In6() {
			wrong("address %v to listen on: expected an address of IPv4 or IPv6", a)
		}
	}
	for _, d := range c.Domains {
		if err := CheckDomain(d); err != nil {
			errs = append(errs, err)
		}
	}
	for _, p := range c.Reverse {
		if !p.IsValid() || p.Masked() != p || p.Bits() == 0 {
			wrong("range %v: expected a prefix without bits behind its length", p)
		}
	}
	if c.TTL < 0 || c.TTL > 7*24*time.Hour || c.TTL%time.Second != 0 {
		wrong("TTL %v: expected whole seconds, at most a week", c.TTL)
	}
	if c.UDPSize < minUDP || c.UDPSize > maxUDP {
		wrong("udp size %d: expected %d to %d", c.UDPSize, minUDP, maxUDP)
	}
	if min(c.ForwardMax, c.Connections, c.PerSource) < 1 || min(c.ForwardTimeout, c.IdleTimeout, c.WriteTimeout) < time.Millisecond {
		wrong("limits: expected each of them to be positive")
	}
	here := slices.Clip(c.Listen)
	for _, s := range c.Sockets {
		here = append(here, s.Address())
	}
	for _, f := range c.Forward {
		if err := CheckForward(f, here); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// CheckDomain says what is wrong with one of Config.Domains.
func CheckDomain(d registration.Name) error {
	if n, err := registration.ParseName(string(d)); err != nil || n != d || d[0] == '*' {
		return fault.Invalidf("domain %.80q: expected a name such as apps.internal, in lower case, without a final dot", d)
	}
	if len(d) > maxDomain {
		return fault.Invalidf("domain %.80q has %d bytes: expected %d at most, which leaves room for hostmaster", d, len(d), maxDomain)
	}
	return nil
}

// CheckForward says what is wrong with one of Config.Forward: it must be a resolver, and not this server, which listens at here.
func CheckForward(f netip.AddrPort, here []netip.AddrPort) error {
	if !f.IsValid() || f.Port() == 0 || f.Addr().IsUnspecified() || f.Addr().IsMulticast() {
		return fault.Invalidf("resolver %v: expected the address and port of one, such as 10.0.0.2:53", f)
	}
	for _, a := range here {
		if a.Port() != f.Port() {
			continue
		}
		if a.Addr() == f.Addr().Unmap() || a.Addr().IsUnspecified() && ours(f.Addr().Unmap()) {
			return fault.Invalidf("resolver %v: this server listens there itself: expected another one, or none, which refuses other names", f)
		}
	}
	return nil
}

// Ready is closed when all sockets are open.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Addresses returns where the server listens, in the order of Config.Listen and then Config.Sockets. It is for after Ready.
func (s *Server) Addresses() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []netip.AddrPort
	for _, o := range s.open {
		all = append(all, o.Address())
	}
	return all
}

// Run opens the sockets and answers until ctx ends, when it returns nil. An address that cannot be listened on is an error, as is a
// socket that breaks. It is to be called once.
func (s *Server) Run(ctx context.Context) error {
	open, err := Listen(ctx, s.cfg.Listen)
	open = append(open, s.cfg.Sockets...)
	if err != nil {
		for _, o := range open {
			o.Close()
		}
		return err
	}
	s.mu.Lock()
	s.open = open
	s.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	task := func(f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				cancel(err)
			}
		})
	}
	for _, o := range open {
		for range readers() {
			task(func() error { return s.serveUDP(ctx, o.Packets, &wg) })
		}
		task(func() error { return s.serveTCP(ctx, o.Streams, &wg) })
	}
	s.log.Info("listening", "addresses", fmt.Sprint(s.Addresses()))
	close(s.ready)
	<-ctx.Done()
	for _, o := range open {
		o.Close()
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}
