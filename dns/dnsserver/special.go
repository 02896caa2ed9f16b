package dnsserver

import (
	"bytes"
	"net/netip"
	"strings"
)

// kind is what a name is by how it looks.
type kind uint8

const (
	ordinary      kind = iota
	serviceName        // _service._proto.NAME: SRV records of NAME
	aboveServices      // _proto.NAME: there, and nothing else
	addressName        // 10-255-1-5.NAME: one address of NAME
)

// special returns what a name is, and what follows the labels that make it so.
func special(name []byte) (k kind, rest []byte, a netip.Addr) {
	first, rest, ok := bytes.Cut(name, []byte{'.'})
	switch {
	case !ok || len(first) == 0:
	case first[0] == '_':
		if second, after, ok := bytes.Cut(rest, []byte{'.'}); ok && protocol(second) {
			return serviceName, after, a
		}
		if protocol(first) {
			return aboveServices, rest, a
		}
	case bytes.IndexByte(first, '-') > 0:
		if a, ok = addressOf(string(first)); ok {
			return addressName, rest, a
		}
	}
	return ordinary, nil, a
}

func protocol(label []byte) bool { return string(label) == "_tcp" || string(label) == "_udp" }

// addressLabel writes an address as a label: 10-255-1-5, fd00-0-0-0-0-0-0-1.
func addressLabel(a netip.Addr) string {
	if a.Is4() {
		return strings.ReplaceAll(a.String(), ".", "-")
	}
	const hex = "0123456789abcdef"
	var b []byte
	for i, v := 0, a.As16(); i < len(v); i += 2 {
		if i > 0 {
			b = append(b, '-')
		}
		group, from := []byte{hex[v[i]>>4], hex[v[i]&15], hex[v[i+1]>>4], hex[v[i+1]&15]}, 0
		for from < 3 && group[from] == '0' {
			from++
		}
		b = append(b, group[from:]...)
	}
	return string(b)
}

// addressOf reads what addressLabel writes, and nothing else.
func addressOf(label string) (a netip.Addr, ok bool) {
	separator := ""
	switch strings.Count(label, "-") {
	case 3:
		separator = "."
	case 7:
		separator = ":"
	default:
		return a, false
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", separator))
	return a, err == nil && addressLabel(a) == label
}
