package nat

import (
	"encoding/binary"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Names of the chains. The first four are base chains.
const (
	chainPrerouting = "nat-prerouting"
	chainOutput     = "nat-output"
	chainHairpin    = "nat-hairpin"
	chainLoopback   = "nat-loopback"
	chainPorts      = "nat-ports"
)

// portChain is a chain of port maps as it should be. A chain without a type is no base chain.
type portChain struct {
	name, kind string
	hook       uint32
	priority   int32
	used       uint32 // rules and jumps to it
	rules      [][]expression
}

// Numbers of linux/netfilter.h, linux/netfilter/nf_conntrack_common.h, linux/rtnetlink.h and linux/netfilter/nf_nat.h.
const (
	statusDNAT      = 1 << 5 // IPS_DST_NAT
	fibAddressType  = 3      // NFT_FIB_RESULT_ADDRTYPE
	rangeAddress    = 1      // NF_NAT_RANGE_MAP_IPS
	rangePorts      = 2      // NF_NAT_RANGE_PROTO_SPECIFIED
	loopback        = 127    // the first octet of its network
	word1           = unix.NFT_REG32_00 + 1
	word2           = unix.NFT_REG32_00 + 2
	containers      = "s-" // what the names of container devices begin with
	priorityDstNAT  = -100
	priorityHairpin = postroutingPriority - 1
	priorityInput   = -10
)

// gateway is the address of the host's end of every veth pair.
var gateway = []byte{169, 254, 0, 1}

// portChains returns the chains in the order in which they can be made. Above each rule stands its text.
func portChains() []portChain {
	return []portChain{
		{name: chainPorts, used: 4, rules: [][]expression{
			// dnat ip to ip daddr . meta l4proto . th dport map @nat-ports-at
			append(onlyIPv4(), payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offsetDestination, 4, register),
				loadTo(unix.NFT_META_L4PROTO, word1), payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, word2), lookupIn(mapPortsAt), dnat()),
			// dnat ip to meta l4proto . th dport map @nat-ports
			append(onlyIPv4(), load(unix.NFT_META_L4PROTO), payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, word1), lookupIn(mapPorts), dnat()),
		}},
		{name: chainPrerouting, kind: "nat", hook: unix.NF_INET_PRE_ROUTING, priority: priorityDstNAT, used: 1, rules: [][]expression{
			// ip daddr != 127.0.0.0/8 ip daddr != @nat-local fib daddr type local jump nat-ports
			append(append(onlyIPv4(), firstOctet(offsetDestination), compare(unix.NFT_CMP_NEQ, []byte{loopback})), toHost()...),
		}},
		{name: chainOutput, kind: "nat", hook: unix.NF_INET_LOCAL_OUT, priority: priorityDstNAT, used: 1, rules: [][]expression{
			// ip daddr != @nat-local fib daddr type local jump nat-ports
			append(onlyIPv4(), toHost()...),
		}},
		{name: chainHairpin, kind: "nat", hook: unix.NF_INET_POST_ROUTING, priority: priorityHairpin, used: 2, rules: [][]expression{
			// ct status dnat ip saddr 127.0.0.0/8 oifname "s-*" snat ip to 169.254.0.1
			append(append(append(mapped(unix.NFT_CMP_NEQ), onlyIPv4()...), firstOctet(offsetSource), compare(unix.NFT_CMP_EQ, []byte{loopback}),
				load(unix.NFT_META_OIFNAME), compare(unix.NFT_CMP_EQ, []byte(containers))), snat()...),
			// ct status dnat ip saddr . ip daddr @nat-self snat ip to 169.254.0.1
			append(append(append(mapped(unix.NFT_CMP_NEQ), onlyIPv4()...), address4(offsetSource),
				payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offsetDestination, 4, word1), lookup(setSelf, 0)), snat()...),
		}},
		{name: chainLoopback, kind: "filter", hook: unix.NF_INET_LOCAL_IN, priority: priorityInput, used: 1, rules: [][]expression{
			// ip daddr 127.0.0.0/8 iifname "s-*" ct status ! dnat counter drop
			append(append(append(onlyIPv4(), firstOctet(offsetDestination), compare(unix.NFT_CMP_EQ, []byte{loopback}),
				load(unix.NFT_META_IIFNAME), compare(unix.NFT_CMP_EQ, []byte(containers))), mapped(unix.NFT_CMP_EQ)...),
				expression{name: "counter"}, verdict(nfDrop, "")),
		}},
	}
}

const nfDrop = 0 // linux/netfilter.h

