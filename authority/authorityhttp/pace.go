package authorityhttp

import (
	"net/netip"
	"sync"
	"time"
)

const (
	pace  = 5 * time.Second // between two requests of a host in the long run
	burst = 8               // requests that it may send at once after a pause
)

// paces remembers how often hosts asked. The zero value is ready.
type paces struct {
	mu    sync.Mutex
	free  map[netip.Addr]time.Time // when the host will have its whole burst again
	swept time.Time
}

// admit reports whether the host may ask now, and counts it if so.
func (p *paces) admit(host netip.Addr, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free == nil {
		p.free = map[netip.Addr]time.Time{}
	}
	if now.Sub(p.swept) >= burst*pace { // so what is kept is at most who asked in the last two sweeps
		p.swept = now
		for a, at := range p.free {
			if !at.After(now) {
				delete(p.free, a)
			}
		}
	}
	at := p.free[host]
	if at.Before(now) {
		at = now
	}
	if at = at.Add(pace); at.Sub(now) > burst*pace {
		return false
	}
	p.free[host] = at
	return true
}
