package tlsproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
)

// backlog is how many connections may wait to be accepted, if the container's namespace allows as many.
const backlog = 4096

// site is a container with ports at which TLS ends. Its namespace is kept open, and so alive, until it is closed.
type site struct {
	proxy  *proxy
	record endpoint.Record
	ports  []*port
	turns  chan struct{} // a token for each handshake that computes
	tasks  sync.WaitGroup

	named bool // its namespace had its name at the last look; the loop's alone

	ns       *kernel.NS
	mu       sync.Mutex
	dialling sync.WaitGroup
	closed   bool
	conns    map[*conn]bool // whether their handshakes are over
	unready  int            // handshakes that are not
	peers    map[netip.Addr]held
}

// held is what one peer has of a container's connections.
type held struct{ conns, unready int }

// openSite makes ready for a container's ports. None listens yet.
func openSite(p *proxy, r endpoint.Record) (*site, error) {
	ns, err := p.openNamespace(r)
	if err != nil {
		return nil, err
	}
	s := &site{
		proxy: p, record: r, ns: ns, turns: make(chan struct{}, p.cfg.Handshakes), conns: map[*conn]bool{}, peers: map[netip.Addr]held{},
	}
	for _, t := range r.TLS {
		s.ports = append(s.ports, &port{site: s, spec: t})
	}
	return s, nil
}

// listen makes those ports listen that do not. It reports whether all do.
func (s *site) listen(ctx context.Context) bool {
	all := true
	for _, p := range s.ports {
		p.mu.Lock()
		if p.listener == nil {
			p.listener, p.failure = s.open(p.spec)
			if p.listener != nil {
				if p.life == nil {
					p.life, p.end = context.WithCancel(context.WithoutCancel(ctx)) // what has begun may go on while the program drains
				}
				l, life := p.listener, p.life
				s.tasks.Go(func() { p.accept(life, l) })
			}
			p.tell()
			all = all && p.listener != nil
		}
		p.mu.Unlock()
	}
	return all
}

// open listens in the container's namespace, on its own address: another endpoint of the same container may have the same port.
func (s *site) open(t endpoint.TLSListener) (net.Listener, error) {
	if err := sound(t); err != nil {
		return nil, err
	}
	l, err := tcp.Listen(s.ns, netip.AddrPortFrom(s.record.Address(), t.Listen), backlog)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("port %d of the container is taken by a process in it: have that one leave the port, or choose another by tls.listen of its network: %w", t.Listen, err)
	}
	return l, err
}

// sound judges what a record asks for.
func sound(t endpoint.TLSListener) error {
	if t.Listen == 0 || t.Forward == 0 || t.Listen == t.Forward {
		return fmt.Errorf("listen %d, forward %d: expected two different ports", t.Listen, t.Forward)
	}
	for _, a := range t.ALPN {
		if a == "" || len(a) > 255 {
			return fmt.Errorf("alpn %q: expected names of 1 to 255 bytes", a)
		}
	}
	return nil
}

// tell logs why a port does not listen, or that it does, when that has changed. mu is held.
func (p *port) tell() {
	text := ""
	if p.failure != nil {
		text = p.failure.Error()
	}
	if text == p.told {
		return
	}
	p.told = text
	log := p.site.proxy.log.With("endpoint", p.site.record.Key, "listen", p.spec.Listen)
	if p.failure == nil {
		log.Info("port listens after all")
		return
	}
	log.Warn("port does not listen", "error", p.failure)
}

// dial connects to a port of the container from within its namespace.
func (s *site) dial(ctx context.Context, to uint16) (*net.TCPConn, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, net.ErrClosed
	}
	s.dialling.Add(1) // so that the namespace's descriptor is not another file's meanwhile
	s.mu.Unlock()
	defer s.dialling.Done()
	c, err := tcp.Dial(ctx, s.ns, netip.AddrPortFrom(s.record.Address(), to))
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// may reports whether one of sharers, who has mine of what is used, may have one more of limit. Half is for whoever comes first; of the other half
// each has an equal share that the others leave alone.
func may(limit, used, mine, sharers int) bool {
	sharers = max(sharers, 1)
	share := limit / 2 / sharers
	return used < limit && (mine < share || used < limit-(sharers-1)*share)
}

// enter counts a connection in, or says why there is no room for it.
func (s *site) enter(c *conn) error {
	cfg := &s.proxy.cfg
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	from := c.peer.Addr()
	h := s.peers[from]
	sharers := len(s.peers) + 1 // and whoever comes next
	if h == (held{}) {
		sharers++
	}
	if !may(cfg.ContainerConnections, len(s.conns), h.conns, sharers) {
		return refusalf(crowded, "%d connections of the container are open, %d of them this client's", len(s.conns), h.conns)
	}
	if !may(cfg.Unfinished, s.unready, h.unready, sharers) {
		return refusalf(hurried, "%d handshakes of the container are unfinished, %d of them this client's", s.unready, h.unready)
	}
	if err := s.proxy.enter(len(s.conns)); err != nil {
		return err
	}
	s.conns[c] = false
	s.unready++
	s.peers[from] = held{h.conns + 1, h.unready + 1}
	s.tasks.Add(1)
	return nil
}

// settled notes that a connection's handshake is over.
func (s *site) settled(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settle(c)
}

func (s *site) settle(c *conn) {
	if s.conns[c] {
		return
	}
	s.conns[c] = true
	s.unready--
	h := s.peers[c.peer.Addr()]
	h.unready--
	s.peers[c.peer.Addr()] = h
}

// left counts a connection out.
func (s *site) left(c *conn) {
	s.mu.Lock()
	s.settle(c)
	delete(s.conns, c)
	h := s.peers[c.peer.Addr()]
	if h.conns--; h == (held{}) {
		delete(s.peers, c.peer.Addr())
	} else {
		s.peers[c.peer.Addr()] = h
	}
	s.mu.Unlock()
	s.proxy.left()
	s.tasks.Done()
}

// count returns how many connections there are.
func (s *site) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// deafen closes the listeners, and keeps connections.
func (s *site) deafen() {
	for _, p := range s.ports {
		p.mu.Lock()
		if p.listener != nil {
			p.listener.Close()
		}
		p.mu.Unlock()
	}
}

// close ends all that the container has at once, and lets go of its namespace. It waits until nothing of it is left.
func (s *site) close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	s.deafen()
	for _, p := range s.ports {
		if p.end != nil {
			p.end()
		}
	}
	for _, c := range conns {
		c.abort()
	}
	s.dialling.Wait()
	s.ns.Close()
	s.tasks.Wait()
}

// listening returns how many of the ports listen.
func (s *site) listening() int {
	n := 0
	for _, p := range s.ports {
		p.mu.Lock()
		if p.listener != nil {
			n++
		}
		p.mu.Unlock()
	}
	return n
}
