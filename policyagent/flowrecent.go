package policyagent

import (
	"strconv"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/flow"
)

// keptRecords is how many records are kept for who asks later.
const keptRecords = 4096

// flowRecent keeps the last records. Who follows and is too slow misses some, and is told how many.
type flowRecent struct {
	mu      sync.Mutex
	records []flow.Record // a ring
	next    uint64        // number of the next record; the last keptRecords before it are there
	waiting bool          // somebody waits for turn
	told    uint64        // next when turn was closed last
	epoch   string        // tells the numbers of this life of the agent from those of another
	turn    chan struct{} // closed, and replaced, when there are more
}

func newFlowRecent() *flowRecent {
	return &flowRecent{turn: make(chan struct{}), epoch: strconv.FormatInt(time.Now().UnixNano(), 36)}
}

// id names a record.
func (r *flowRecent) id(number uint64) string { return r.epoch + "-" + strconv.FormatUint(number, 10) }

// after returns the number of the record that follows the one with an id: 0 if that was of another life.
func (r *flowRecent) after(id string) uint64 {
	epoch, number, _ := strings.Cut(id, "-")
	n, err := strconv.ParseUint(number, 10, 63)
	if epoch != r.epoch || err != nil {
		return 0
	}
	return n + 1
}

func (r *flowRecent) add(x *flow.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.records) < keptRecords {
		r.records = append(r.records, *x)
	} else {
		r.records[r.next%keptRecords] = *x
	}
	r.next++
}

// wake tells who waits that there may be more.
func (r *flowRecent) wake() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiting && r.told != r.next {
		close(r.turn)
		r.turn, r.waiting = make(chan struct{}), false
	}
	r.told = r.next
}

// since fills buf with records from number from on. It returns them, the number to go on from, how many were missed, and what is closed when there
// are more, once there are none left.
func (r *flowRecent) since(from uint64, buf []flow.Record) (records []flow.Record, next, missed uint64, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := r.next - uint64(len(r.records))
	if from > r.next { // nobody was told of such a number
		from = r.next
	}
	if from < first {
		missed, from = first-from, first
	}
	records = buf[:0]
	for ; from < r.next && len(records) < cap(buf); from++ {
		records = append(records, r.records[from%keptRecords])
	}
	if len(records) == 0 {
		r.waiting = true
		more = r.turn
	}
	return records, from, missed, more
}
