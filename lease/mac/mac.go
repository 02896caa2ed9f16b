// Package mac has the one type of a hardware address. It is apart from the nouns that use it so that silk-cni, which
// knows hardware addresses and no leases, links nothing else of theirs.
package mac

import (
	"encoding/hex"

	"code.cloudfoundry.org/silk/fault"
)

// Addr is a 48-bit hardware address. Its text is six lower-case hexadecimal octets joined by colons.
type Addr [6]byte

// Parse reads aa:bb:cc:dd:ee:ff (either case, colons or hyphens). Other forms are fault.Invalid.
func Parse(s string) (Addr, error) {
	var m Addr
	if len(s) != 17 || s[2] != ':' && s[2] != '-' {
		return Addr{}, bad(s)
	}
	for i := range m {
		if i > 0 && s[3*i-1] != s[2] {
			return Addr{}, bad(s)
		}
		if _, err := hex.Decode(m[i:i+1], []byte(s[3*i:3*i+2])); err != nil {
			return Addr{}, bad(s)
		}
	}
	return m, nil
}

func bad(s string) error {
	return fault.Invalidf("hardware address %q: expected six octets such as ee:ee:0a:ff:1e:00", s)
}

// String returns the address in lower case with colons.
func (m Addr) String() string { return string(m.AppendTo(make([]byte, 0, 17))) }

// AppendTo appends String to b.
func (m Addr) AppendTo(b []byte) []byte {
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
func (m Addr) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is Parse.
func (m *Addr) UnmarshalText(b []byte) error {
	v, err := Parse(string(b))
	if err == nil {
		*m = v
	}
	return err
}
