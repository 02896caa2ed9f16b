package nat

import (
	"bytes"
	"encoding/binary"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Our one rule is written out here attribute by attribute (linux/netfilter/nf_tables.h) and not with a library: silk-cni
// looks at it in every ADD, and the library would make it start slower.

// expression is one step of a rule: its name and its attributes.
type expression struct {
	name  string
	attrs []attr
}

// attr is an attribute: a number in network order, a text, or data to compare with.
type attr struct {
	typ   uint16
	value []byte
	data  uint16 // what value is wrapped in (NFTA_DATA_*), 0 for nothing
}

func num(typ uint16, v uint32) attr {
	return attr{typ: typ, value: binary.BigEndian.AppendUint32(nil, v)}
}

func text(typ uint16, s string) attr { return attr{typ: typ, value: append([]byte(s), 0)} }

const register = 1 // the one that everything here goes through

func load(key uint32) expression {
	return expression{"meta", []attr{num(unix.NFTA_META_DREG, register), num(unix.NFTA_META_KEY, key)}}
}

func compare(op uint32, value []byte) expression {
	return expression{"cmp", []attr{num(unix.NFTA_CMP_SREG, register), num(unix.NFTA_CMP_OP, op), {unix.NFTA_CMP_DATA, value, unix.NFTA_DATA_VALUE}}}
}

// Offsets of the addresses in an IPv4 header.
const (
	offsetSource      = 12
	offsetDestination = 16
)

// address4 loads an address of the IPv4 header.
func address4(offset uint32) expression {
	return expression{"payload", []attr{
		num(unix.NFTA_PAYLOAD_DREG, register), num(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_NETWORK_HEADER),
		num(unix.NFTA_PAYLOAD_OFFSET, offset), num(unix.NFTA_PAYLOAD_LEN, 4),
	}}
}

func lookup(set string, flags uint32) expression {
	return expression{"lookup", []attr{text(unix.NFTA_LOOKUP_SET, set), num(unix.NFTA_LOOKUP_SREG, register), num(unix.NFTA_LOOKUP_FLAGS, flags)}}
}

// notIn inverts a lookup.
const notIn = unix.NFT_LOOKUP_F_INV

// expressions are those of ruleText(vtep).
func expressions(vtep string) []expression {
	device := make([]byte, unix.IFNAMSIZ)
	copy(device, vtep)
	return []expression{
		// ip saddr @nat-local
		load(unix.NFT_META_NFPROTO), compare(unix.NFT_CMP_EQ, []byte{unix.NFPROTO_IPV4}),
		address4(offsetSource), lookup(setLocal, 0),
		// ip daddr != @nat-local
		address4(offsetDestination), lookup(setLocal, notIn),
		// ip daddr != @nat-no-masquerade
		address4(offsetDestination), lookup(setNoMasquerade, notIn),
		// oifname != "silk-vtep"
		load(unix.NFT_META_OIFNAME), compare(unix.NFT_CMP_NEQ, device),
		// masquerade
		{name: "masq"},
	}
}

// encode appends the expression to a list.
func (e expression) encode(b *kernel.Batch) {
	b.Nest(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, func() {
		b.String(unix.NFTA_EXPR_NAME, e.name)
		b.Nest(unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, func() {
			for _, a := range e.attrs {
				switch a.data {
				case 0:
					b.Attr(a.typ, a.value)
				case unix.NFTA_DATA_VALUE:
					b.Nest(a.typ|unix.NLA_F_NESTED, func() { b.Attr(unix.NFTA_DATA_VALUE, a.value) })
				default:
					b.Nest(a.typ|unix.NLA_F_NESTED, func() { b.Attr(a.data|unix.NLA_F_NESTED, a.value) })
				}
			}
		})
	})
}

// is reports whether the kernel's form of an expression says the same as e. A kernel may leave out what is zero, and may add
// attributes that are zero.
func (e expression) is(body []byte) bool {
	name := ""
	var data []byte
	for t, v := range kernel.Attrs(body) {
		switch t {
		case unix.NFTA_EXPR_NAME:
			name = kernel.Text(v)
		case unix.NFTA_EXPR_DATA:
			data = v
		}
	}
	if name != e.name {
		return false
	}
	if name == "counter" { // whatever it has counted
		return true
	}
	seen := map[uint16]bool{}
	for t, v := range kernel.Attrs(data) {
		seen[t] = true
		if !e.allows(t, v) {
			return false
		}
	}
	for _, a := range e.attrs {
		if !seen[a.typ] && !zero(a.value) {
			return false
		}
	}
	return true
}

func (e expression) allows(typ uint16, v []byte) bool {
	for _, a := range e.attrs {
		if a.typ != typ {
			continue
		}
		if a.data != 0 {
			for t, w := range kernel.Attrs(v) {
				return t == a.data && bytes.Equal(w, a.value)
			}
			return false
		}
		return bytes.Equal(v, a.value)
	}
	return zero(v)
}

func zero(v []byte) bool { return len(bytes.Trim(v, "\x00")) == 0 }

// foreignRule stands for a rule that is none of ours.
const foreignRule = "(another rule)"

// recognise returns the text of a rule in our chain: ours for whatever device, or foreignRule.
func recognise(body []byte) string {
	var items [][]byte
	for t, list := range nfAttrs(body) {
		if t == unix.NFTA_RULE_EXPRESSIONS {
			for _, item := range kernel.Attrs(list) {
				items = append(items, item)
			}
		}
	}
	vtep := ""
	want := expressions("")
	if len(items) != len(want) {
		return foreignRule
	}
	for i, e := range want {
		if e.is(items[i]) {
			continue
		}
		if i != len(want)-2 { // the comparison with the device's name, which is whatever it is
			return foreignRule
		}
		if vtep = comparedName(items[i]); !compare(unix.NFT_CMP_NEQ, expressions(vtep)[i].attrs[2].value).is(items[i]) {
			return foreignRule
		}
	}
	return ruleText(vtep)
}

// comparedName returns the text that an expression compares with.
func comparedName(body []byte) string {
	for t, v := range kernel.Attrs(body) {
		if t != unix.NFTA_EXPR_DATA {
			continue
		}
		for t, v := range kernel.Attrs(v) {
			if t != unix.NFTA_CMP_DATA {
				continue
			}
			for _, v := range kernel.Attrs(v) {
				return kernel.Text(v[:min(len(v), unix.IFNAMSIZ-1)])
			}
		}
	}
	return ""
}
