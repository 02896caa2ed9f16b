package policysql

import (
	"container/heap"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/identity"
)

// pool knows which tags are free. Tags never used come first, the lowest first, then those that have been free for longest, but none within the quarantine.
type pool struct {
	quarantine int64 // microseconds
	highest    identity.Tag

	mu    sync.Mutex
	state []int64 // by tag: never, used, or when it was freed, in microseconds by the database's clock
	next  int     // no lower tag was never used
	freed freedTags
	count [2]int // of tags up to highest: used, freed
}

const (
	never = 0
	used  = -1
)

// freedTag is a tag with the time at which it was freed. It counts as long as that is the tag's state.
type freedTag struct {
	at  int64
	tag identity.Tag
}

type freedTags []freedTag

func (h freedTags) Len() int { return len(h) }
func (h freedTags) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].tag < h[j].tag
}
func (h freedTags) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *freedTags) Push(x any)   { *h = append(*h, x.(freedTag)) }
func (h *freedTags) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

func newPool(highest identity.Tag, quarantine time.Duration) *pool {
	return &pool{quarantine: quarantine.Microseconds(), highest: highest, state: make([]int64, int(identity.MaxTag)+1), next: 1}
}

// set makes known what a tag is: used, or freed at a time.
func (p *pool) set(t identity.Tag, state int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.change(t, state)
}

func (p *pool) change(t identity.Tag, state int64) {
	p.tally(t, -1)
	p.state[t] = state
	p.tally(t, 1)
	switch {
	case state > never && t <= p.highest:
		heap.Push(&p.freed, freedTag{state, t})
	case state == never:
		p.next = min(p.next, int(t))
	}
}

// tally counts a tag in its state.
func (p *pool) tally(t identity.Tag, n int) {
	switch {
	case t > p.highest || p.state[t] == never:
	case p.state[t] == used:
		p.count[0] += n
	default:
		p.count[1] += n
	}
}

// take returns n tags that may be given at a time, which are used from then on. Without so many, it returns false and takes none.
func (p *pool) take(n int, now int64) ([]freedTag, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := make([]freedTag, 0, n)
	for len(taken) < n {
		t, ok := p.first(now)
		if !ok {
			for _, t := range taken {
				p.change(t.tag, t.at)
			}
			return nil, false
		}
		p.change(t.tag, used)
		taken = append(taken, t)
	}
	return taken, true
}

// first finds the next tag to give. The caller holds mu.
func (p *pool) first(now int64) (freedTag, bool) {
	for ; p.next <= int(p.highest); p.next++ {
		if p.state[p.next] == never {
			return freedTag{never, identity.Tag(p.next)}, true
		}
	}
	for len(p.freed) > 0 {
		t := p.freed[0]
		if p.state[t.tag] == t.at && now < t.at+p.quarantine {
			return freedTag{}, false
		}
		heap.Pop(&p.freed)
		if p.state[t.tag] == t.at {
			return t, true
		}
	}
	return freedTag{}, false
}

// untake undoes take.
func (p *pool) untake(taken []freedTag) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range taken {
		p.change(t.tag, t.at)
	}
}

// figures returns how many tags are used and how many are in quarantine.
func (p *pool) figures(now int64) (inUse, held int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.state[1 : int(p.highest)+1] {
		if at > never && now < at+p.quarantine {
			held++
		}
	}
	return p.count[0], held
}

// span returns the quarantine.
func (p *pool) span() time.Duration { return time.Duration(p.quarantine) * time.Microsecond }

// states returns what every tag is, by tag.
func (p *pool) states() []int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.state)
}

// reset makes every tag one that was never used.
func (p *pool) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.state)
	p.next, p.freed, p.count = 1, nil, [2]int{}
}
