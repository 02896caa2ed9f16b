package overlay

import (
	"encoding/binary"
	"net/netip"
)

// contains reports whether all of p lies in network.
func contains(network, p netip.Prefix) bool {
	return p.IsValid() && network.Bits() <= p.Bits() && network.Contains(p.Addr())
}

// unicast reports whether a can be the address of one host that packets are sent to.
func unicast(a netip.Addr) bool { return a.IsGlobalUnicast() || a.IsLinkLocalUnicast() }

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// last returns the highest address of p.
func last(p netip.Prefix) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], number(p.Addr())|uint32(uint64(1)<<(32-p.Bits())-1))
	return netip.AddrFrom4(b)
}
