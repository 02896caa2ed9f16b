package endpoint

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
)

// pool is the range of a subnet's addresses that containers may have: all but the first, which is the host's own
// VXLAN device, and the last, the broadcast address. There is no gateway among them: containers' next hop is Gateway.
// A subnet of one or two addresses has none.
type pool struct{ first, last uint32 }

func poolOf(subnet netip.Prefix) (pool, error) {
	if !subnet.IsValid() || !subnet.Addr().Is4() {
		return pool{}, fault.Invalidf("subnet %v: expected an IPv4 network such as 10.255.30.0/24", subnet)
	}
	base := number(subnet.Masked().Addr())
	size := uint64(1) << (32 - subnet.Bits())
	if size < 4 {
		return pool{}, fault.Exhaustedf("subnet %v has no address for a container: its first belongs to the host and its last is for broadcasts", subnet)
	}
	return pool{base + 1, base + uint32(size-2)}, nil
}

func (p pool) size() int { return int(p.last-p.first) + 1 }

func (p pool) contains(a netip.Addr) bool {
	return a.Is4() && p.first <= number(a) && number(a) <= p.last
}

// next returns the address to try after a, going round.
func (p pool) next(a netip.Addr) netip.Addr {
	if !p.contains(a) || number(a) == p.last {
		return address(p.first)
	}
	return address(number(a) + 1)
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func address(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// choice is what decides which address an endpoint gets.
type choice struct {
	subnet    netip.Prefix
	requested netip.Addr // zero: any
	last      netip.Addr // the one given out before, zero when that is not known
	taken     listing
}

// choose returns a free address: the requested one, or the first free one after the last that was given out, so that a
// freed address is used again as late as possible. routed says who has an address that no record has, "" for nobody.
func (c choice) choose(routed func(netip.Addr) (string, error)) (netip.Addr, error) {
	p, err := poolOf(c.subnet)
	if err != nil {
		return netip.Addr{}, err
	}
	if c.requested.IsValid() {
		return c.request(p, routed)
	}
	if !p.contains(c.last) {
		c.last = address(p.first) // the first address is given out last: earlier releases took it for a gateway's
	}
	var foreign []string
	a := c.last
	var held map[netip.Addr]bool // of all, once it is clear that many have to be passed over
	for i := range p.size() {
		if a = p.next(a); i == scans {
			held = c.held()
		}
		if i < scans {
			if _, ok := c.taken.holder(a); ok {
				continue
			}
		} else if held[a] {
			continue
		}
		by, err := routed(a)
		if err != nil {
			return netip.Addr{}, err
		}
		if by == "" {
			return a, nil
		}
		foreign = append(foreign, fmt.Sprintf("%v by %s", a, by))
	}
	return netip.Addr{}, c.full(p, foreign)
}

// scans is for how many addresses all names are looked through. The address after the last is nearly always free.
const scans = 4

// held returns the addresses that have a record.
func (c choice) held() map[netip.Addr]bool {
	held := make(map[netip.Addr]bool, len(c.taken))
	for _, e := range c.taken.entries() {
		for _, a := range e.addresses {
			held[a] = true
		}
	}
	return held
}

func (c choice) request(p pool, routed func(netip.Addr) (string, error)) (netip.Addr, error) {
	a := c.requested
	if !p.contains(a) {
		return netip.Addr{}, fault.Invalidf("requested address %v is not one of this host's for containers: expected %v to %v", a, address(p.first), address(p.last))
	}
	if e, ok := c.taken.holder(a); ok {
		return netip.Addr{}, fault.Conflictf("requested address %v is taken by %v", a, e.key)
	}
	by, err := routed(a)
	if err != nil {
		return netip.Addr{}, err
	}
	if by != "" {
		return netip.Addr{}, fault.Conflictf("requested address %v is taken by %s", a, by)
	}
	return a, nil
}

// shown is how many holders of addresses an error names one by one.
const shown = 16

// full words the error of a subnet without a free address.
func (c choice) full(p pool, foreign []string) error {
	var by []string
	networks := map[string]int{}
	for _, e := range c.taken.entries() {
		for _, a := range e.addresses {
			if p.contains(a) {
				networks[e.key.Network]++
				by = append(by, fmt.Sprintf("%v by %s/%s", a, e.key.Container, e.key.Interface))
			}
		}
	}
	slices.Sort(by)
	var sums []string
	for n, count := range networks {
		sums = append(sums, fmt.Sprintf("%d endpoints of network %s", count, n))
	}
	slices.Sort(sums)
	if len(foreign) > 0 {
		sums = append(sums, fmt.Sprintf("%d routed by the kernel without a record", len(foreign)))
	}
	by = append(foreign, by...)
	more := ""
	if len(by) > shown {
		more = fmt.Sprintf(" and %d more", len(by)-shown)
		by = by[:shown]
	}
	return fault.Exhaustedf("no free address in subnet %v: all %d are taken, %s: %s%s", c.subnet, p.size(), strings.Join(sums, ", "), strings.Join(by, ", "), more)
}

// Usage returns how many of a subnet's addresses for containers have a record, and how many there are. fault.Exhausted: the
// subnet has none; Invalid: it is not IPv4.
func (d *Dir) Usage(subnet netip.Prefix) (taken, size int, err error) {
	p, err := poolOf(subnet)
	if err != nil {
		return 0, 0, err
	}
	names, err := d.entries()
	if err != nil {
		return 0, 0, err
	}
	for _, e := range names {
		for _, a := range e.addresses {
			if p.contains(a) {
				taken++
			}
		}
	}
	return taken, p.size(), nil
}
