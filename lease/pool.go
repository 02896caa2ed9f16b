package lease

import (
	"encoding/binary"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// Pool is the set of subnets that leases are cut from: every block of Bits() length in the network except the
// first, which is given out as single addresses instead. It is arithmetic only and takes no memory per member.
type Pool struct {
	network netip.Prefix
	bits    int
}

// NewPool returns the pool of network cut into blocks of the given prefix length. The network must be IPv4 and masked
// and the length longer than the network's and at most 30; anything else is fault.Invalid.
func NewPool(network netip.Prefix, bits int) (Pool, error) {
	switch {
	case !network.IsValid() || !network.Addr().Is4() || network != network.Masked():
		return Pool{}, fault.Invalidf("network %q: expected an IPv4 network such as 10.255.0.0/16", prefixText(network))
	case bits <= network.Bits() || bits > 30:
		return Pool{}, fault.Invalidf("subnet prefix length %d: expected a length between %d and 30 for network %v", bits, network.Bits()+1, network)
	}
	return Pool{network, bits}, nil
}

// Network returns the whole range.
func (p Pool) Network() netip.Prefix { return p.network }

// Bits returns the prefix length of a block.
func (p Pool) Bits() int { return p.bits }

// Size returns how many leases of a kind the pool holds: 2^(bits-network) - 1 blocks, 2^(32-bits) - 1 single addresses.
func (p Pool) Size(k Kind) uint64 {
	if k == Single {
		return 1<<(32-p.bits) - 1
	}
	return 1<<(p.bits-p.network.Bits()) - 1
}

// At returns member i of a kind, 0 <= i < Size(k).
func (p Pool) At(k Kind, i uint64) netip.Prefix {
	base := number(p.network.Addr())
	if k == Single {
		return netip.PrefixFrom(addr(base+uint32(i)+1), 32)
	}
	return netip.PrefixFrom(addr(base+uint32(i+1)<<(32-p.bits)), p.bits)
}

// Index is the inverse of At: the kind and number of a member, and whether subnet is one.
func (p Pool) Index(subnet netip.Prefix) (Kind, uint64, bool) {
	if !subnet.IsValid() || subnet != subnet.Masked() || !p.network.Contains(subnet.Addr()) {
		return 0, 0, false
	}
	off := number(subnet.Addr()) - number(p.network.Addr())
	block := uint64(off) >> (32 - p.bits)
	switch {
	case subnet.Bits() == 32 && block == 0 && off > 0:
		return Single, uint64(off) - 1, true
	case subnet.Bits() == p.bits && block > 0:
		return Block, block - 1, true
	}
	return 0, 0, false
}

// Contains reports whether subnet is a member.
func (p Pool) Contains(subnet netip.Prefix) bool {
	_, _, ok := p.Index(subnet)
	return ok
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func addr(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}
