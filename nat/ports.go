package nat

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
)

// A port map is one element of a map of the kernel, so that neither their number nor their coming and going costs a packet anything. Only the
// first packet of a connection is asked about at all: that is how the kernel uses chains of type nat.
//
//	nat-prerouting  what arrives for an address of this host, other than those of the overlay: look into the maps
//	nat-output      the same for what the host itself sends, also to 127.0.0.0/8
//	nat-hairpin     what would have no way back gets the address of the host's end of the veth pair as its source: the host's loopback,
//	                and a container that reaches itself. All others keep theirs
//	nat-loopback    a container whose port map leads from 127.0.0.1 has route_localnet on its device, without which the answers would not
//	                be taken. With it, the container could speak to what listens on the host's loopback alone; this chain forbids that

// PortMap is one port of the host that leads to a container.
type PortMap struct {
	Host     netip.AddrPort // a zero address stands for all of the host's
	Protocol uint8          // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	To       netip.AddrPort // IPv4
}

// The protocols that have ports (IPPROTO_*).
const (
	TCP  = 6
	UDP  = 17
	SCTP = 132
)

var protocols = map[string]uint8{"tcp": TCP, "udp": UDP, "sctp": SCTP}

// Protocol returns the number of a protocol that has ports; ok is false for any other.
func Protocol(name string) (number uint8, ok bool) {
	number, ok = protocols[name]
	return number, ok
}

// ProtocolName returns "tcp", "udp" or "sctp", and the number of any other protocol.
func ProtocolName(number uint8) string {
	for name, n := range protocols {
		if n == number {
			return name
		}
	}
	return fmt.Sprint(number)
}

// String returns "tcp 10.0.16.15:8080 to 10.255.30.2:80".
func (m PortMap) String() string {
	host := "*"
	if m.Host.Addr().IsValid() {
		host = m.Host.Addr().String()
	}
	return fmt.Sprintf("%s %s:%d to %v", ProtocolName(m.Protocol), host, m.Host.Port(), m.To)
}

func (m PortMap) valid() bool {
	named := m.Protocol == TCP || m.Protocol == UDP || m.Protocol == SCTP
	return named && m.Host.Port() != 0 && m.To.Port() != 0 && m.To.Addr().Is4() && (!m.Host.Addr().IsValid() || m.Host.Addr().Is4())
}

const (
	mapPorts   = "nat-ports"    // (protocol, port) -> (address, port)
	mapPortsAt = "nat-ports-at" // (address, protocol, port) -> (address, port)
	setSelf    = "nat-self"     // (address, address): those that have a port map, twice
)

// element is an entry of one of the three.
type element struct {
	set       string
	key, data string // as the kernel has them
}

// String returns the element as nft prints it.
func (e element) String() string {
	if m, ok := e.portMap(); ok {
		at := ""
		if m.Host.Addr().IsValid() {
			at = m.Host.Addr().String() + " . "
		}
		return fmt.Sprintf("element inet %s %s { %s%s . %d : %v . %d }", Table, e.set, at, ProtocolName(m.Protocol), m.Host.Port(), m.To.Addr(), m.To.Port())
	}
	if a, ok := netip.AddrFromSlice([]byte(e.key[:min(4, len(e.key))])); ok {
		return fmt.Sprintf("element inet %s %s { %v . %v }", Table, e.set, a, a)
	}
	return fmt.Sprintf("element inet %s %s { %x }", Table, e.set, e.key)
}

// elements returns what the kernel has to have for the port maps, each once.
func elements(maps []PortMap) []element {
	var out []element
	for _, m := range maps {
		e := element{set: mapPorts, data: string(words(m.To.Addr().AsSlice(), be16(m.To.Port())))}
		key := [][]byte{{m.Protocol}, be16(m.Host.Port())}
		if m.Host.Addr().IsValid() {
			e.set = mapPortsAt
			key = append([][]byte{m.Host.Addr().AsSlice()}, key...)
		}
		e.key = string(words(key...))
		out = append(out, e, selfOf(m.To.Addr()))
	}
	return sorted(out)
}

func selfOf(a netip.Addr) element {
	return element{set: setSelf, key: string(words(a.AsSlice(), a.AsSlice()))}
}

func sorted(list []element) []element {
	slices.SortFunc(list, element.compare)
	return slices.Compact(list)
}

func (e element) compare(o element) int {
	return cmp.Or(cmp.Compare(e.set, o.set), cmp.Compare(e.key, o.key), cmp.Compare(e.data, o.data))
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// words puts the fields of a concatenation together, each padded to 32 bits.
func words(fields ...[]byte) []byte {
	var out []byte
	for _, f := range fields {
		out = append(out, f...)
		for len(out)%4 != 0 {
			out = append(out, 0)
		}
	}
	return out
}

// target returns where an element leads, or whose it is.
func (e element) target() netip.Addr {
	from := e.data
	if e.set == setSelf {
		from = e.key
	}
	a, _ := netip.AddrFromSlice([]byte(from[:min(4, len(from))]))
	return a
}

// portMap is the inverse of elements; ok is false for what is no port map that this package makes.
func (e element) portMap() (m PortMap, ok bool) {
	key := []byte(e.key)
	var host netip.Addr
	if e.set == mapPortsAt && len(key) == 12 {
		host, key = netip.AddrFrom4([4]byte(key[:4])), key[4:]
	}
	if e.set == setSelf || len(key) != 8 || len(e.data) != 8 {
		return PortMap{}, false
	}
	data := []byte(e.data)
	m = PortMap{netip.AddrPortFrom(host, binary.BigEndian.Uint16(key[4:])), key[0],
		netip.AddrPortFrom(netip.AddrFrom4([4]byte(data[:4])), binary.BigEndian.Uint16(data[4:]))}
	return m, m.valid() && slices.Contains(elements([]PortMap{m}), e)
}
