package dnsserver

import (
	"net/netip"
	"sync"
)

// share divides something that there is a limited number of among those who ask for it by their addresses, so that one of them does not
// have all.
type share struct {
	limit, each int // in all, and to one address

	mu    sync.Mutex
	all   int
	taken map[netip.Addr]int
}

// take gives one, if there is one to give.
func (s *share) take(a netip.Addr) bool {
	a = holder(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.limit || s.taken[a] >= s.each {
		return false
	}
	if s.taken == nil {
		s.taken = map[netip.Addr]int{}
	}
	s.all++
	s.taken[a]++
	return true
}

// give takes one back.
func (s *share) give(a netip.Addr) {
	a = holder(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.taken[a]--; s.taken[a] == 0 {
		delete(s.taken, a)
	}
}

// holder returns what stands for one client: in IPv6 a /64, all of whose addresses one machine can have.
func holder(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, err := a.Prefix(64)
		if err == nil {
			return p.Addr()
		}
	}
	return a
}
