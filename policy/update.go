package policy

import (
	"encoding/binary"
	"fmt"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
)

// Rule is a policy with the tags of its groups: what a host needs to mark what its containers send and to judge what they receive.
type Rule struct {
	Policy
	SourceTag, DestinationTag identity.Tag
}

// Touches reports whether a group is the rule's source or destination.
func (r Rule) Touches(g identity.Group) bool { return r.Source == g || r.Destination == g }

// Update is one answer of Feed.Watch. A full update holds every rule that touches the groups asked for in Set and nothing in Gone; another
// one holds the rules that were added or whose tags changed since the revision asked from, and the policies that ceased. Count and
// Sum seal it: after the update is applied there are Count rules whose Digest is Sum.
type Update struct {
	Revision revision.Revision
	Full     bool
	Set      []Rule
	Gone     []Policy
	Count    int
	Sum      Digest
}

// Changes reports whether u says anything new.
func (u Update) Changes() bool { return u.Full || len(u.Set) > 0 || len(u.Gone) > 0 }

// Apply returns the rules that hold after u, given those held before it, sorted by policy. An update that does not add up to its
// own seal is fault.Invalid: ask again from the zero revision, and change nothing.
func (u Update) Apply(held []Rule) ([]Rule, error) {
	if u.Full {
		held = nil
	}
	held = sorted(held)
	next, _, err := u.apply(held, Sum(held))
	return next, err
}

// apply is Apply for rules that are sorted, each policy once, and whose digest is known. It costs little more than a copy of them.
func (u Update) apply(held []Rule, sum Digest) ([]Rule, Digest, error) {
	if u.Full {
		held, sum = nil, 0
	}
	set := sorted(u.Set)
	drop := make([]Policy, 0, len(u.Gone)+len(set)) // from held: what ceased, and what is set anew
	drop = append(drop, u.Gone...)
	for _, r := range set {
		drop = append(drop, r.Policy)
	}
	slices.SortFunc(drop, Compare)
	out := make([]Rule, 0, len(held)+len(set))
	for len(drop) > 0 || len(set) > 0 {
		var p Policy // the next one that goes, comes or both
		switch {
		case len(drop) > 0 && (len(set) == 0 || Compare(drop[0], set[0].Policy) <= 0):
			p = drop[0]
			drop = drop[1:]
		default:
			p = set[0].Policy
		}
		i, there := slices.BinarySearchFunc(held, p, compareTo)
		out, held = append(out, held[:i]...), held[i:]
		if there {
			sum, held = sum.Remove(held[0]), held[1:]
		}
		if len(set) > 0 && set[0].Policy == p {
			out, sum, set = append(out, set[0]), sum.Add(set[0]), set[1:]
		}
	}
	out = append(out, held...)
	if len(out) != u.Count || sum != u.Sum {
		return nil, 0, fault.Invalidf("update to revision %v is not complete: %d policies with digest %v, expected %d with %v",
			u.Revision, len(out), sum, u.Count, u.Sum)
	}
	return out, sum, nil
}

// Differences returns which rules are in want and not in have, and which in have and not in want. Both are sorted by policy, none twice; so are the
// results. What is equal at both ends costs little.
func Differences(want, have []Rule) (set, gone []Rule) {
	for len(want) > 0 && len(have) > 0 && want[0] == have[0] {
		want, have = want[1:], have[1:]
	}
	for len(want) > 0 && len(have) > 0 && want[len(want)-1] == have[len(have)-1] {
		want, have = want[:len(want)-1], have[:len(have)-1]
	}
	for len(want) > 0 || len(have) > 0 {
		c := 0
		switch {
		case len(have) == 0:
			c = -1
		case len(want) == 0:
			c = 1
		default:
			c = Compare(want[0].Policy, have[0].Policy)
		}
		if c <= 0 && (c < 0 || want[0] != have[0]) {
			set = append(set, want[0])
		}
		if c >= 0 && (c > 0 || want[0] != have[0]) {
			gone = append(gone, have[0])
		}
		if c <= 0 {
			want = want[1:]
		}
		if c >= 0 {
			have = have[1:]
		}
	}
	return set, gone
}

func compareTo(r Rule, p Policy) int { return Compare(r.Policy, p) }

// sorted returns rules in order, of those with the same policy the last. It does not change the slice, which is returned as it is if
// that is in order.
func sorted(rules []Rule) []Rule {
	inOrder := true
	for i := 1; i < len(rules) && inOrder; i++ {
		inOrder = Compare(rules[i-1].Policy, rules[i].Policy) < 0
	}
	if inOrder {
		return rules
	}
	all := slices.Clone(rules)
	slices.SortStableFunc(all, func(a, b Rule) int { return Compare(a.Policy, b.Policy) })
	out := all[:0]
	for i, r := range all {
		if i+1 == len(all) || all[i+1].Policy != r.Policy {
			out = append(out, r)
		}
	}
	return out
}

// Digest proves that a list of rules is complete. It does not depend on their order, so whoever keeps a list can keep its digest by Add
// and Remove. It finds what was lost or damaged by mistake, not what was forged.
type Digest uint64

// Sum returns the digest of rules.
func Sum(rules []Rule) Digest {
	var d Digest
	for _, r := range rules {
		d = d.Add(r)
	}
	return d
}

// Add returns the digest with one rule more.
func (d Digest) Add(r Rule) Digest { return d + r.hash() }

// Remove returns the digest with one rule less.
func (d Digest) Remove(r Rule) Digest { return d - r.hash() }

// String returns 16 hexadecimal digits.
func (d Digest) String() string { return fmt.Sprintf("%016x", uint64(d)) }

// hash is FNV-1a of the rule's fields, mixed once more since sums of it are compared.
func (r Rule) hash() Digest {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	text := func(s string) {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * prime
		}
		h = (h ^ 0xff) * prime // no byte of UTF-8 is 255
	}
	text(string(r.Source))
	text(string(r.Destination))
	var b [9]byte
	b[0] = byte(r.Protocol)
	binary.BigEndian.PutUint16(b[1:], r.Ports.First)
	binary.BigEndian.PutUint16(b[3:], r.Ports.Last)
	binary.BigEndian.PutUint16(b[5:], uint16(r.SourceTag))
	binary.BigEndian.PutUint16(b[7:], uint16(r.DestinationTag))
	for _, c := range b {
		h = (h ^ uint64(c)) * prime
	}
	h ^= h >> 32
	h *= 0xd6e8feb86659fd93
	return Digest(h ^ h>>32)
}
