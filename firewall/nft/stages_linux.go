package nft

import "strings"

// prefill is how many elements of new sets are worth transactions of their own.
const prefill = 4096

// stages takes out of changes what fills new sets: nothing refers to them yet, so it may be done bit by bit, and the transaction that takes
// effect is small. Sets of ranges are always filled beforehand: the kernel publishes their elements at the very end of a transaction, when
// packets see its rules already (nft_set_commit_update in nf_tables_commit, up to 6.18 at least), and would find them empty for a moment. So are the
// chains that the map of what containers may reach is to lead to: a packet that began its way before they were there would find no rules in them, and
// be refused, unless what they refer to is new too, as in the table of an earlier version. A table that is made anew is made at once.
func stages(changes []change) (first [][]change, then []change) {
	fresh, n := map[string]bool{}, 0 // sets and chains that are new
	whole := true                    // what those chains refer to, but for sets, is there
	for _, c := range changes {
		switch {
		case c.object == "table":
			return nil, changes
		case c.verb == "add" && c.object == "set":
			fresh[c.name] = true
		case c.verb == "add" && c.object == "chain" && strings.HasPrefix(c.name, reachPrefix):
			fresh[c.name] = true
		case c.verb == "add" && c.object == "chain":
			whole = whole && !strings.HasPrefix(c.name, chainPass) && !strings.HasPrefix(c.name, chainRefuse)
		case c.object == "element" && fresh[c.name]:
			n += len(c.allow) + len(c.spans)
		}
	}
	var made, chains []change
	var fill packer
	for _, c := range changes {
		early := fresh[c.name] && len(c.elems) == 0
		switch {
		case early && (c.object == "chain" || c.object == "rule"):
			if whole {
				chains = append(chains, c)
			} else {
				then = append(then, c)
			}
		case early && n < prefill && !kindOf(c.name).ranges():
			then = append(then, c)
		case early && c.object == "set":
			made = append(made, c)
		case early && c.object == "element":
			fill.add(c)
		default:
			then = append(then, c)
		}
	}
	if len(made)+len(chains) == 0 {
		return nil, then
	}
	if n < prefill { // little: at once
		for _, some := range fill.packs {
			made = append(made, some...)
		}
		return [][]change{append(made, chains...)}, then
	}
	return append(append([][]change{made}, fill.packs...), chains), then
}

// packer puts additions of elements into packs of some prefill elements. Spans of one set stay together: the kernel copies their set for every
// transaction that adds to it.
type packer struct {
	packs [][]change
	room  int // in the last one
}

func (p *packer) add(c change) {
	for len(c.allow) > 0 {
		n := min(prefill, len(c.allow))
		p.put(change{verb: c.verb, object: c.object, name: c.name, allow: c.allow[:n]}, n)
		c.allow = c.allow[n:]
	}
	if len(c.spans) > 0 {
		p.put(change{verb: c.verb, object: c.object, name: c.name, spans: c.spans}, len(c.spans))
	}
}

func (p *packer) put(c change, n int) {
	if p.room < n {
		p.packs, p.room = append(p.packs, nil), max(prefill, n)
	}
	last := &p.packs[len(p.packs)-1]
	*last, p.room = append(*last, c), p.room-n
}
