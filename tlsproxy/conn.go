package tlsproxy

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// lingering is how long a client may go on sending, after the container has closed its side and does not listen any more, before the
// connection is broken off: what it was sent last must reach it.
const lingering = 5 * time.Second

// A client whose handshake failed may go on sending for a moment, and so many buffers.
const (
	parting      = time.Second
	partingReads = 8
)

// conn is one client's connection.
type conn struct {
	port  *port
	peer  netip.AddrPort
	local netip.AddrPort
	wire  *wire
	tls   *tls.Conn

	checked bool // the client is who it says; what check alone sets

	app     *net.TCPConn // nil until there is one
	fromApp *source
	sides   atomic.Int32 // directions in which bytes may still come
	deaf    atomic.Bool  // the container takes nothing more
	silent  atomic.Bool  // the container sends nothing more

	writing sync.Mutex // held while something is written to the container
	cut     bool       // such a write took the word that the container had cut off what it sends

	mu     sync.Mutex
	broken bool
}

// addressOf returns an address of package net as one that can be compared.
func addressOf(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// serve does all that leads to a connection with the container, and then lets the bytes flow without it: a goroutine that has done a handshake has
// a large stack.
func (c *conn) serve(ctx context.Context) {
	err := c.handshake(ctx)
	if err != nil {
		c.wire.in.drop()
		c.part(err)
	}
	c.port.site.settled(c)
	if err == nil {
		err = c.connect(ctx)
	}
	if err != nil {
		c.wire.in.drop()
		c.abort()
		c.port.refused(c, err)
		c.port.site.left(c)
		return
	}
	c.sides.Store(2)
	go c.up()
	go c.down()
}

// handshake ends TLS. The client has a limited time for it, and costs little until it has said something.
func (c *conn) handshake(ctx context.Context) error {
	limits := &c.port.site.proxy.cfg
	if err := c.wire.SetDeadline(time.Now().Add(limits.handshakeTimeout())); err != nil {
		return err
	}
	if err := c.wire.in.fill(); err != nil {
		return handshakeError(err)
	}
	tc, err := c.port.config(ctx, c)
	if err != nil {
		c.wire.Write(alertInternalError)
		return refusal(noCertificate, err)
	}
	c.wire.turns <- struct{}{}
	c.tls = tls.Server(c.wire, tc)
	err = c.shake()
	<-c.wire.turns
	if err == nil && c.port.spec.ClientAuth && !c.checked {
		err = refusalf(badClient, "the client was not checked")
	}
	if err != nil {
		return handshakeError(err)
	}
	c.port.connected(c)
	err = c.wire.SetDeadline(time.Time{})
	c.wire.established = true
	return err
}

// shake is the handshake. What it panics over is one client's matter, as in an HTTP server.
func (c *conn) shake() (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.panicked(p)
			err = refusalf(garbled, "panic: %v", p)
		}
	}()
	return c.tls.Handshake()
}

func (c *conn) panicked(p any) {
	c.port.site.proxy.log.Error("connection panicked", "endpoint", c.port.site.record.Key, "peer", c.peer, "panic", p, "stack", string(debug.Stack()))
}

// caught is deferred by what carries bytes.
func (c *conn) caught() {
	if p := recover(); p != nil {
		c.panicked(p)
		c.abort()
	}
}

// part lets a client whose handshake failed hear why: a reset would overtake the alert.
func (c *conn) part(why error) {
	if r, ok := errors.AsType[*refused](why); !ok || r.reason == slow || c.wire.CloseWrite() != nil {
		return
	}
	c.wire.SetDeadline(time.Now().Add(parting))
	for range partingReads {
		if c.wire.in.fill() != nil {
			return
		}
		c.wire.in.drop()
	}
}

// alertInternalError is how a client hears that there is no certificate, before anything has been agreed on: RFC 8446, section 6.
var alertInternalError = []byte{21, 3, 3, 0, 2, 2, 80}

// connect reaches the container's own port.
func (c *conn) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.port.site.proxy.cfg.connectTimeout())
	defer cancel()
	app, err := c.port.site.dial(ctx, c.port.spec.Forward)
	if err != nil {
		return refusal(unreachable, err)
	}
	app.SetKeepAlive(false) // it is in the same kernel
	from, err := newSource(app)
	if err != nil {
		app.Close()
		return refusal(unreachable, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		app.Close()
		return net.ErrClosed
	}
	c.app, c.fromApp = app, from
	return nil
}

