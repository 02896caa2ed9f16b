package tlsproxy

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/reconcile"
)

// suites are those of TLS 1.2 that keep what was said secret when a key is lost; what deployed proxies offer is among them. Those of TLS 1.3 are
// all good.
var suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// Pauses of a listener that cannot accept: the kernel is out of descriptors or memory, most likely.
const (
	acceptFirst = 5 * time.Millisecond
	acceptLast  = time.Second
)

// port is one port of a container at which TLS ends.
type port struct {
	site  *site
	spec  endpoint.TLSListener
	stats figures
	said  complaints
	life  context.Context    // of what its connections wait for, which end ends; nil before it listens, the loop's alone
	end   context.CancelFunc // likewise

	mu        sync.Mutex
	listener  net.Listener // nil while there is none
	failure   error        // why not
	told      string       // failure as the log has it
	shown     *credential  // what agreed is for
	agreed    *tls.Config
	forwarded error // of the last connection to the container, nil when it succeeded
}

// accept takes connections until the listener is closed.
func (p *port) accept(ctx context.Context, l net.Listener) {
	pause := acceptFirst
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if errors.Is(err, syscall.EINVAL) { // it listens no more: whoever administers the container's network can end sockets in it
			p.site.proxy.said.say(p.site.proxy.log, crowded, fmt.Errorf("listener of %v was ended from within the container: %w", p.site.record.Key, err))
			p.lost(l)
			return
		}
		if err != nil {
			if !errors.Is(err, syscall.ECONNABORTED) {
				p.site.proxy.said.say(p.site.proxy.log, crowded, fmt.Errorf("accept: %w", err))
				reconcile.Sleep(ctx, pause)
				pause = min(2*pause, acceptLast)
			}
			continue
		}
		pause = acceptFirst
		p.stats.accepted.Add(1)
		p.begin(ctx, c.(*net.TCPConn))
	}
}

// lost lets the next look at the container open the listener again. None is called for: a container could ask for them without end.
func (p *port) lost(l net.Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.Close()
	p.listener = nil
}

// begin serves a connection, if there is room for it.
func (p *port) begin(ctx context.Context, tc *net.TCPConn) {
	from, err := newSource(tc)
	if err != nil {
		tc.Close()
		return
	}
	c := &conn{
		port: p, peer: addressOf(tc.RemoteAddr()), local: addressOf(tc.LocalAddr()),
		wire: &wire{TCPConn: tc, in: from, turns: p.site.turns},
	}
	if err := p.site.enter(c); err != nil {
		c.abort()
		p.refused(c, err)
		return
	}
	tc.SetKeepAliveConfig(p.site.proxy.cfg.keepAlive())
	go c.serve(ctx)
}

// refused counts and tells of a connection that came to nothing.
func (p *port) refused(c *conn, err error) {
	var r *refused
	if !errors.As(err, &r) {
		return // the container or this program ends
	}
	p.stats.refused[r.reason].Add(1)
	if r.reason == unreachable {
		p.mu.Lock()
		p.forwarded = err
		p.mu.Unlock()
	}
	p.said.say(p.site.proxy.log, r.reason, r.err, "endpoint", p.site.record.Key, "listen", p.spec.Listen, "peer", c.peer)
}

// connected notes that a client reached the container.
func (p *port) connected(c *conn) {
	p.stats.handshakes.Add(1)
	if c.tls.ConnectionState().DidResume {
		p.stats.resumed.Add(1)
	}
}

// config returns what a handshake that begins now is to keep to.
func (p *port) config(ctx context.Context, c *conn) (*tls.Config, error) {
	shown, err := p.site.proxy.certificates.show(p.site.record)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	if p.shown != shown {
		p.shown, p.agreed = shown, p.agree(shown)
	}
	tc := p.agreed
	p.mu.Unlock()
	if !p.spec.ClientAuth {
		return tc, nil
	}
	tc = tc.Clone()
	whom, err := p.site.proxy.certificates.trust()
	if err != nil {
		return nil, err
	}
	tc.ClientCAs = whom.roots.Pool() // a hint for the client
	tc.VerifyConnection = func(s tls.ConnectionState) error { return c.check(ctx, s, whom) }
	return tc, nil
}

// agree returns a configuration that shows the certificate. Tickets end with it: whoever comes back sees the next one. The library makes a new key for
// them each day.
func (p *port) agree(shown *credential) *tls.Config {
	tc := &tls.Config{
		MinVersion: tls.VersionTLS12, CipherSuites: suites, Certificates: []tls.Certificate{shown.pair}, NextProtos: p.spec.ALPN, Rand: rand.Reader,
	}
	if p.spec.ClientAuth {
		// A client without a certificate is refused by check, which can say why. A ticket would stand for a certificate, and for a group, that were
		// good once.
		tc.ClientAuth, tc.SessionTicketsDisabled = tls.RequestClientCert, true
	}
	return tc
}

// States of a port.
const (
	stateListening = "listening"
	stateTaken     = "taken"
	stateFailed    = "failed"
)

// state says how the port stands. mu is held.
func (p *port) state() string {
	switch {
	case p.listener != nil:
		return stateListening
	case errors.Is(p.failure, syscall.EADDRINUSE):
		return stateTaken
	}
	return stateFailed
}
