package registration

import (
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// Ranges are the networks whose addresses may have names. Registrations carry no proof of their own, so nobody may give a name to an
// address outside, and lead those who ask for it there. No ranges accept nothing.
type Ranges []netip.Prefix

// Accept returns nil for an address in the ranges, fault.Denied for others. An address that means the one who uses it, or many, is never
// accepted.
func (r Ranges) Accept(a netip.Addr) error {
	if r.Contains(a) {
		return nil
	}
	return fault.Deniedf("address %v is outside of the ranges %v in which containers have names", a, []netip.Prefix(r))
}

// Contains is Accept for those who need no reason.
func (r Ranges) Contains(a netip.Addr) bool {
	a = a.Unmap()
	if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == broadcast {
		return false
	}
	for _, p := range r {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
