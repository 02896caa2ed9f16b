package nat

import (
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// portSet is the declaration of a set; one without data is no map.
type portSet struct {
	name              string
	key, data         uint32 // types as nft(8) numbers them, 6 bits for each field
	keyBytes, dataLen uint32
}

// Types as nft(8) numbers them.
const (
	typeProtocol = 12
	typePort     = 13
)

var portSets = []portSet{
	// map nat-ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
	{mapPorts, typeProtocol<<6 | typePort, typeIPv4<<6 | typePort, 8, 8},
	// map nat-ports-at { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
	{mapPortsAt, typeIPv4<<12 | typeProtocol<<6 | typePort, typeIPv4<<6 | typePort, 12, 8},
	// set nat-self { type ipv4_addr . ipv4_addr; }
	{setSelf, typeIPv4<<6 | typeIPv4, 0, 8, 0},
}

func (x portSet) flags() uint32 {
	if x.data != 0 {
		return unix.NFT_SET_MAP
	}
	return 0
}

func (x portSet) add(b *kernel.Batch) {
	request(b, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE|unix.NLM_F_EXCL, Table, x.name)
	big(b, unix.NFTA_SET_FLAGS, x.flags())
	big(b, unix.NFTA_SET_KEY_TYPE, x.key)
	big(b, unix.NFTA_SET_KEY_LEN, x.keyBytes)
	if x.data != 0 {
		big(b, unix.NFTA_SET_DATA_TYPE, x.data)
		big(b, unix.NFTA_SET_DATA_LEN, x.dataLen)
	}
	big(b, unix.NFTA_SET_ID, uint32(b.Len())) // must differ within a transaction
}

// is reports whether a set is declared so.
func (x portSet) is(body []byte) bool {
	var flags, key, data uint32
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_SET_FLAGS:
			flags = big32(v)
		case unix.NFTA_SET_KEY_TYPE:
			key = big32(v)
		case unix.NFTA_SET_DATA_TYPE:
			data = big32(v)
		}
	}
	return flags == x.flags() && key == x.key && data == x.data
}

// requestChainOf appends a request about a chain.
func requestChainOf(b *kernel.Batch, msg uint16, flags int, chain string) {
	request(b, msg, flags, Table)
	b.String(unix.NFTA_CHAIN_NAME, chain)
}

func (x portChain) add(b *kernel.Batch) {
	requestChainOf(b, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL, x.name)
	if x.kind != "" {
		b.Nest(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, func() {
			big(b, unix.NFTA_HOOK_HOOKNUM, x.hook)
			big(b, unix.NFTA_HOOK_PRIORITY, uint32(x.priority))
		})
		big(b, unix.NFTA_CHAIN_POLICY, nfAccept)
		b.String(unix.NFTA_CHAIN_TYPE, x.kind)
	}
	for _, r := range x.rules {
		request(b, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, Table, x.name)
		b.Nest(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, func() {
			for _, e := range r {
				e.encode(b)
			}
		})
	}
}

// is reports whether a chain is declared so.
func (x portChain) is(body []byte) bool {
	if x.kind == "" {
		for t := range nfAttrs(body) {
			if t == unix.NFTA_CHAIN_HOOK {
				return false
			}
		}
		return true
	}
	return isBaseChain(body, x.kind, x.hook, x.priority)
}

// hasRules reports whether the rules of the chain are what they should be.
func (x portChain) hasRules(c *kernel.Conn) (bool, error) {
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETRULE, 0, Table, x.name)
	n, right := 0, true
	err := c.Dump(&b, func() { n, right = 0, true }, func(m kernel.Message) error {
		right = right && n < len(x.rules) && isRule(m.Body, x.rules[n])
		n++
		return nil
	})
	return right && n == len(x.rules), err
}

// inList is how many elements go into one request: the list of them is one attribute, of 64 KiB at most.
const inList = 500

func addPortElements(b *kernel.Batch, list []element, flags int) {
	for _, x := range portSets {
		of := slices.DeleteFunc(slices.Clone(list), func(e element) bool { return e.set != x.name })
		for part := range slices.Chunk(of, inList) {
			request(b, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|flags, Table, x.name)
			listElements(b, part)
		}
	}
}

func deleteElement(b *kernel.Batch, e element) {
	request(b, unix.NFT_MSG_DELSETELEM, 0, Table, e.set)
	listElements(b, []element{{set: e.set, key: e.key}})
}

// listElements appends elements to a request about their set.
func listElements(b *kernel.Batch, list []element) {
	b.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED, func() {
		for _, e := range list {
			b.Nest(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, func() {
				b.Nest(unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED, func() { b.Attr(unix.NFTA_DATA_VALUE, []byte(e.key)) })
				if e.data != "" {
					b.Nest(unix.NFTA_SET_ELEM_DATA|unix.NLA_F_NESTED, func() { b.Attr(unix.NFTA_DATA_VALUE, []byte(e.data)) })
				}
			})
		}
	})
}

func observePortElements(c *kernel.Conn, set string) ([]element, error) {
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETSETELEM, 0, Table, set)
	var list []element
	err := c.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		list = append(list, parsePortElements(m.Body, set)...)
		return nil
	})
	return list, err
}

// parsePortElements reads the elements in a message.
func parsePortElements(body []byte, set string) []element {
	value := func(v []byte) string {
		for t, v := range kernel.Attrs(v) {
			if t == unix.NFTA_DATA_VALUE {
				return string(v)
			}
		}
		return ""
	}
	var out []element
	for t, list := range nfAttrs(body) {
		if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, item := range kernel.Attrs(list) {
			e := element{set: set}
			for t, v := range kernel.Attrs(item) {
				switch t {
				case unix.NFTA_SET_ELEM_KEY:
					e.key = value(v)
				case unix.NFTA_SET_ELEM_DATA:
					e.data = value(v)
				}
			}
			out = append(out, e)
		}
	}
	return out
}
