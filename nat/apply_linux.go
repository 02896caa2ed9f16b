package nat

import (
	"encoding/binary"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

const (
	postroutingPriority = 100 // where source translation stands among the hooks ("srcnat")
	nfAccept            = 1   // linux/netfilter.h
	typeIPv4            = 7   // what nft(8) calls ipv4_addr
)

// encode returns the requests of the changes, one for each.
func encode(changes []change) *kernel.Batch {
	b := new(kernel.Batch)
	for _, c := range changes {
		switch c.verb + " " + c.object {
		case "add table":
			request(b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, Table)
		case "delete table":
			request(b, unix.NFT_MSG_DELTABLE, 0, Table)
		case "add set":
			addSet(b, c.name)
		case "delete set":
			request(b, unix.NFT_MSG_DELSET, 0, Table, c.name)
		case "add element":
			addElements(b, c.name, c.spans)
		case "flush set":
			request(b, unix.NFT_MSG_DELSETELEM, 0, Table, c.name)
		case "add chain":
			addChain(b)
		case "delete chain":
			requestChain(b, unix.NFT_MSG_DELCHAIN, 0)
		case "add rule":
			addRule(b, c.vtep)
		case "flush chain":
			request(b, unix.NFT_MSG_DELRULE, 0, Table, c.name)
		default:
			panic("nat: no request for " + c.String())
		}
	}
	return b
}

// big appends a 32-bit attribute in network order.
func big(b *kernel.Batch, typ uint16, v uint32) { b.Attr(typ, binary.BigEndian.AppendUint32(nil, v)) }

func addSet(b *kernel.Batch, name string) {
	addSetFlags(b, name, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
}

func addSetFlags(b *kernel.Batch, name string, flags int) {
	request(b, unix.NFT_MSG_NEWSET, flags, Table, name)
	big(b, unix.NFTA_SET_FLAGS, unix.NFT_SET_INTERVAL)
	big(b, unix.NFTA_SET_KEY_TYPE, typeIPv4)
	big(b, unix.NFTA_SET_KEY_LEN, 4)
	big(b, unix.NFTA_SET_ID, uint32(b.Len())) // must differ within a transaction
}

func addElements(b *kernel.Batch, set string, spans []span) {
	request(b, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, Table, set)
	b.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED, func() {
		for _, m := range marksOf(spans) {
			b.Nest(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, func() {
				b.Nest(unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED, func() { big(b, unix.NFTA_DATA_VALUE, m.at) })
				if m.end {
					big(b, unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
				}
			})
		}
	})
}

func addChain(b *kernel.Batch) {
	requestChain(b, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	b.Nest(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, func() {
		big(b, unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_POST_ROUTING)
		big(b, unix.NFTA_HOOK_PRIORITY, postroutingPriority)
	})
	big(b, unix.NFTA_CHAIN_POLICY, nfAccept)
	b.String(unix.NFTA_CHAIN_TYPE, "nat")
}

func addRule(b *kernel.Batch, vtep string) {
	request(b, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, Table, chainName)
	b.Nest(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, func() {
		for _, e := range expressions(vtep) {
			e.encode(b)
		}
	})
}
