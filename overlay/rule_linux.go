package overlay

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ruleChain is a base chain of type filter and policy accept with its rules.
type ruleChain struct {
	name, hook string
	priority   int32
	rules      []rule
}

// rule is an nftables rule: its text and the expressions that the kernel carries out.
type rule struct {
	text  string
	exprs []expr.Any
}

func newRule(parts ...rule) rule {
	var all rule
	texts := make([]string, len(parts))
	for i, p := range parts {
		texts[i] = p.text
		all.exprs = append(all.exprs, p.exprs...)
	}
	all.text = strings.Join(texts, " ")
	return all
}

// iifname matches the name of the device that a packet came in by; a star at the end stands for any rest.
func iifname(name string) rule {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	if prefix, ok := strings.CutSuffix(name, "*"); ok {
		data = []byte(prefix)
	}
	return rule{fmt.Sprintf("iifname %q", name), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}}
}

// iifnameNot matches every packet that came in by a device of another name.
func iifnameNot(name string) rule {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return rule{fmt.Sprintf("iifname != %q", name), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data},
	}}
}

// Offsets of the addresses in an IPv4 header.
const (
	offsetSaddr = 12
	offsetDaddr = 16
)

// ipv4 loads an address of the IPv4 header; in a table of family inet it must first be one.
func ipv4(offset uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
	}
}

func inPrefix(offset uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
	exprs, a := ipv4(offset), p.Addr().As4()
	if p.Bits() < 32 {
		mask := binary.BigEndian.AppendUint32(nil, ^uint32(uint64(1)<<(32-p.Bits())-1))
		exprs = append(exprs, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)})
	}
	return append(exprs, &expr.Cmp{Op: op, Register: 1, Data: a[:]})
}

func prefixName(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// saddr matches the source address; not is "" or "!= ".
func saddr(not string, p netip.Prefix) rule {
	op := expr.CmpOpEq
	if not != "" {
		op = expr.CmpOpNeq
	}
	return rule{"ip saddr " + not + prefixName(p), inPrefix(offsetSaddr, op, p)}
}

func daddr(p netip.Prefix) rule {
	return rule{"ip daddr " + prefixName(p), inPrefix(offsetDaddr, expr.CmpOpEq, p)}
}

// saddrBetween matches the source addresses that are in one network but not in a part of it.
func saddrBetween(in, not netip.Prefix) rule {
	a, b := saddr("", in), saddr("!= ", not)
	return rule{a.text + " " + b.text, append(a.exprs, b.exprs[2:]...)} // it is known to be IPv4
}

func saddrIn(set string) rule {
	return rule{"ip saddr @" + set, append(ipv4(offsetSaddr), &expr.Lookup{SourceRegister: 1, SetName: set})}
}

// ownSource matches packets from a container's device with an address that is its own by its name. The name of the device is fetched once.
func ownSource() rule {
	return rule{fmt.Sprintf("iifname \"%s*\" iifname . ip saddr @%s", containerDevices, ownSet), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(containerDevices)},
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 2, Base: expr.PayloadBaseNetworkHeader, Offset: offsetSaddr, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: ownSet},
	}}
}

// thDportNot matches packets of any protocol that have another number where UDP has the destination port. Fragments without
// a transport header do not match.
func thDportNot(port uint16) rule {
	return rule{fmt.Sprintf("th dport != %d", port), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}}
}

func dport(port uint16) rule {
	return rule{fmt.Sprintf("udp dport %d", port), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}}
}

// sourceRouted matches packets whose source is routed by the device that they came in by.
func sourceRouted() rule {
	return rule{"fib saddr . iif oif exists", []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, 1)},
	}}
}

// markLacks matches packets whose mark has none of the bits.
func markLacks(bits uint32) rule {
	return rule{fmt.Sprintf("meta mark & 0x%08x == 0x00000000", bits), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
	}}
}

// keepMark clears all bits of the packet's mark but those in keep.
func keepMark(keep uint32) rule {
	return rule{fmt.Sprintf("meta mark set meta mark & 0x%08x", keep), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, keep), Xor: make([]byte, 4)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}}
}

func counter() rule { return rule{"counter", []expr.Any{&expr.Counter{}}} }

func notrack() rule { return rule{"notrack", []expr.Any{&expr.Notrack{}}} }

func accept() rule { return rule{"accept", []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}} }

func drop() rule { return rule{"drop", []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}} }