// toHost goes on with what is for an address of this host outside the overlay.
func toHost() []expression {
	return []expression{
		// ip daddr != @nat-local
		address4(offsetDestination), lookup(setLocal, notIn),
		// fib daddr type local
		{"fib", []attr{num(unix.NFTA_FIB_DREG, register), num(unix.NFTA_FIB_RESULT, fibAddressType), num(unix.NFTA_FIB_FLAGS, unix.NFTA_FIB_F_DADDR)}},
		compare(unix.NFT_CMP_EQ, binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)),
		// jump nat-ports
		verdict(unix.NFT_JUMP, chainPorts),
	}
}

func onlyIPv4() []expression {
	return []expression{load(unix.NFT_META_NFPROTO), compare(unix.NFT_CMP_EQ, []byte{unix.NFPROTO_IPV4})}
}

// mapped compares whether the destination of the packet's connection was translated.
func mapped(op uint32) []expression {
	word := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	return []expression{
		{"ct", []attr{num(unix.NFTA_CT_DREG, register), num(unix.NFTA_CT_KEY, unix.NFT_CT_STATUS)}},
		{"bitwise", []attr{num(unix.NFTA_BITWISE_SREG, register), num(unix.NFTA_BITWISE_DREG, register), num(unix.NFTA_BITWISE_LEN, 4),
			{unix.NFTA_BITWISE_MASK, word(statusDNAT), unix.NFTA_DATA_VALUE}, {unix.NFTA_BITWISE_XOR, word(0), unix.NFTA_DATA_VALUE}}},
		compare(op, word(0)),
	}
}

func loadTo(key, reg uint32) expression {
	return expression{"meta", []attr{num(unix.NFTA_META_DREG, reg), num(unix.NFTA_META_KEY, key)}}
}

func payload(base, offset, length, reg uint32) expression {
	return expression{"payload", []attr{num(unix.NFTA_PAYLOAD_DREG, reg), num(unix.NFTA_PAYLOAD_BASE, base),
		num(unix.NFTA_PAYLOAD_OFFSET, offset), num(unix.NFTA_PAYLOAD_LEN, length)}}
}

// firstOctet loads that of an address, as nft(8) does for a prefix of 8 bits.
func firstOctet(offset uint32) expression {
	return payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, 1, register)
}

// lookupIn looks a map up and puts what it finds where the key was.
func lookupIn(set string) expression {
	e := lookup(set, 0)
	e.attrs = append(e.attrs, num(unix.NFTA_LOOKUP_DREG, register))
	return e
}

func dnat() expression {
	return expression{"nat", []attr{num(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT), num(unix.NFTA_NAT_FAMILY, unix.NFPROTO_IPV4),
		num(unix.NFTA_NAT_REG_ADDR_MIN, register), num(unix.NFTA_NAT_REG_ADDR_MAX, register),
		num(unix.NFTA_NAT_REG_PROTO_MIN, word1), num(unix.NFTA_NAT_REG_PROTO_MAX, word1), num(unix.NFTA_NAT_FLAGS, rangeAddress|rangePorts)}}
}

// snat gives a connection the gateway's address as its source.
func snat() []expression {
	return []expression{
		{"immediate", []attr{num(unix.NFTA_IMMEDIATE_DREG, register), {unix.NFTA_IMMEDIATE_DATA, gateway, unix.NFTA_DATA_VALUE}}},
		{"nat", []attr{num(unix.NFTA_NAT_TYPE, unix.NFT_NAT_SNAT), num(unix.NFTA_NAT_FAMILY, unix.NFPROTO_IPV4),
			num(unix.NFTA_NAT_REG_ADDR_MIN, register), num(unix.NFTA_NAT_REG_ADDR_MAX, register), num(unix.NFTA_NAT_FLAGS, rangeAddress)}},
	}
}

// verdict ends a rule: code is NF_DROP or NFT_JUMP, with the chain to jump to.
func verdict(code int32, chain string) expression {
	var b kernel.Batch
	b.Attr(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(code)))
	if chain != "" {
		b.String(unix.NFTA_VERDICT_CHAIN, chain)
	}
	return expression{"immediate", []attr{num(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT), {unix.NFTA_IMMEDIATE_DATA, b.Bytes(), unix.NFTA_DATA_VERDICT}}}
}

// isRule reports whether the kernel's form of a rule says the same.
func isRule(body []byte, want []expression) bool {
	var items [][]byte
	for t, list := range nfAttrs(body) {
		if t == unix.NFTA_RULE_EXPRESSIONS {
			for _, item := range kernel.Attrs(list) {
				items = append(items, item)
			}
		}
	}
	if len(items) != len(want) {
		return false
	}
	for i, e := range want {
		if !e.is(items[i]) {
			return false
		}
	}
	return true
}
