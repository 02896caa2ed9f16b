package policyhttp

import (
	"slices"
	"sync"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

// emptySet is that of a host without containers.
var emptySet = setOf(nil)

// groupSets remembers the lists of groups that agents asked for, by their digest, so that an agent whose list stays the same does not send
// it again. Beyond its limit it forgets those that were used longest ago; their agents then send them once more.
type groupSets struct {
	limit int // of size

	mu    sync.Mutex
	known map[setID]*groupSet
	names map[identity.Group]identity.Group // of the sets kept, so that hosts with the same groups share their names
	size  int                               // of known, in bytes
	clock uint64                            // counts uses
}

type groupSet struct {
	groups []identity.Group
	used   uint64
	size   int
}

// resolve returns the groups of a set: those given, which it then remembers, or if they are nil those that it remembers. An unknown set is
// fault.NotFound.
func (s *groupSets) resolve(id setID, given []identity.Group) ([]identity.Group, error) {
	if id == emptySet {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	if k := s.known[id]; k != nil {
		k.used = s.clock
		return k.groups, nil
	}
	if given == nil {
		return nil, fault.NotFoundf("set %v is not known here: send its groups", id)
	}
	if s.known == nil {
		s.known, s.names = map[setID]*groupSet{}, map[identity.Group]identity.Group{}
	}
	k := &groupSet{groups: make([]identity.Group, len(given)), used: s.clock, size: 160}
	for i, g := range given {
		name, ok := s.names[g]
		if !ok {
			name = g
			s.names[g] = g
		}
		k.groups[i] = name
		k.size += 64 + len(g) // with its share of names
	}
	s.known[id] = k
	s.size += k.size
	if s.size > s.limit {
		s.shrink()
	}
	return k.groups, nil
}

// shrink forgets the half that was used longest ago.
func (s *groupSets) shrink() {
	used := make([]uint64, 0, len(s.known))
	for _, k := range s.known {
		used = append(used, k.used)
	}
	slices.Sort(used)
	middle := used[len(used)/2]
	clear(s.names)
	for id, k := range s.known {
		if k.used <= middle && k.used != s.clock {
			delete(s.known, id)
			s.size -= k.size
			continue
		}
		for _, g := range k.groups {
			s.names[g] = g
		}
	}
}