// abort ends both connections at once. What is on its way is lost, and both ends hear that it is.
func (c *conn) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		return
	}
	c.broken = true
	// Without lingering: a socket that waits for its last bytes to be acknowledged keeps its namespace.
	c.wire.SetLinger(0)
	c.wire.Close()
	if c.app != nil {
		c.app.SetLinger(0)
		c.app.Close()
	}
}

// ended notes that nothing more comes in one direction.
func (c *conn) ended() {
	if c.sides.Add(-1) > 0 {
		return
	}
	c.mu.Lock()
	if !c.broken {
		c.broken = true
		c.wire.Close()
		c.app.Close()
	}
	c.mu.Unlock()
	c.port.site.left(c)
}

// up carries bytes from the client to the container until the client has said that no more will come. It holds buffers only while there are some.
func (c *conn) up() {
	defer c.ended()
	defer c.wire.in.drop()
	defer c.caught()
	for {
		err := c.forward()
		if err == errWait {
			err = c.wire.in.fill()
			if errors.Is(err, io.EOF) { // not a word about it: somebody may have cut off the rest
				c.port.stats.truncated.Add(1)
				err = io.ErrUnexpectedEOF
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			c.app.CloseWrite() // a container that is gone is for down to notice
			go c.attend()
			return
		case c.deaf.Load() && c.silent.Load(): // all that the container had to say was said
			return
		default:
			c.abort()
			return
		}
	}
}

// attend waits for the end of a connection whose client has said that no more will come. Nothing reads it any more, and the container may be silent for
// ever: that the client went without a word, which keep-alives find out, only the socket itself tells. It returns when the connection is closed, which waits for it.
func (c *conn) attend() {
	c.wire.in.raw.Read(func(fd uintptr) bool {
		// A read says after a FIN that this is the end, whatever has happened since.
		code, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		return err != nil || code != 0
	})
	c.abort()
}

// forward passes on what the client has sent: all there is, or a buffer full.
func (c *conn) forward() error {
	b := takeBuffer(c.wire.in.stream)
	defer giveBuffer(b)
	n := 0
	var err error
	for n < len(b) && err == nil {
		var more int
		more, err = c.tls.Read(b[n:])
		n += more
	}
	if n == 0 || c.deaf.Load() {
		return err
	}
	c.port.stats.received.Add(uint64(n))
	c.writing.Lock()
	_, failed := c.app.Write(b[:n])
	c.cut = errors.Is(failed, syscall.ECONNRESET) // after its end it is EPIPE
	c.writing.Unlock()
	if failed != nil {
		// What the container sent before is still on its way: the client is heard out, in vain.
		c.deaf.Store(true)
		if c.silent.Load() {
			c.wire.SetReadDeadline(time.Now().Add(lingering))
		}
	}
	return err
}

// down carries bytes from the container to the client.
func (c *conn) down() {
	defer c.ended()
	defer c.caught()
	for {
		err := c.fromApp.fill()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			c.port.stats.sent.Add(uint64(len(c.fromApp.in)))
			_, err = c.tls.Write(c.fromApp.in)
			c.fromApp.drop()
		}
		if err != nil {
			c.abort()
			return
		}
	}
	if c.cutShort() || c.tls.CloseWrite() != nil || c.wire.CloseWrite() != nil {
		c.abort()
		return
	}
	c.silent.Store(true)
	if c.deaf.Load() {
		c.wire.SetReadDeadline(time.Now().Add(lingering))
	}
}

// cutShort reports, when nothing more can be read from the container, whether that is a reset, of which a write was told first: the kernel says it once, and
// after that that this is the end. Of a connection that a reset has closed no write is kept waiting.
func (c *conn) cutShort() bool {
	const closed = 7 // TCP_CLOSE of net/tcp_states.h
	state := closed
	c.fromApp.raw.Control(func(fd uintptr) {
		if info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO); err == nil {
			state = int(binary.NativeEndian.AppendUint32(nil, uint32(info))[0]) // the first byte of struct tcp_info
		}
	})
	if state != closed {
		return false
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.cut
}
