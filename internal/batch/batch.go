// Package batch lets one goroutine serve the calls of many, as many at a time as have come: what costs the same for one call as for a hundred, such as a
// transaction, is then paid once for all of them.
//
// It does no work of its own and starts no goroutine.
//
// Use: callers q.Do(ctx, question); the server takes a call from q.Calls(), adds what waits behind it by q.Gather, and answers each call once;
// when it ends, it calls q.End.
package batch

import (
	"context"
	"time"
)

// Queue brings calls from callers to their server. Its methods other than Do are for the server's goroutine.
type Queue[Q, A any] struct {
	limits Limits[Q]
	calls  chan *Call[Q, A]
	ended  chan struct{}
	err    error

	callers int           // that were there in or behind the last batch
	took    time.Duration // by the last batch
}

// Limits bound a batch.
type Limits[Q any] struct {
	Calls  int           // at most so many calls
	Weight int           // no call more once those that are there weigh so much; of no matter without Weigh
	Weigh  func(q Q) int // how much a call weighs; nil: calls have no weight
	Wait   time.Duration // at most so long for callers that were answered a moment ago
}

// Call is a question on its way to the server.
type Call[Q, A any] struct {
	Question Q
	ctx      context.Context
	done     chan answer[A] // of capacity 1
}

type answer[A any] struct {
	a   A
	err error
}

// New returns an empty queue. ended is what callers are told when nobody serves it any more.
func New[Q, A any](limits Limits[Q], ended error) *Queue[Q, A] {
	return &Queue[Q, A]{limits: limits, calls: make(chan *Call[Q, A], limits.Calls), ended: make(chan struct{}), err: ended}
}

// Do hands a question to the server and waits for the answer. When ctx ends first, the question may still be answered, to nobody.
func (q *Queue[Q, A]) Do(ctx context.Context, question Q) (A, error) {
	var none A
	select {
	case <-q.ended:
		return none, q.err
	default:
	}
	c := &Call[Q, A]{question, ctx, make(chan answer[A], 1)}
	select {
	case q.calls <- c:
	case <-ctx.Done():
		return none, ctx.Err()
	case <-q.ended:
		return none, q.err
	}
	select {
	case v := <-c.done:
		return v.a, v.err
	case <-ctx.Done():
		return none, ctx.Err()
	case <-q.ended:
	}
	select {
	case v := <-c.done: // the last batch may have answered it
		return v.a, v.err
	default:
		return none, q.err
	}
}

// Pass hands over a call that this or another queue's server has taken and does not answer itself. It gives up when the caller leaves or ctx ends.
func (q *Queue[Q, A]) Pass(ctx context.Context, c *Call[Q, A]) {
	select {
	case q.calls <- c:
	case <-c.ctx.Done():
	case <-ctx.Done():
	}
}

// Waiting returns how many calls have not been taken yet.
func (q *Queue[Q, A]) Waiting() int { return len(q.calls) }

// Ended is closed by End.
func (q *Queue[Q, A]) Ended() <-chan struct{} { return q.ended }

// Calls is where the server takes the first call of a batch.
func (q *Queue[Q, A]) Calls() <-chan *Call[Q, A] { return q.calls }

// Answer answers the call. It must be called exactly once, unless the caller has left or the queue ends.
func (c *Call[Q, A]) Answer(a A, err error) { c.done <- answer[A]{a, err} }

// Left reports whether the caller does not wait any more.
func (c *Call[Q, A]) Left() bool { return c.ctx.Err() != nil }

// Gather returns first and what waits behind it, without those whose callers have left. Callers that were answered a moment ago tend to ask again at once:
// while there are fewer calls than there were callers last time, it waits for them, for as long as the last batch took and Limits.Wait at most.
// Otherwise half of the callers would always miss the batch that the other half is in.
func (q *Queue[Q, A]) Gather(first *Call[Q, A]) []*Call[Q, A] {
	all, weight := make([]*Call[Q, A], 0, max(16, q.callers)), 0
	wait := time.NewTimer(min(q.took, q.limits.Wait))
	defer wait.Stop()
	for c := first; ; {
		if !c.Left() {
			all = append(all, c)
			if q.limits.Weigh != nil {
				weight += q.limits.Weigh(c.Question)
			}
		}
		if len(all) == q.limits.Calls || q.limits.Weigh != nil && weight >= q.limits.Weight {
			return all
		}
		select {
		case c = <-q.calls:
			continue
		default:
		}
		if len(all) >= q.callers {
			return all
		}
		select {
		case c = <-q.calls:
		case <-wait.C:
			return all
		}
	}
}

// Served tells how many calls the last batch had and how long it took.
func (q *Queue[Q, A]) Served(calls int, took time.Duration) {
	q.took, q.callers = took, calls+len(q.calls)
}

// End tells all callers, now and later, that nobody serves them any more.
func (q *Queue[Q, A]) End() { close(q.ended) }
