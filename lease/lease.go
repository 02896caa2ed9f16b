// Package lease is the noun of the control plane: the right of one host to one overlay subnet.
//
// It holds the types, the pool that leases are cut from and the decisions about them, all pure. It is
// not a store (lease/leasesql), not an API (lease/leasehttp) and touches no kernel (overlay).
//
// Use: a Registry gives and keeps leases; a Pool says which subnets exist; a Peers decides what a list
// of leases, or the lack of one, means for the paths a host keeps.
package lease

import (
	"context"
	"fmt"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// Lease is the right of one host to one overlay subnet. The subnet is a block (a prefix of the pool's
// length) or a single address (/32). It is comparable; a zero Lease is no lease.
type Lease struct {
	Underlay netip.Addr   // the host's address outside the overlay
	Subnet   netip.Prefix // masked
	MAC      MAC          // of the host's VTEP, a function of Subnet (MACOf)
}

// Kind is what a host asks for: a block of addresses or one address.
type Kind uint8

// The kinds of lease.
const (
	Block Kind = iota
	Single
)

// String returns "block" or "single".
func (k Kind) String() string {
	if k == Single {
		return "single"
	}
	return "block"
}

// Kind returns Single for a subnet of one address, Block for others.
func (l Lease) Kind() Kind {
	if l.Subnet.IsSingleIP() {
		return Single
	}
	return Block
}

// Base returns the first address of the subnet, which is the VTEP's address and the next hop of its route.
func (l Lease) Base() netip.Addr { return l.Subnet.Addr() }

// String returns "underlay subnet mac".
func (l Lease) String() string { return string(l.appendTo(nil)) }

// appendTo appends String to b. Lists of thousands are digested for every change.
func (l Lease) appendTo(b []byte) []byte {
	if !l.Underlay.IsValid() || !l.Subnet.IsValid() {
		return fmt.Appendf(b, "%v %v %v", l.Underlay, l.Subnet, l.MAC)
	}
	b = append(l.Underlay.AppendTo(b), ' ')
	b = append(l.Subnet.AppendTo(b), ' ')
	return l.MAC.AppendTo(b)
}

// Validate reports, as fault.Invalid, a lease that no pool could have given: an address that is missing, an
// unmasked subnet, or a MAC that is not the subnet's.
func (l Lease) Validate() error {
	switch {
	case !usable(l.Underlay):
		return fault.Invalidf("underlay address %q is not usable: expected an IPv4 address such as 10.0.16.5", addrText(l.Underlay))
	case !l.Subnet.IsValid() || l.Subnet != l.Subnet.Masked():
		return fault.Invalidf("overlay subnet %q is not usable: expected a network such as 10.255.30.0/24", prefixText(l.Subnet))
	case l.MAC != MACOf(l.Subnet):
		return fault.Invalidf("hardware address %v does not belong to subnet %v: expected %v", l.MAC, l.Subnet, MACOf(l.Subnet))
	}
	return nil
}

// usable reports whether a host can have the address.
func usable(host netip.Addr) bool {
	return host.IsValid() && !host.Is4In6() && !host.IsUnspecified() && !host.IsMulticast() && host != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// Registry gives leases and keeps them. Its implementations are leasesql.Store (a database) and
// leasehttp.Client (a controller); leasetest.Run is what both pass. All methods are safe for concurrent use
// and return when ctx ends.
type Registry interface {
	// Acquire returns the lease the host has, whatever its kind, or gives it a new one of the kind asked for.
	// Exhausted when there is none to give.
	Acquire(ctx context.Context, underlay netip.Addr, kind Kind) (Lease, error)

	// Renew keeps a lease for another expiration period. A lease nobody knows is created if it is a member of
	// the pool and free. Conflict means that the lease is lost for good: another host holds it or part of it,
	// this host holds a different one, or it could never have been given. Every other error is worth a retry.
	Renew(ctx context.Context, l Lease) error

	// Release gives the host's lease back. A host without one is no error.
	Release(ctx context.Context, underlay netip.Addr) error

	// Leases returns all leases that have not expired.
	Leases(ctx context.Context) ([]Lease, error)

	// Watch waits until the leases differ from those at since, then returns what changed, or all of them when
	// since is zero, of another epoch or too old. After a wait that the implementation bounds it returns an
	// Update without changes at the same revision.
	Watch(ctx context.Context, since Revision) (Update, error)
}
