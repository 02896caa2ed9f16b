package nft

import (
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nf_tables.h; x/sys/unix has no names for them.
const (
	attrChainFlags = 10 // NFTA_CHAIN_FLAGS
	attrKeyEnd     = 10 // NFTA_SET_ELEM_KEY_END
	attrConcat     = 2  // NFTA_SET_DESC_CONCAT
	attrFieldLen   = 1  // NFTA_SET_FIELD_LEN
	tableOwner     = 2  // NFT_TABLE_F_OWNER
	tablePersist   = 4  // NFT_TABLE_F_PERSIST
	elementsAtOnce = 1000
)

// request appends a request about a table and, by name, about an object in it: in all but those about chains the table is
// attribute 1 and the name attribute 2.
func request(b *kernel.Batch, msg uint16, flags int, names ...string) {
	b.Add(kernel.NFTables(msg), flags, kernel.NFGen(unix.NFPROTO_INET))
	for i, n := range names {
		b.String(uint16(i+1), n)
	}
}

// nest appends an attribute that holds attributes.
func nest(b *kernel.Batch, typ uint16, fn func()) { b.Nest(typ|unix.NLA_F_NESTED, fn) }

// encoder turns changes into requests. Each request remembers the change that it is part of.
type encoder struct {
	b      kernel.Batch
	of     []int
	table  string // to write to
	flags  uint32 // of a table that is made
	setIDs uint32
}

func (e *encoder) encode(changes []change) {
	for i, c := range changes {
		e.change(c)
		for len(e.of) < e.b.Len() {
			e.of = append(e.of, i)
		}
	}
}

func (e *encoder) requestChain(msg uint16, flags int, name string) {
	request(&e.b, msg, flags, e.table)
	e.b.String(unix.NFTA_CHAIN_NAME, name)
}

func (e *encoder) change(c change) {
	b := &e.b
	switch c.verb + " " + c.object {
	case "add table":
		e.makeTable()
	case "delete table":
		request(b, unix.NFT_MSG_DELTABLE, 0, e.table)
	case "add counter":
		request(b, unix.NFT_MSG_NEWOBJ, unix.NLM_F_CREATE, e.table, c.name)
		b.Attr(unix.NFTA_OBJ_TYPE, big32(unix.NFT_OBJECT_COUNTER))
		nest(b, unix.NFTA_OBJ_DATA, func() {})
	case "add chain":
		e.chain(c.chain)
	case "flush chain":
		request(b, unix.NFT_MSG_DELRULE, 0, e.table, c.name)
	case "delete chain":
		e.requestChain(unix.NFT_MSG_DELCHAIN, 0, c.name)
	case "add rule":
		request(b, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, e.table, c.name)
		b.Attr(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, c.rule.exprs)
	case "add set":
		e.set(c.name)
	case "delete set":
		request(b, unix.NFT_MSG_DELSET, 0, e.table, c.name)
	case "add element":
		e.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, c)
	case "delete element":
		e.elements(unix.NFT_MSG_DELSETELEM, 0, c)
	default:
		panic("no such change: " + c.verb + " " + c.object)
	}
}

// makeTable makes or adopts the table.
func (e *encoder) makeTable() {
	request(&e.b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, e.table)
	if e.flags != 0 {
		e.b.Attr(unix.NFTA_TABLE_FLAGS, big32(e.flags))
	}
}

func (e *encoder) chain(c *chain) {
	b := &e.b
	e.requestChain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, c.name)
	if c.hook == noHook {
		return
	}
	nest(b, unix.NFTA_CHAIN_HOOK, func() {
		b.Attr(unix.NFTA_HOOK_HOOKNUM, big32(c.hook.number()))
		b.Attr(unix.NFTA_HOOK_PRIORITY, big32(0))
	})
	b.Attr(unix.NFTA_CHAIN_POLICY, big32(nfAccept))
	b.String(unix.NFTA_CHAIN_TYPE, "filter")
}

