package lease

import (
	"net/netip"

	"code.cloudfoundry.org/silk/lease/mac"
)

// MAC is a 48-bit hardware address. Its text is six lower-case hexadecimal octets joined by colons.
type MAC = mac.Addr

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
func ParseMAC(s string) (MAC, error) { return mac.Parse(s) }
