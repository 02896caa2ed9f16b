package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/internal/kernel"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rule is an nftables rule: its text, the expressions as they are sent, and a form of them that what the kernel lists can be compared with.
type rule struct {
	text  string
	exprs []byte
	canon string
}

// part is a piece of a rule: text and the expressions that it stands for.
type part struct {
	text  string
	exprs []expr.Any
}

// newRule puts parts together. All that is in them is ours, so expressions that cannot be encoded are a defect.
func newRule(parts ...part) rule {
	var texts []string
	var b kernel.Batch
	for _, p := range parts {
		texts = append(texts, p.text)
		for _, e := range p.exprs {
			if a, is := e.(ctAddress); is {
				b.Attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, a.encode())
				continue
			}
			raw, err := expr.Marshal(unix.NFPROTO_INET, e)
			if err != nil {
				panic(fmt.Sprintf("encode nft expression %+v: %v", e, err))
			}
			b.Attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, raw)
		}
	}
	raw := b.Bytes()
	return rule{strings.Join(texts, " "), raw, canonical(raw)}
}

// Registers. The first four bytes of each 16-byte register also have a 32-bit name; the kernel lists them by the wide one.
const (
	reg1    = 1                       // bytes 0-15
	reg2    = 2                       // bytes 16-31
	word1   = unix.NFT_REG32_00 + 1   // bytes 4-7
	word2   = unix.NFT_REG32_00 + 2   // bytes 8-11
	word3   = unix.NFT_REG32_00 + 3   // bytes 12-15
	ifnames = unix.IFNAMSIZ           // bytes of a device's name in a register: all of reg1
	ipv4    = byte(unix.NFPROTO_IPV4) // what meta nfproto says
)

// Offsets in headers.
const (
	offsetSaddr = 12 // network
	offsetDaddr = 16
	offsetSport = 0 // transport
	offsetDport = 2
)

func meta(key expr.MetaKey, reg uint32) expr.Any { return &expr.Meta{Key: key, Register: reg} }

func compare(op expr.CmpOp, data ...byte) expr.Any {
	return &expr.Cmp{Op: op, Register: reg1, Data: data}
}

func network(offset, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
}

func transport(offset, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
}

// and keeps the bits of a 32-bit register that are in mask and then flips those in flip.
func and(reg, mask, flip uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: host32(mask), Xor: host32(flip)}
}

// onlyIPv4 guards what reads an IPv4 header: the table is of family inet.
func onlyIPv4() []expr.Any {
	return []expr.Any{meta(expr.MetaKeyNFPROTO, reg1), compare(expr.CmpOpEq, ipv4)}
}

func host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func big32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// deviceName returns what a device's name is compared with: padded, or only the beginning if a star follows it.
func deviceName(name string) []byte {
	if prefix, ok := strings.CutSuffix(name, "*"); ok {
		return []byte(prefix)
	}
	return append([]byte(name), make([]byte, ifnames-len(name))...)
}

func iifname(name string) part {
	return part{fmt.Sprintf("iifname %q", name), []expr.Any{meta(expr.MetaKeyIIFNAME, reg1), compare(expr.CmpOpEq, deviceName(name)...)}}
}

func oifname(name string) part {
	return part{fmt.Sprintf("oifname %q", name), []expr.Any{meta(expr.MetaKeyOIFNAME, reg1), compare(expr.CmpOpEq, deviceName(name)...)}}
}

func oifnameNot(name string) part {
	return part{fmt.Sprintf("oifname != %q", name), []expr.Any{meta(expr.MetaKeyOIFNAME, reg1), compare(expr.CmpOpNeq, deviceName(name)...)}}
}

func inNetwork(word string, offset uint32, p netip.Prefix) part {
	a := p.Addr().As4()
	exprs := append(onlyIPv4(), network(offset, reg1))
	if p.Bits() < 32 {
		mask := big32(^uint32(uint64(1)<<(32-p.Bits()) - 1))
		exprs = append(exprs, &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: mask, Xor: make([]byte, 4)})
	}
	return part{fmt.Sprintf("ip %s %v", word, p), append(exprs, compare(expr.CmpOpEq, a[:]...))}
}

func saddrIn(p netip.Prefix) part { return inNetwork("saddr", offsetSaddr, p) }
func daddrIn(p netip.Prefix) part { return inNetwork("daddr", offsetDaddr, p) }

// Bits of a connection's state (linux/netfilter/nf_conntrack_common.h: NF_CT_STATE_BIT).
const stateInvalid, stateEstablished, stateRelated, stateNew = 1 << 0, 1 << 1, 1 << 2, 1 << 3

func ctState(op expr.CmpOp, bits uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: reg1}, and(reg1, bits, 0), compare(op, 0, 0, 0, 0)}
}

func isEstablished() part {
	return part{"ct state established", ctState(expr.CmpOpNeq, stateEstablished)}
}

func related() part { return part{"ct state related", ctState(expr.CmpOpNeq, stateRelated)} }

