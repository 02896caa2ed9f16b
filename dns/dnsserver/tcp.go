package dnsserver

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	readSize   = 2048 // of a connection's read buffer, in bytes
	keepSize   = 4096 // of what a connection keeps for its next answer, in bytes
	perStream  = 32   // questions of one connection that wait for resolvers; further ones are not read
	acceptWait = 50 * time.Millisecond
	backlog    = 4096 // connections that wait to be accepted, as far as the system lets them
)

// serveTCP accepts connections until ctx has ended and the listener is closed. Each is answered in a goroutine of wg.
func (s *Server) serveTCP(ctx context.Context, l *net.TCPListener, wg *sync.WaitGroup) error {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, syscall.EINVAL) {
				err = listenAgain(l)
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			pause(ctx, acceptWait) // the connection has gone, or there is no room for it: accept(2) lists what may be wrong with one
			continue
		}
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
		if !s.conns.take(from) {
			s.counts.turned.Add(1)
			c.Close()
			continue
		}
		s.counts.accepted.Add(1)
		s.counts.connected.Add(1)
		wg.Go(func() {
			st := stream{s: s, c: c, slots: make(chan struct{}, perStream)}
			st.serve(ctx, wg)
			s.counts.connected.Add(-1)
			s.conns.give(from)
		})
	}
}

// listenAgain mends a listener that somebody else has made to listen no more, as ss -K does. One that a supervisor keeps would be the same after a restart.
func listenAgain(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = syscall.Listen(int(fd), backlog) }); err != nil {
		return err
	}
	return failed
}

// pause waits, at most until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// stream is a connection. Questions are answered in their order, except those that wait for resolvers (RFC 7766 section 6.2.1.1).
type stream struct {
	s     *Server
	c     *net.TCPConn
	slots chan struct{} // one is filled for each question that waits for a resolver

	mu sync.Mutex // of writing
}

// serve answers until the client closes, is idle, or sends what is no question. What waits for resolvers is answered first.
func (t *stream) serve(ctx context.Context, wg *sync.WaitGroup) {
	stop := context.AfterFunc(ctx, func() { t.c.Close() })
	defer t.c.Close()
	defer stop()
	defer func() {
		for range cap(t.slots) {
			t.slots <- struct{}{}
		}
	}()
	r := bufio.NewReaderSize(t.c, readSize)
	w := worker{s: t.s}
	var message []byte
	for {
		t.c.SetReadDeadline(time.Now().Add(t.s.cfg.IdleTimeout)) // for all of a question: who sends it byte by byte gains nothing
		var size [2]byte
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(size[:]))
		if n < headerSize || n > maxQuery {
			t.s.counts.dropped.Add(1)
			return
		}
		if cap(message) < n {
			message = make([]byte, max(n, minUDP))
		}
		if _, err := io.ReadFull(r, message[:n]); err != nil {
			return
		}
		resp, v := w.answer(message[:n], true)
		if v == onward {
			if t.later(ctx, &w, wg) {
				continue
			}
			resp = w.fail(servFail, true)
		}
		if v == drop || !t.write(resp) {
			return
		}
		if cap(w.buf) > keepSize {
			w.buf = nil
		}
	}
}

// later has a resolver asked and its answer written, unless too much is under way.
func (t *stream) later(ctx context.Context, w *worker, wg *sync.WaitGroup) bool {
	select {
	case t.slots <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	ok := t.s.onward.begin(ctx, wg, w.q, maxTCP, true, t.c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(), func(resp []byte) {
		t.write(resp)
		<-t.slots
	})
	if !ok {
		<-t.slots
	}
	return ok
}

// write writes a message. After it failed nothing can be read either.
func (t *stream) write(resp []byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.c.SetWriteDeadline(time.Now().Add(t.s.cfg.WriteTimeout))
	b := net.Buffers{binary.BigEndian.AppendUint16(nil, uint16(len(resp))), resp}
	if _, err := b.WriteTo(t.c); err != nil {
		t.c.Close()
		return false
	}
	return true
}
