package kernel

import (
	"errors"
	"fmt"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

// loopback is the number of every namespace's loopback interface (LOOPBACK_IFINDEX in net/net_namespace.h).
const loopback = 1

// HoldLocal makes addr an address of ns, nil for the calling thread's namespace, without giving it to a device: a route of type local on
// the loopback interface, with a protocol number that says whose it is. The namespace then takes what comes for addr from whichever
// device, and programs can listen on it. It is there until DropLocal, and gone when somebody takes the loopback interface down. An address that
// is local already is left as it is; one that is routed otherwise by the local table is fault.Conflict, none at all fault.Invalid. For link-local addresses
// it is as:
//
//	ip route add local 169.254.0.2 dev lo table local proto PROTOCOL
func HoldLocal(ns *NS, addr netip.Addr, protocol uint8) error {
	if addr = addr.Unmap(); !addr.IsValid() || addr.IsUnspecified() {
		return fault.Invalidf("make %v an address of the host: expected a single address", addr)
	}
	c, err := Dial(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b Batch
	b.local(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, addr, protocol)
	refused, err := c.Do(&b)
	if err == nil && len(refused) > 0 {
		if err = refused[0]; errors.Is(err, unix.EEXIST) {
			err = c.isLocal(addr)
		}
	}
	if err != nil {
		return fmt.Errorf("make %v an address of the host: %w", addr, err)
	}
	return nil
}

// DropLocal takes back what HoldLocal did. A route of another protocol number stays, and one that is not there is no error.
func DropLocal(ns *NS, addr netip.Addr, protocol uint8) error {
	if addr = addr.Unmap(); !addr.IsValid() {
		return fault.Invalidf("take an address from the host: expected one")
	}
	c, err := Dial(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b Batch
	b.local(unix.RTM_DELROUTE, 0, addr, protocol)
	refused, err := c.Do(&b)
	if err == nil && len(refused) > 0 && !errors.Is(refused[0], unix.ESRCH) {
		err = refused[0]
	}
	if err != nil {
		return fmt.Errorf("take the address %v from the host: %w", addr, err)
	}
	return nil
}

// local appends a request about the route.
func (b *Batch) local(typ uint16, flags int, addr netip.Addr, protocol uint8) {
	family := byte(unix.AF_INET)
	if !addr.Is4() {
		family = unix.AF_INET6
	}
	b.Add(typ, flags, []byte{family, byte(addr.BitLen()), 0, 0, unix.RT_TABLE_LOCAL, protocol, unix.RT_SCOPE_HOST, unix.RTN_LOCAL, 0, 0, 0, 0})
	b.Attr(unix.RTA_DST, addr.AsSlice())
	b.Uint32(unix.RTA_OIF, loopback)
}

// isLocal reports an error unless the namespace takes what comes for addr.
func (c *Conn) isLocal(addr netip.Addr) error {
	family := byte(unix.AF_INET)
	if !addr.Is4() {
		family = unix.AF_INET6
	}
	var b Batch
	b.Add(unix.RTM_GETROUTE, 0, []byte{family, byte(addr.BitLen()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	b.Attr(unix.RTA_DST, addr.AsSlice())
	answers, err := c.Query(&b)
	if err != nil {
		return err
	}
	if a := answers[0]; a.Err != nil || len(a.Body) < unix.SizeofRtMsg || a.Body[7] != unix.RTN_LOCAL {
		return fault.Conflictf("the local table routes it otherwise: remove that route (ip route show table local)")
	}
	return nil
}

// LocalAddrs returns the addresses that routes of a protocol number make local to ns, nil for the calling thread's namespace, in no order.
func LocalAddrs(ns *NS, protocol uint8) ([]netip.Addr, error) {
	c, err := Dial(ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var list []netip.Addr
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		var b Batch
		b.Add(unix.RTM_GETROUTE, 0, []byte{family, 0, 0, 0, unix.RT_TABLE_LOCAL, 0, 0, 0, 0, 0, 0, 0})
		before := len(list)
		err := c.Dump(&b, func() { list = list[:before] }, func(m Message) error {
			if a, ok := parseLocal(m.Body, protocol); ok && m.Body[0] == family {
				list = append(list, a)
			}
			return nil
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // a namespace that never had an address has no such table
			return nil, fmt.Errorf("list local addresses: %w", err)
		}
	}
	return list, nil
}

// parseLocal reads a dumped route; ok is false for one that is not of the protocol or does not make a single address local.
func parseLocal(b []byte, protocol uint8) (a netip.Addr, ok bool) {
	if len(b) < unix.SizeofRtMsg || b[4] != unix.RT_TABLE_LOCAL || b[5] != protocol || b[7] != unix.RTN_LOCAL {
		return netip.Addr{}, false
	}
	for t, v := range Attrs(b[unix.SizeofRtMsg:]) {
		if t == unix.RTA_DST {
			a, _ = netip.AddrFromSlice(v)
		}
	}
	return a, a.IsValid() && int(b[1]) == a.BitLen()
}