// isMapped is true of a packet in a connection whose destination was translated (linux/netfilter/nf_conntrack_common.h: IPS_DST_NAT).
func isMapped() part {
	const statusDNAT = 1 << 5
	return part{"ct status dnat", []expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: reg1}, and(reg1, statusDNAT, 0), compare(expr.CmpOpNeq, 0, 0, 0, 0)}}
}

func notEstablished() part {
	return part{"ct state ! established,related", ctState(expr.CmpOpEq, stateEstablished|stateRelated)}
}

// relatedICMP is true of ICMP errors about a connection.
func relatedICMP() part {
	return part{"meta l4proto icmp ct state related", append(protocol("icmp", unix.IPPROTO_ICMP).exprs, related().exprs...)}
}

// icmpAnswer is true of ICMP that asks for nothing: errors and answers.
func icmpAnswer() part {
	const echoRequest = 8
	return part{"icmp type != echo-request", append(protocol("icmp", unix.IPPROTO_ICMP).exprs,
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Len: 1}, compare(expr.CmpOpNeq, echoRequest))}
}

// ctAddress loads the source address of one of a connection's tuples, which the library cannot say (NFT_CT_SRC_IP, Linux 4.17).
type ctAddress struct {
	expr.Any // nil: newRule encodes it
	tuple    byte
	register uint32
}

// The tuples of a connection (IP_CT_DIR_ORIGINAL, IP_CT_DIR_REPLY), and what loads their source address.
const (
	originalTuple, replyTuple = 0, 1

	ctSourceIP = 19 // NFT_CT_SRC_IP
)

func (a ctAddress) encode() []byte {
	var b kernel.Batch
	b.String(unix.NFTA_EXPR_NAME, "ct")
	b.Nest(unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, func() {
		b.Attr(unix.NFTA_CT_DREG, big32(a.register))
		b.Attr(unix.NFTA_CT_KEY, big32(ctSourceIP))
		b.Attr(unix.NFTA_CT_DIRECTION, []byte{a.tuple})
	})
	return b.Bytes()
}

// ownEndOf is true if an end of the packet's connection, as the rules see it behind translations, is the address of the device that the packet came from.
func ownEndOf(tuple byte, set string) part {
	name := map[byte]string{originalTuple: "original", replyTuple: "reply"}[tuple]
	return part{fmt.Sprintf("iifname . ct %s ip saddr @%s", name, set),
		[]expr.Any{meta(expr.MetaKeyIIFNAME, reg1), ctAddress{tuple: tuple, register: reg2}, in(set)}}
}

func protocol(name string, number byte) part {
	return part{"meta l4proto " + name, []expr.Any{meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, number)}}
}

func udpPort(port uint16) part {
	return part{fmt.Sprintf("udp dport %d", port), append(protocol("udp", unix.IPPROTO_UDP).exprs,
		transport(offsetDport, reg1), compare(expr.CmpOpEq, byte(port>>8), byte(port)))}
}

func notIPv4() part {
	return part{"meta nfproto != ipv4", []expr.Any{meta(expr.MetaKeyNFPROTO, reg1), compare(expr.CmpOpNeq, ipv4)}}
}

var sign = map[expr.CmpOp]string{expr.CmpOpEq: "==", expr.CmpOpNeq: "!="}

// tagIs compares the packet's tag.
func tagIs(op expr.CmpOp, tag uint32) part {
	return part{fmt.Sprintf("meta mark & 0x%08x %s 0x%08x", tagMask, sign[op], tag),
		[]expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, tagMask, 0), compare(op, host32(tag)...)}}
}

// setTag gives the packet a tag and leaves the other bits of its mark.
func setTag(tag uint32) part {
	text := fmt.Sprintf("meta mark set meta mark & 0x%08x", ^uint32(tagMask))
	if tag != 0 {
		text += fmt.Sprintf(" | 0x%08x", tag)
	}
	return part{text, []expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, ^uint32(tagMask), tag),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true}}}
}

// hasBit is true of a packet whose mark has a bit.
func hasBit(bit uint32) part {
	return part{fmt.Sprintf("meta mark & 0x%08x == 0x%08x", bit, bit),
		[]expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, bit, 0), compare(expr.CmpOpEq, host32(bit)...)}}
}

// connMark compares the bits in mask of the connection's mark with 0.
func connMark(op expr.CmpOp, mask uint32) part {
	exprs := []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, and(reg1, mask, 0), compare(op, 0, 0, 0, 0)}
	if mask == ^uint32(0) {
		return part{"ct mark " + sign[op] + " 0x00000000", slices.Delete(exprs, 1, 2)}
	}
	return part{fmt.Sprintf("ct mark & 0x%08x %s 0x00000000", mask, sign[op]), exprs}
}

