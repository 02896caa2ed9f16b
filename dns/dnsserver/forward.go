package dnsserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// rounds is how long an answer may take, in timeouts of one resolver.
const rounds = 3

// restFor is how long a resolver is asked only if no other answers, in timeouts, after it failed restAfter times in a row.
const (
	restFor   = 10
	restAfter = 2
)

// forwarder asks resolvers.
type forwarder struct {
	counts    *counts
	timeout   time.Duration
	size      int // most bytes that a resolver may send by udp to a client with EDNS0
	share     share
	resolvers []*resolver

	mu    sync.Mutex
	calls map[call]*pending
}

// resolver is one that is asked, and how it fares.
type resolver struct {
	address netip.AddrPort

	mu    sync.Mutex
	fails int       // in a row
	until time.Time // it rests
}

// call is what makes two questions the same: they are asked once. That also keeps a loop, of which we cannot see that it is one, from
// growing: our own question comes back and waits for itself.
type call struct {
	name     string // as in a message, in lower case: what query.key has for it may stand for several
	typ      uint16
	flags    uint16 // AD and CD
	edns, do bool
	stream   bool
}

// pending is the answer to come, or its absence.
type pending struct {
	done chan struct{} // closed when the answer is there
	resp []byte        // nil: no resolver answered
}

func newForwarder(cfg Config, c *counts) *forwarder {
	f := &forwarder{counts: c, timeout: cfg.ForwardTimeout, size: cfg.UDPSize, calls: map[call]*pending{}}
	f.share.limit, f.share.each = cfg.ForwardMax, max(cfg.ForwardMax/4, 1)
	for _, a := range cfg.Forward {
		f.resolvers = append(f.resolvers, &resolver{address: a})
	}
	return f
}

// begin has a question answered in a goroutine of wg, which calls send once. It refuses, and calls nothing, when too many are under way,
// of this client or in all.
func (f *forwarder) begin(ctx context.Context, wg *sync.WaitGroup, q query, limit int, stream bool, from netip.Addr, send func([]byte)) bool {
	if !f.share.take(from) {
		f.counts.overflow.Add(1)
		return false
	}
	q.question = bytes.Clone(q.question)
	f.counts.underWay.Add(1)
	key := call{name: folded(q.question), typ: q.typ, flags: q.flags & (flagAD | flagCD), edns: q.edns, do: q.do, stream: stream}
	p, first := f.join(key)
	wg.Go(func() {
		defer f.share.give(from)
		defer f.counts.underWay.Add(-1)
		if first {
			p.resp = f.resolve(ctx, &q)
			f.leave(key)
			close(p.done)
		}
		<-p.done
		send(f.answer(p.resp, &q, limit, stream))
	})
	return true
}

// folded returns the name of a question in lower case.
func folded(question []byte) string {
	b := bytes.Clone(question[:len(question)-4])
	for i, c := range b {
		b[i] = small(c)
	}
	return string(b)
}

// answer makes what is to be sent to a client of what a resolver said, nil for nothing.
func (f *forwarder) answer(resp []byte, q *query, limit int, stream bool) []byte {
	code := servFail
	if resp != nil {
		code = rcode(resp[3] & 15)
	}
	f.counts.answer(stream, q, code)
	if resp != nil && len(resp) <= limit {
		resp = bytes.Clone(resp)
		binary.BigEndian.PutUint16(resp, q.id)
		copy(resp[headerSize:], q.question) // as this client wrote it
		return resp
	}
	var r reply
	r.begin(nil, q, limit)
	r.set(flagRA)
	if resp != nil {
		r.set(flagTC)
	}
	return r.end(code, f.size)
}

// join returns the answer to come to a question, and whether the caller is the first to ask and has to see to it.
func (f *forwarder) join(key call) (p *pending, first bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p = f.calls[key]; p != nil {
		return p, false
	}
	p = &pending{done: make(chan struct{})}
	f.calls[key] = p
	return p, true
}

// leave forgets a question: who asks from now on is the first again.
func (f *forwarder) leave(key call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.calls, key)
}

// resolve asks one resolver after the other until one has a good answer, and returns the best that there is: a failure of a resolver
// rather than nothing.
func (f *forwarder) resolve(ctx context.Context, q *query) (best []byte) {
	ctx, cancel := context.WithTimeout(ctx, rounds*f.timeout)
	defer cancel()
	for tried := 0; tried < rounds && ctx.Err() == nil; {
		order := f.order(time.Now())
		for _, r := range order {
			if ctx.Err() != nil {
				break
			}
			f.counts.asked.Add(1)
			resp, err := f.exchange(ctx, r.address, q)
			if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
				return nil
			}
			r.note(err == nil, restFor*f.timeout)
			if err != nil {
				f.counts.unheard.Add(1)
				continue
			}
			if code := rcode(resp[3] & 15); code == noError || code == nxDomain {
				return resp
			}
			f.counts.unheard.Add(1)
			best = resp
		}
		if best != nil {
			return best
		}
		tried++
	}
	return best
}

// order returns the resolvers as they are to be asked: those that rest after the others.
func (f *forwarder) order(now time.Time) []*resolver {
	rest := map[*resolver]bool{}
	for _, r := range f.resolvers {
		rest[r] = r.rests(now, restFor*f.timeout)
	}
	order := slices.Clone(f.resolvers)
	slices.SortStableFunc(order, func(a, b *resolver) int { return number(rest[a]) - number(rest[b]) })
	return order
}

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}

// rests reports whether the resolver is to be left alone. When its rest is over one question is tried on it, and the others wait another
// rest for what comes of that.
func (r *resolver) rests(now time.Time, d time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fails < restAfter {
		return false
	}
	if now.Before(r.until) {
		return true
	}
	r.until = now.Add(d)
	return false
}

// note keeps how an attempt went.
func (r *resolver) note(ok bool, rest time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ok {
		r.fails = 0
		return
	}
	if r.fails++; r.fails >= restAfter {
		r.until = time.Now().Add(rest)
	}
}
