package flow

import (
	"encoding/binary"
	"net/netip"
	"strconv"
)

// The protocols that packets are read of (IANA).
const (
	protoICMP, protoTCP, protoUDP, protoICMPv6, protoDCCP, protoSCTP, protoUDPLite = 1, 6, 17, 58, 33, 132, 136
)

// Packet names a connection by its first packet. Of ICMP, which has no ports, that of Source is the identifier and that of Destination says
// type and code: 256 times the type, plus the code. Ports that are not known are 0.
type Packet struct {
	Protocol            uint8 // IANA number
	Source, Destination netip.AddrPort
}

// ICMP returns type and code of a packet of ICMP, 0 of any other.
func (p Packet) ICMP() (typ, code uint8) {
	if !p.isICMP() {
		return 0, 0
	}
	return uint8(p.Destination.Port() >> 8), uint8(p.Destination.Port())
}

func (p Packet) isICMP() bool { return p.Protocol == protoICMP || p.Protocol == protoICMPv6 }

// ports returns those of both ends as people know them: none of ICMP.
func (p Packet) ports() (source, destination uint16) {
	if p.isICMP() {
		return 0, 0
	}
	return p.Source.Port(), p.Destination.Port()
}

// ProtocolName returns "tcp", "udp", "icmp", or the number of another.
func ProtocolName(proto uint8) string {
	switch proto {
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	case protoICMP:
		return "icmp"
	case protoICMPv6:
		return "icmpv6"
	case protoSCTP:
		return "sctp"
	}
	return strconv.Itoa(int(proto))
}

// ParsePacket reads the beginning of a packet, from its network header on. It is written by whoever is in a container: it is not ok without a whole
// header of IPv4 or IPv6; anything else that is missing or makes no sense is as if it were not there.
func ParsePacket(b []byte) (Packet, bool) {
	if len(b) == 0 {
		return Packet{}, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return Packet{}, false
}

func parseIPv4(b []byte) (Packet, bool) {
	header := int(b[0]&0xf) * 4
	if header < 20 || len(b) < header {
		return Packet{}, false
	}
	source, destination := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	rest := b[header:]
	if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 { // a later fragment: what follows is no header
		rest = nil
	}
	return transport(b[9], source, destination, rest), true
}

func parseIPv6(b []byte) (Packet, bool) {
	if len(b) < 40 {
		return Packet{}, false
	}
	source, destination := netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	// What stands behind other headers is not looked for: so far none of it is let through.
	return transport(b[6], source, destination, b[40:]), true
}

// transport reads what tells a connection of others between the same ends.
func transport(proto uint8, source, destination netip.Addr, b []byte) Packet {
	var from, to uint16
	switch proto {
	case protoTCP, protoUDP, protoDCCP, protoSCTP, protoUDPLite:
		if len(b) >= 4 {
			from, to = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
	case protoICMP, protoICMPv6:
		if len(b) >= 4 {
			to = binary.BigEndian.Uint16(b)
		}
		if len(b) >= 6 {
			from = binary.BigEndian.Uint16(b[4:])
		}
	}
	return Packet{proto, netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)}
}

// key is a Packet without pointers, of which there may be hundreds of thousands.
type key struct {
	source, destination [16]byte
	from, to            uint16
	proto               uint8
}

func (p Packet) key() key {
	return key{p.Source.Addr().As16(), p.Destination.Addr().As16(), p.Source.Port(), p.Destination.Port(), p.Protocol}
}
