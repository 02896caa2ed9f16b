package dns

import (
	"sync"

	"github.com/nats-io/nats.go"
)

const (
	// queueBytes bounds what waits to be read: 100,000 registrations of ordinary size at once fit.
	queueBytes = 80 << 20
	// messageCost is about what a waiting message takes beside its payload.
	messageCost = 256
)

// queue holds messages between NATS, which drops us when we do not take them fast enough, and who reads them, in the order in which they came.
type queue struct {
	mu    sync.Mutex
	list  []*nats.Msg
	bytes int
	wake  chan struct{} // has a value when list may not be empty
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

// put adds a message, false when there is no room for it.
func (q *queue) put(m *nats.Msg) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	cost := len(m.Data) + messageCost
	if q.bytes+cost > queueBytes {
		return false
	}
	q.bytes += cost
	q.list = append(q.list, m)
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true
}

// take returns all that waits. Room for it is made only by done, as each has been read.
func (q *queue) take() []*nats.Msg {
	q.mu.Lock()
	defer q.mu.Unlock()
	list := q.list
	q.list = nil
	return list
}

// done makes room for what a message took.
func (q *queue) done(m *nats.Msg) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.bytes -= len(m.Data) + messageCost
}

// waiting returns how many bytes wait.
func (q *queue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes
}
