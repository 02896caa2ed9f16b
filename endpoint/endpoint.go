// Package endpoint attaches containers to the host: one veth pair, one address and one record each.
//
// The record is the reservation of the address: one file per endpoint in a directory below /run, written
// atomically, so a reboot frees everything and there is no other address management. The kernel has the last
// word: an address that it already routes is taken, whoever made that route. The package is not a policy engine
// (firewall), makes no translations (nat) and speaks to no daemon: the caller says which subnet is this host's.
//
// Use: Open a directory, Attach and Detach containers, List the records, Check one against the kernel. Containers
// counts what the kernel has, with or without records.
package endpoint

import (
	"encoding/json"
	"net/netip"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease/mac"
)

// Gateway is the address of the host's end of every veth pair and every container's next hop. It is link-local and
// the same for all.
var Gateway = netip.AddrFrom4([4]byte{169, 254, 0, 1})

// Key names an attachment: which container is attached to which network by which of its interfaces. The texts are
// those of the CNI specification: Network and Container are [a-zA-Z0-9][a-zA-Z0-9_.-]*, Interface is a device name.
type Key struct {
	Network   string `json:"network"`
	Container string `json:"container"`
	Interface string `json:"interface"`
}

// String returns "container/interface on network".
func (k Key) String() string { return k.Container + "/" + k.Interface + " on " + k.Network }

// ValidID reports whether s is a container id or network name of the CNI specification.
func ValidID(s string) bool {
	for i, r := range []byte(s) {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
		case i > 0 && (r == '_' || r == '.' || r == '-'):
		default:
			return false
		}
	}
	return s != ""
}

// Record is what the host knows about one endpoint. Its address is taken for as long as the record exists.
type Record struct {
	Key
	Namespace kernel.NSID    `json:"namespace"`          // decides whether the container lives
	Path      string         `json:"netns"`              // of the namespace as the runtime named it; a hint only
	Addresses []netip.Prefix `json:"addresses"`          // the container's, at present one IPv4 /32
	Subnet    netip.Prefix   `json:"subnet"`             // the lease that the addresses came from
	Requested netip.Addr     `json:"requested,omitzero"` // what the runtime asked for, zero for any

	Group    string          `json:"policy_group"`
	Metadata json.RawMessage `json:"metadata,omitempty"` // as the runtime gave it, an object
	PortMaps []PortMap       `json:"port_maps,omitempty"`
	NetOut   json.RawMessage `json:"net_out,omitempty"` // Garden's list of rules as the runtime gave it; absent: it gave none, which is not an empty list
	Limits   *Limits         `json:"limits,omitempty"`

	Advertise *Advertisement `json:"advertise,omitempty"` // names that the host's silk-dns registers for it
	TLS       []TLSListener  `json:"tls,omitempty"`       // ports on which the host's silk-tls ends TLS for it

	Device       string   `json:"device"` // the host's end
	HostMAC      mac.Addr `json:"host_mac"`
	ContainerMAC mac.Addr `json:"container_mac"`
	MTU          int      `json:"mtu"` // bytes, of both ends when they were made
}

// PortMap is one port of the host that leads to the container.
type PortMap struct {
	HostIP        netip.Addr `json:"host_ip,omitzero"` // zero: every address of the host
	HostPort      uint16     `json:"host_port"`
	ContainerPort uint16     `json:"container_port"`
	Protocol      string     `json:"protocol"` // "tcp", "udp" or "sctp"
}

// Limits bounds the container's traffic. Rates are bits a second, bursts bits; 0 is no limit.
type Limits struct {
	IngressRate  uint64 `json:"ingress_rate,omitempty"`
	IngressBurst uint64 `json:"ingress_burst,omitempty"`
	EgressRate   uint64 `json:"egress_rate,omitempty"`
	EgressBurst  uint64 `json:"egress_burst,omitempty"`
}

// Address returns the first address of the container, the zero Addr when there is none.
func (r Record) Address() netip.Addr {
	if len(r.Addresses) == 0 {
		return netip.Addr{}
	}
	return r.Addresses[0].Addr()
}

// Advertisement is by which names a container wants to be found.
type Advertisement struct {
	Names []string `json:"names"`           // domain names, each in full
	Port  uint16   `json:"port,omitempty"`  // where it listens, for SRV answers; 0: not said
	Index *int     `json:"index,omitempty"` // of the instance, for "<index>.<name>"; nil: none
}

// TLSListener is a port of a container at which TLS ends: connections to Listen reach Forward in clear.
type TLSListener struct {
	Listen     uint16   `json:"listen"`
	Forward    uint16   `json:"forward"`
	ALPN       []string `json:"alpn,omitempty"`        // protocols offered, best first; none: no negotiation
	ClientAuth bool     `json:"client_auth,omitempty"` // clients must prove who they are
}
