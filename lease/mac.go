package lease

import (
	"encoding/hex"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// MAC is a 48-bit hardware address. Its text is six lower-case hexadecimal octets joined by colons.
type MAC [6]byte

// MACOf returns the VTEP address of the host that holds subnet: ee:ee followed by the four bytes of the
// subnet's first address, so that a lease and its MAC can never disagree.
func MACOf(subnet netip.Prefix) MAC {
	if !subnet.Addr().Is4() {
		return MAC{}
	}
	a := subnet.Addr().As4()
	return MAC{0xee, 0xee, a[0], a[1], a[2], a[3]}
}

// ParseMAC reads aa:bb:cc:dd:ee:ff (either case, colons or hyphens). Other forms are fault.Invalid.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	bad := fault.Invalidf("hardware address %q: expected six octets such as ee:ee:0a:ff:1e:00", s)
	if len(s) != 17 || s[2] != ':' && s[2] != '-' {
		return MAC{}, bad
	}
	for i := range m {
		if i > 0 && s[3*i-1] != s[2] {
			return MAC{}, bad
		}
		if _, err := hex.Decode(m[i:i+1], []byte(s[3*i:3*i+2])); err != nil {
			return MAC{}, bad
		}
	}
	return m, nil
}

// String returns the address in lower case with colons.
func (m MAC) String() string { return string(m.appendTo(make([]byte, 0, 17))) }

func (m MAC) appendTo(b []byte) []byte {
	const digits = "0123456789abcdef"
	for i, o := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, digits[o>>4], digits[o&15])
	}
	return b
}

// MarshalText returns String.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is ParseMAC.
func (m *MAC) UnmarshalText(b []byte) error {
	v, err := ParseMAC(string(b))
	if err == nil {
		*m = v
	}
	return err
}
