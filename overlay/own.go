package overlay

import (
	"fmt"
	"net/netip"
	"slices"
)

// What a container sends has a source that is routed back to it. To ask the routing table costs more than all else that the guard asks
// (docs/decisions/0021), so the usual packet is known by a set: the pairs of device and address that follow from the name that the
// contract gives to a container's device. A pair is in it whether there is such a container or not, so nobody has to keep it up. What is not
// in it is asked of the routing table.

// ownMost is how many addresses a local subnet may have for its pairs to be listed, so that they fit in one netlink attribute.
const ownMost = 1024

// pair is a key of the set: the name of a device, padded, and an address.
type pair [20]byte

// deviceOf returns the name that a container's device has by its address.
func deviceOf(a netip.Addr) string {
	b := a.As4()
	return fmt.Sprintf("%s%03d%03d%03d%03d", containerDevices, b[0], b[1], b[2], b[3])
}

// pairOf returns the key for an address.
func pairOf(a netip.Addr) pair {
	var k pair
	copy(k[:16], deviceOf(a))
	copy(k[16:], a.AsSlice())
	return k
}

// String returns the key as nft prints it.
func (k pair) String() string {
	a := netip.AddrFrom4([4]byte(k[16:]))
	return fmt.Sprintf("%q . %v", deviceOf(a), a)
}

// pairs returns the sorted keys for the addresses of a subnet other than its first, which is the VTEP's; none for one that is too large.
func pairs(subnet netip.Prefix) []pair {
	bits := 32 - subnet.Bits()
	if !subnet.Addr().Is4() || bits < 1 || 1<<bits > ownMost {
		return nil
	}
	var out []pair
	for a := subnet.Addr().Next(); subnet.Contains(a); a = a.Next() {
		out = append(out, pairOf(a))
	}
	return out
}

// samePairs reports whether got, which may list one twice, has the same keys as want, which is sorted.
func samePairs(got, want []pair) bool {
	slices.SortFunc(got, func(a, b pair) int { return slices.Compare(a[:], b[:]) })
	return slices.Equal(slices.Compact(got), want)
}
