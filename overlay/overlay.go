// Package overlay makes the kernel hold the VTEP and the paths to peers: the VXLAN device, its address, one route, one
// neighbour and one forwarding entry for every peer, and the rules in nft table "inet silk" that guard the VXLAN port.
//
// It is not who decides which peers there are (lease, daemon), not containers (endpoint), not address translation (nat)
// and not policy (firewall).
//
// Use: Open a Fabric in a namespace, call Set with the whole desired state whenever it may differ from what is, and let
// Watch say when somebody else changed something. Set compares with the kernel, so it can be called any number of times
// and be killed between any two requests; the next call repairs what is left.
package overlay

import (
	"net/netip"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

// Protocol is the protocol number of the routes that Silk makes (rtnetlink(7), rtm_protocol).
const Protocol = 83

// Overhead is how many bytes VXLAN over IPv4 takes from the MTU of the lower device.
const Overhead = 50

// Table is the nft table, of family inet, that Silk's connectivity rules share. This package owns the chains and the
// set in it whose names begin with "overlay-".
const Table = "silk"

// Config is the whole desired state of one host's overlay. It is a plain value: two that say the same are equal in
// go-cmp once Peers is sorted by lease.Sort.
type Config struct {
	Device   string        // the VTEP, "silk-vtep"
	VNI      uint32        // 1 to 2^24-1
	Port     uint16        // UDP
	Underlay netip.Addr    // this host's address outside the overlay
	Lower    string        // the device that VXLAN packets leave by; "" means the one that owns Underlay
	Network  netip.Prefix  // the whole overlay
	Local    lease.Lease   // this host's lease, also while it is fenced
	Peers    []lease.Lease // active leases in lease.Sort order; the local one among them is passed over
	Fenced   bool          // the lease is lost: no paths, no VTEP address, nothing accepted; the guard rules stay
}

// Validate reports, as fault.Invalid, a configuration that can describe no host. It does not judge peers: a bad peer is
// skipped by Set and reported.
func (c Config) Validate() error {
	switch {
	case c.Device == "" || len(c.Device) > 15 || strings.ContainsAny(c.Device, "/ \"*") || strings.Trim(c.Device, ".") == "":
		return fault.Invalidf("device %q: expected an interface name of 1 to 15 bytes such as silk-vtep", c.Device)
	case strings.HasPrefix(c.Device, containerDevices):
		return fault.Invalidf("device %q: names that begin with %q are those of container devices", c.Device, containerDevices)
	case c.VNI == 0 || c.VNI >= 1<<24:
		return fault.Invalidf("vni %d: expected 1 to 16777215", c.VNI)
	case c.Port == 0:
		return fault.Invalidf("vtep port 0: expected a UDP port such as 4789")
	case !c.Underlay.Is4() || !unicast(c.Underlay):
		return fault.Invalidf("underlay address %v: expected an IPv4 unicast address", c.Underlay)
	case !c.Network.IsValid() || !c.Network.Addr().Is4() || c.Network != c.Network.Masked():
		return fault.Invalidf("overlay network %v: expected an IPv4 network such as 10.255.0.0/16", c.Network)
	case c.Network.Contains(c.Underlay):
		return fault.Invalidf("underlay address %v lies inside the overlay network %v: choose another overlay network", c.Underlay, c.Network)
	case !contains(c.Network, c.Local.Subnet) || c.Local.Subnet.Bits() == c.Network.Bits():
		return fault.Invalidf("local subnet %v: expected a part of the overlay network %v", c.Local.Subnet, c.Network)
	case c.Local.Underlay != c.Underlay:
		return fault.Invalidf("local lease is for underlay address %v, this host's is %v", c.Local.Underlay, c.Underlay)
	}
	return c.Local.Validate()
}

// Metric returns the metric of the route to subnet: 1 + the distance of its base from the base of the overlay. Routes
// with metrics of their own do not share a hash chain in the kernel, and a metric that follows from the subnet is the
// same after a restart and in every version.
func Metric(network, subnet netip.Prefix) uint32 {
	return 1 + number(subnet.Addr()) - number(network.Addr())
}

// Report says what one Set found and did.
type Report struct {
	Full        bool // the kernel was observed whole; otherwise only the difference to the last Set was needed
	Desired     int  // objects that should be: routes, neighbours, forwarding entries, set elements
	Observed    int  // objects of ours that were there (as Desired counts); those of the last Set when not Full
	Changed     int  // requests that the kernel carried out
	Failed      int  // requests that the kernel refused
	Foreign     int  // objects on our device that are not ours and were left alone; 0 when not Full
	NonRoutable int  // peers outside the overlay network; they are among Skipped
	Skipped     []Skipped
	Device      Device
}

// Device is what the VTEP turned out to be.
type Device struct {
	Index int    // 0: there is none
	MTU   int    // bytes
	Lower string // name of the lower device
}

// Skipped is a peer that no path was made for.
type Skipped struct {
	Lease  lease.Lease
	Reason string
}
