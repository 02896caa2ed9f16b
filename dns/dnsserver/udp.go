package dnsserver

import (
	"context"
	"net"
	"sync"

	"code.cloudfoundry.org/silk/internal/kernel/udp"
)

// batch is how many questions are read, and answers sent, with one system call at most.
const batch = 32

// serveUDP answers on a socket until ctx has ended and it is closed. Several may do so at the same time. What waits for resolvers goes on
// in goroutines of wg.
func (s *Server) serveUDP(ctx context.Context, c *net.UDPConn, wg *sync.WaitGroup) error {
	b, err := udp.New(c, batch, maxQuery)
	if err != nil {
		return err
	}
	workers := make([]worker, batch) // each has an answer in its memory until all are sent
	for i := range workers {
		workers[i] = worker{s: s, buf: make([]byte, 0, s.cfg.UDPSize)}
	}
	for {
		n, err := b.Read()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		for i := range n {
			message, whole := b.Data(i)
			if !whole {
				s.counts.dropped.Add(1)
				continue
			}
			w := &workers[i]
			resp, v := w.answer(message, false)
			if v == onward {
				if s.later(ctx, w, wg, b, i) {
					continue
				}
				resp, v = w.fail(servFail, false), send
			}
			if v == send {
				b.Answer(i, resp)
			}
		}
		s.counts.unsent.Add(uint64(b.Send()))
	}
}

// later has a resolver asked and its answer to the i-th datagram sent, unless too much is under way.
func (s *Server) later(ctx context.Context, w *worker, wg *sync.WaitGroup, b *udp.Batch, i int) bool {
	answer := b.Later(i)
	return s.onward.begin(ctx, wg, w.q, w.limit(false), false, b.From(i), func(resp []byte) {
		if answer(resp) != nil {
			s.counts.unsent.Add(1)
		}
	})
}