func (e *encoder) set(name string) {
	k, b := kindOf(name), &e.b
	e.setIDs++
	request(b, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, e.table, name)
	b.Attr(unix.NFTA_SET_ID, big32(e.setIDs))
	b.Attr(unix.NFTA_SET_FLAGS, big32(k.flags))
	b.Attr(unix.NFTA_SET_KEY_TYPE, big32(k.keyType))
	b.Attr(unix.NFTA_SET_KEY_LEN, big32(k.keyLen()))
	if k.verdicts {
		b.Attr(unix.NFTA_SET_DATA_TYPE, big32(typeVerdict))
		b.Attr(unix.NFTA_SET_DATA_LEN, big32(0))
	}
	if k.size() != 0 {
		nest(b, unix.NFTA_SET_DESC, func() { b.Attr(unix.NFTA_SET_DESC_SIZE, big32(k.size())) })
	}
	if !k.ranges() {
		return
	}
	nest(b, unix.NFTA_SET_DESC, func() {
		nest(b, attrConcat, func() {
			for _, f := range k.fields {
				nest(b, unix.NFTA_LIST_ELEM, func() { b.Attr(attrFieldLen, big32(f)) })
			}
		})
	})
}

// elements sends elements, some at a time: an attribute holds 64 KiB.
func (e *encoder) elements(msg uint16, flags int, c change) {
	some := func(fill func()) {
		request(&e.b, msg, flags, e.table, c.name)
		nest(&e.b, unix.NFTA_SET_ELEM_LIST_ELEMENTS, fill)
	}
	ranges := kindOf(c.name) == kindRanges
	for chunk := range slices.Chunk(c.allow, elementsAtOnce) {
		some(func() {
			for _, a := range chunk {
				first, last := allowKey(a, a.Ports.First, ranges), allowKey(a, a.Ports.Last, ranges)
				nest(&e.b, unix.NFTA_LIST_ELEM, func() {
					e.value(unix.NFTA_SET_ELEM_KEY, first[:])
					if ranges {
						e.value(attrKeyEnd, last[:])
					}
				})
			}
		})
	}
	for chunk := range slices.Chunk(c.spans, elementsAtOnce) {
		some(func() {
			for _, s := range chunk {
				first, last := spanKeys(s)
				nest(&e.b, unix.NFTA_LIST_ELEM, func() {
					e.value(unix.NFTA_SET_ELEM_KEY, first)
					e.value(attrKeyEnd, last)
				})
			}
		})
	}
	for chunk := range slices.Chunk(c.elems, elementsAtOnce/2) {
		some(func() {
			for _, x := range chunk {
				nest(&e.b, unix.NFTA_LIST_ELEM, func() {
					e.value(unix.NFTA_SET_ELEM_KEY, []byte(x.key))
					if x.chain != "" && msg == unix.NFT_MSG_NEWSETELEM {
						e.verdict(x.chain)
					}
				})
			}
		})
	}
}

func (e *encoder) value(typ uint16, v []byte) {
	nest(&e.b, typ, func() { e.b.Attr(unix.NFTA_DATA_VALUE, v) })
}

// verdictJump is NFT_JUMP. Elements of maps jump, they do not goto, and after each rule with a map comes one that refuses: a packet that began its way
// through the table before a change may find an element that is new in it, but in the element's chain none of the rules that are new. It comes
// back from there. From a goto it would leave the table, and that is accepted.
const verdictJump = int32(expr.VerdictJump)

func (e *encoder) verdict(chain string) {
	nest(&e.b, unix.NFTA_SET_ELEM_DATA, func() {
		nest(&e.b, unix.NFTA_DATA_VERDICT, func() {
			v := verdictJump
			e.b.Attr(unix.NFTA_VERDICT_CODE, big32(uint32(v)))
			e.b.String(unix.NFTA_VERDICT_CHAIN, chain)
		})
	})
}
