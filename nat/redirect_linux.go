package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// RedirectTable is the nft table, of family ip, that redirects within a container's namespace. It is ours alone.
const RedirectTable = "silk-redirect"

// Redirect says which TCP connections of a container end at a proxy that listens in the container. The zero Redirect redirects nothing.
type Redirect struct {
	To       netip.Prefix // connections that the container opens to this IPv4 network; zero for none
	Incoming bool         // and all that come in
	Port     uint16       // of the proxy
	Except   uint32       // connections that this user opens are the proxy's own: they go where they say
}

// SetRedirect makes the namespace, nil for the calling thread's, agree with r, in one transaction, whatever there was. fault.Invalid: r has a network that is not
// IPv4.
func SetRedirect(ns *kernel.NS, r Redirect) error {
	if r.To.IsValid() && !r.To.Addr().Is4() {
		return fault.Invalidf("network %v: expected an IPv4 network such as 10.127.0.0/16", r.To)
	}
	conn, err := kernel.DialNetfilter(ns)
	if err != nil {
		return err
	}
	defer conn.Close()
	var b kernel.Batch
	in := func(msg uint16, flags int) {
		b.Add(kernel.NFTables(msg), flags, kernel.NFGen(unix.NFPROTO_IPV4))
		b.String(1, RedirectTable) // the table is attribute 1 of each of these messages
	}
	in(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	in(unix.NFT_MSG_DELTABLE, 0) // with what an earlier call put into it
	if r.To.IsValid() || r.Incoming {
		in(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	}
	if r.To.IsValid() {
		redirectChain(&b, in, "output", unix.NF_INET_LOCAL_OUT, r.outgoing())
	}
	if r.Incoming {
		redirectChain(&b, in, "prerouting", unix.NF_INET_PRE_ROUTING, r.incoming())
	}
	if err := conn.Transact(&b, 0); err != nil {
		return fmt.Errorf("set nft table ip %s: %w", RedirectTable, err)
	}
	return nil
}

// redirectPriority is where destination translation stands among the hooks ("dstnat").
const redirectPriority = -100

func redirectChain(b *kernel.Batch, in func(uint16, int), name string, hook uint32, rule []expression) {
	in(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE)
	b.String(unix.NFTA_CHAIN_NAME, name)
	b.Nest(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, func() {
		big(b, unix.NFTA_HOOK_HOOKNUM, hook)
		priority := int32(redirectPriority)
		big(b, unix.NFTA_HOOK_PRIORITY, uint32(priority))
	})
	big(b, unix.NFTA_CHAIN_POLICY, nfAccept)
	b.String(unix.NFTA_CHAIN_TYPE, "nat")
	in(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	b.String(unix.NFTA_RULE_CHAIN, name)
	b.Nest(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, func() {
		for _, e := range rule {
			e.encode(b)
		}
	})
}

// outgoing is: meta skuid != EXCEPT ip daddr TO meta l4proto tcp redirect to :PORT.
func (r Redirect) outgoing() []expression {
	mask := ^uint32(0) << (32 - r.To.Bits())
	if r.To.Bits() == 0 {
		mask = 0
	}
	to := r.To.Masked().Addr().As4()
	return append([]expression{
		load(unix.NFT_META_SKUID), compare(unix.NFT_CMP_NEQ, binary.NativeEndian.AppendUint32(nil, r.Except)),
		address4(offsetDestination),
		{"bitwise", []attr{
			num(unix.NFTA_BITWISE_SREG, register), num(unix.NFTA_BITWISE_DREG, register), num(unix.NFTA_BITWISE_LEN, 4),
			{unix.NFTA_BITWISE_MASK, binary.BigEndian.AppendUint32(nil, mask), unix.NFTA_DATA_VALUE}, {unix.NFTA_BITWISE_XOR, make([]byte, 4), unix.NFTA_DATA_VALUE},
		}},
		compare(unix.NFT_CMP_EQ, to[:]),
	}, r.incoming()...)
}

// incoming is: meta l4proto tcp redirect to :PORT.
func (r Redirect) incoming() []expression {
	return []expression{
		load(unix.NFT_META_L4PROTO), compare(unix.NFT_CMP_EQ, []byte{unix.IPPROTO_TCP}),
		{"immediate", []attr{num(unix.NFTA_IMMEDIATE_DREG, register), {unix.NFTA_IMMEDIATE_DATA, binary.BigEndian.AppendUint16(nil, r.Port), unix.NFTA_DATA_VALUE}}},
		{"redir", []attr{num(unix.NFTA_REDIR_REG_PROTO_MIN, register)}},
	}
}
