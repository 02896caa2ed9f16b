package endpoint

import (
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/lease/mac"
)

// A record's file is called network@container@interface@address, so that one read of the directory tells which addresses
// are taken and by whom, even when a record's content is damaged. Neither networks nor containers can contain
// an '@', interfaces may.

// maxName bounds the name of a file in bytes, as Linux does.
const maxName = 255

// prefix returns the file name of k's record without its addresses.
func (k Key) prefix() string { return k.Network + "@" + k.Container + "@" + k.Interface + "@" }

// file returns the name of k's record with these addresses.
func (k Key) file(addrs []netip.Prefix) string {
	b := []byte(k.prefix())
	for i, a := range addrs {
		if i > 0 {
			b = append(b, '+')
		}
		b = a.Addr().AppendTo(b)
	}
	return string(b)
}

// entry is what the name of a record's file tells.
type entry struct {
	file      string
	key       Key
	addresses []netip.Addr
}

// parseName reads a file name; ok is false for one that is no record's.
func parseName(file string) (e entry, ok bool) {
	network, rest, ok1 := strings.Cut(file, "@")
	container, rest, ok2 := strings.Cut(rest, "@")
	last := strings.LastIndexByte(rest, '@')
	if !ok1 || !ok2 || last < 1 || network == "" || network[0] == '.' || container == "" {
		return entry{}, false
	}
	e = entry{file: file, key: Key{network, container, rest[:last]}}
	var buf [64]byte
	for s := range strings.SplitSeq(rest[last+1:], "+") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || string(a.AppendTo(buf[:0])) != s {
			return entry{}, false
		}
		e.addresses = append(e.addresses, a)
	}
	return e, true
}

// listing is the names of files, in no order. Most questions about records need few of them parsed.
type listing []string

// entries parses all that are records'.
func (n listing) entries() []entry {
	list := make([]entry, 0, len(n))
	for _, f := range n {
		if e, ok := parseName(f); ok {
			list = append(list, e)
		}
	}
	return list
}

// find returns the entry of k.
func (n listing) find(k Key) (entry, bool) {
	p := k.prefix()
	for _, f := range n {
		if strings.HasPrefix(f, p) && !strings.Contains(f[len(p):], "@") {
			if e, ok := parseName(f); ok {
				return e, true
			}
		}
	}
	return entry{}, false
}

// holder returns the entry that has the address.
func (n listing) holder(a netip.Addr) (entry, bool) {
	text := a.String()
	for _, f := range n {
		if strings.HasSuffix(f, text) || strings.Contains(f, "+") && strings.Contains(f, text) {
			if e, ok := parseName(f); ok && slices.Contains(e.addresses, a) {
				return e, true
			}
		}
	}
	return entry{}, false
}

// Device returns the name of the host's end for a container's address: s- and three digits for each octet,
// "" for an address that is not IPv4.
func Device(a netip.Addr) string {
	if !a.Is4() {
		return ""
	}
	b := make([]byte, 0, 14)
	b = append(b, 's', '-')
	for _, o := range a.As4() {
		b = append(b, '0'+o/100, '0'+o/10%10, '0'+o%10)
	}
	return string(b)
}

// AddressOf is the inverse of Device; ok is false for a device that is not a container's.
func AddressOf(device string) (a netip.Addr, ok bool) {
	digits, ok := strings.CutPrefix(device, "s-")
	if !ok || len(digits) != 12 {
		return netip.Addr{}, false
	}
	var o [4]byte
	for i := range o {
		n := 0
		for _, c := range []byte(digits[3*i : 3*i+3]) {
			if c < '0' || c > '9' {
				return netip.Addr{}, false
			}
			n = 10*n + int(c-'0')
		}
		if n > 255 {
			return netip.Addr{}, false
		}
		o[i] = byte(n)
	}
	return netip.AddrFrom4(o), true
}

// macs returns the hardware addresses of the two ends: aa:aa and ee:ee followed by the container's address.
func macs(a netip.Addr) (host, container mac.Addr) {
	b := a.As4()
	return mac.Addr{0xaa, 0xaa, b[0], b[1], b[2], b[3]}, mac.Addr{0xee, 0xee, b[0], b[1], b[2], b[3]}
}
