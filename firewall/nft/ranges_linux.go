package nft

import (
	"fmt"
	"slices"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
)

// Sets of ranges cost what they hold with every change: an element is deleted in linear time, so they are replaced instead. A group with
// many ranges therefore has them in several sets, by the last bits of the source's tag: how many depends on how many ranges
// there are, and only a great change of that number changes it.
const (
	shardFull  = 640 // ranges in a set on average, above which there are too few sets
	shardFair  = 512 // after a change of the number of sets
	shardEmpty = 128 // below which there are too many
	maxShards  = 256
)

// rangesRule is where the chain of a group looks for ranges: in a set, or by the last bits of the tag in one of several.
type rangesRule struct {
	set    string // "": nowhere
	shards int    // 1 or a power of 2: then set is the map of shards
}

// ranges adds to w what holds a group's ranges.
func (b *builder) ranges(w *wish, tag identity.Tag, ranges []firewall.Allow, have map[string]*set) rangesRule {
	k := shardsFor(tag, len(ranges), have)
	if k == 1 {
		name := nameRanges("ranges-"+tag.String(), ranges, have)
		w.sets = append(w.sets, set{name: name, allow: ranges})
		return rangesRule{name, 1}
	}
	parts := make([][]firewall.Allow, k)
	for _, a := range ranges {
		i := int(a.Source) & (k - 1)
		parts[i] = append(parts[i], a)
	}
	shards := set{name: shardsMap(tag, k)}
	for i, part := range parts {
		if len(part) == 0 {
			continue
		}
		name := nameRanges(fmt.Sprintf("ranges-%v-%d-of-%d", tag, i, k), part, have)
		w.sets = append(w.sets, set{name: name, allow: part})
		c := b.chain(name, func() chain {
			return newChain(fmt.Sprintf("%s-%d-of-%d", toChain(tag), i, k), noHook,
				// meta mark & 0x0000ffff . meta l4proto . th dport @ranges-0007-3-of-16-0 goto allow
				newRule(allowedIn(name, true), goTo(chainAllow)),
				// goto unmatched
				newRule(goTo(chainUnknown)))
		})
		w.chains = append(w.chains, c)
		shards.elems = append(shards.elems, elem{string(host32(uint32(i))), c.name})
	}
	slices.SortFunc(shards.elems, cmpElem)
	w.sets = append(w.sets, shards)
	return rangesRule{shards.name, k}
}

func shardsMap(tag identity.Tag, k int) string { return fmt.Sprintf("shards-%v-%d", tag, k) }

// shardsFor returns over how many sets n ranges are spread: over as many as now if that is tolerable.
func shardsFor(tag identity.Tag, n int, have map[string]*set) int {
	now := 1
	for k := 2; k <= maxShards; k *= 2 {
		if have[shardsMap(tag, k)] != nil {
			now = k
		}
	}
	if n <= now*shardFull && (now == 1 || n >= now*shardEmpty) {
		return now
	}
	k := 1
	for k < maxShards && n > k*shardFair {
		k *= 2
	}
	return k
}

// nameRanges returns the set that has exactly these ranges already, or a name that is not taken.
func nameRanges(prefix string, ranges []firewall.Allow, have map[string]*set) string {
	return nameSet(prefix, have, func(s *set) bool { return slices.Equal(s.allow, ranges) })
}

// nameSet returns the set of this prefix that is right already, or a name that is not taken.
func nameSet(prefix string, have map[string]*set, right func(*set) bool) string {
	free := ""
	for n := 0; ; n++ {
		name := fmt.Sprintf("%s-%d", prefix, n)
		s := have[name]
		switch {
		case s != nil && right(s):
			return name
		case s == nil && free == "":
			free = name
		}
		if n > 1 && free != "" {
			return free
		}
	}
}