// connTagIs compares the tag that a connection's mark has where packets have theirs.
func connTagIs(tag uint32) part {
	return part{fmt.Sprintf("ct mark & 0x%08x == 0x%08x", tagMask, tag),
		[]expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, and(reg1, tagMask, 0), compare(expr.CmpOpEq, host32(tag)...)}}
}

// streamAllowedIn is allowedIn with the tag that the connection bears.
func streamAllowedIn(set string) part {
	return part{fmt.Sprintf("ct mark & 0x%08x . meta l4proto . th dport @%s", tagMask, set), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, and(reg1, tagMask, 0), meta(expr.MetaKeyL4PROTO, word1), transport(offsetDport, word2), in(set)}}
}

func connMarkFromTag() part {
	return part{fmt.Sprintf("ct mark set meta mark & 0x%08x", tagMask), []expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, tagMask, 0),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true}}}
}

func connMarkBit(bit uint32) part {
	return part{fmt.Sprintf("ct mark set ct mark | 0x%08x", bit), []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, and(reg1, ^bit, bit),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true}}}
}

// Lookups. In each the concatenated key begins at reg1.

// verdictBySource first compares the name of the device, which is in the key too: it is fetched once for both, and before anything else.
func verdictBySource(device, set string) part {
	return part{fmt.Sprintf("iifname %q iifname . ip saddr vmap @%s", device, set), []expr.Any{
		meta(expr.MetaKeyIIFNAME, reg1), compare(expr.CmpOpEq, deviceName(device)...),
		meta(expr.MetaKeyNFPROTO, reg2), &expr.Cmp{Op: expr.CmpOpEq, Register: reg2, Data: []byte{ipv4}},
		network(offsetSaddr, reg2), verdicts(set)}}
}

func sourceNotIn(set string) part {
	return part{"iifname . ip saddr != @" + set, append(onlyIPv4(), meta(expr.MetaKeyIIFNAME, reg1), network(offsetSaddr, reg2),
		&expr.Lookup{SourceRegister: reg1, SetName: set, Invert: true})}
}

func verdictByDestination(set string) part {
	return part{"ip daddr vmap @" + set, append(onlyIPv4(), network(offsetDaddr, reg1), verdicts(set))}
}

// verdictByTag looks the bits of the tag that are in mask up.
func verdictByTag(mask uint32, set string) part {
	return part{fmt.Sprintf("meta mark & 0x%08x vmap @%s", mask, set), []expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, mask, 0), verdicts(set)}}
}

func verdicts(set string) expr.Any {
	return &expr.Lookup{SourceRegister: reg1, SetName: set, IsDestRegSet: true}
}

func in(set string) expr.Any { return &expr.Lookup{SourceRegister: reg1, SetName: set} }

// allowedIn looks (tag, protocol, port) up. Sets of ranges are kept in network order, or nft would list the tag reversed.
func allowedIn(set string, ranges bool) part {
	exprs := []expr.Any{meta(expr.MetaKeyMARK, reg1), and(reg1, tagMask, 0)}
	if ranges {
		exprs = append(exprs, &expr.Byteorder{SourceRegister: reg1, DestRegister: reg1, Op: expr.ByteorderHton, Len: 4, Size: 4})
	}
	exprs = append(exprs, meta(expr.MetaKeyL4PROTO, word1), transport(offsetDport, word2), in(set))
	return part{fmt.Sprintf("meta mark & 0x%08x . meta l4proto . th dport @%s", tagMask, set), exprs}
}

func serviceIn(set string) part {
	return part{"ip daddr . meta l4proto . th dport @" + set,
		append(onlyIPv4(), network(offsetDaddr, reg1), meta(expr.MetaKeyL4PROTO, word1), transport(offsetDport, word2), in(set))}
}

func ingressIn(set string) part {
	return part{"meta l4proto tcp ip daddr . th dport @" + set, append(append(protocol("tcp", unix.IPPROTO_TCP).exprs, onlyIPv4()...),
		network(offsetDaddr, reg1), transport(offsetDport, word1), in(set))}
}

func endedIn(set string) part {
	return part{"ip saddr . th sport . ip daddr . th dport . meta l4proto @" + set, append(onlyIPv4(), network(offsetSaddr, reg1),
		transport(offsetSport, word1), network(offsetDaddr, word2), transport(offsetDport, word3), meta(expr.MetaKeyL4PROTO, reg2), in(set))}
}

// Statements.

func count(name string) part {
	return part{fmt.Sprintf("counter name %q", name), []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}}
}

func limit(rate uint64, burst uint32) part {
	return part{fmt.Sprintf("limit rate %d/second burst %d packets", rate, burst),
		[]expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: rate, Unit: expr.LimitTimeSecond, Burst: burst}}}
}

func rejectReset() part {
	return part{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

func rejectUnreachable() part {
	return part{"reject", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}}
}

func accept() part { return part{"accept", []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}} }
func drop() part   { return part{"drop", []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}} }

func jump(chain string) part {
	return part{"jump " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}}
}

func goTo(chain string) part {
	return part{"goto " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}
