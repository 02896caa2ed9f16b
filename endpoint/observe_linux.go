package endpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease/mac"
	"golang.org/x/sys/unix"
)

// rtmFIBMatch asks a route query for the entry that matched instead of the result of the lookup (linux/rtnetlink.h).
const rtmFIBMatch = 0x2000

// askLink appends the question for a device by its name.
func askLink(b *kernel.Batch, name string) {
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, name)
}

// exists reports whether the connection's namespace has a device of that name.
func exists(c *kernel.Conn, name string) (bool, error) {
	var b kernel.Batch
	askLink(&b, name)
	a, err := c.Query(&b)
	if err != nil {
		return false, err
	}
	if a[0].Err == nil {
		return true, nil
	}
	if errors.Is(a[0].Err, unix.ENODEV) {
		return false, nil
	}
	return false, fmt.Errorf("look for device %s: %w", name, a[0].Err)
}

// askRoute is the header of a question for the entry of the routing table that an address matches. The kernel wants all else in
// it to be zero.
var askRoute = binary.NativeEndian.AppendUint32([]byte{unix.AF_INET, 32, 0, 0, 0, 0, 0, 0}, rtmFIBMatch)

// holder says who has an address, and which device numbers an endpoint with it may have.
type holder struct {
	by string // "" when nobody has it
	ix indexes
}

// routed asks the kernel who has the address a in the host's namespace. It is asked for one address at a time, so the
// number of containers does not matter.
func routed(c *kernel.Conn, a netip.Addr) (holder, error) {
	h := holder{ix: indexesOf(a)}
	var b kernel.Batch
	askLink(&b, Device(a))
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(h.ix.host, 0, 0))
	b.Add(unix.RTM_GETROUTE, 0, askRoute)
	b.Attr(unix.RTA_DST, a.AsSlice())
	answers, err := c.Query(&b)
	if err != nil {
		return h, fmt.Errorf("ask the kernel about %v: %w", a, err)
	}
	link, number, route := answers[0], answers[1], answers[2]
	if link.Err == nil {
		h.by = "device " + Device(a)
		return h, nil
	}
	if link.Err.Errno != unix.ENODEV {
		return h, fmt.Errorf("look for device %s: %w", Device(a), link.Err)
	}
	if number.Err == nil || number.Err.Errno != unix.ENODEV {
		h.ix = others()
	}
	if route.Err != nil {
		switch route.Err.Errno {
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EINVAL, unix.EACCES: // no route, or one that refuses (blackhole is EINVAL)
			return h, nil
		}
		return h, fmt.Errorf("look for a route to %v: %w", a, route.Err)
	}
	h.by = routeHolder(c, route.Body)
	return h, nil
}

// routeHolder returns who has the one address that a route leads to, "" when it leads to a network.
func routeHolder(c *kernel.Conn, body []byte) string {
	if len(body) < unix.SizeofRtMsg || body[1] != 32 || body[7] != unix.RTN_UNICAST && body[7] != unix.RTN_LOCAL {
		return ""
	}
	for t, v := range kernel.Attrs(body[unix.SizeofRtMsg:]) {
		if t == unix.RTA_OIF {
			return "a route to it by device " + deviceName(c, kernel.Uint32(v))
		}
	}
	return "a route to it"
}

// deviceName returns the name of a device, its number when it has none any more.
func deviceName(c *kernel.Conn, index uint32) string {
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(int(index), 0, 0))
	if a, err := c.Query(&b); err == nil && a[0].Err == nil && len(a[0].Body) >= unix.SizeofIfInfomsg {
		for t, v := range kernel.Attrs(a[0].Body[unix.SizeofIfInfomsg:]) {
			if t == unix.IFLA_IFNAME {
				return kernel.Text(v)
			}
		}
	}
	return fmt.Sprint(index)
}

// others returns device numbers that nothing is likely to have.
func others() indexes { return indexes{1<<28 + rand.IntN(1<<28), 1<<28 + rand.IntN(1<<28)} }

// device is what the kernel says of one link; index 0 stands for none.
type device struct {
	index int
	name  string
	kind  string
	flags uint32
	mac   mac.Addr
	mtu   int

	elsewhere int // number of the namespace that its other end is in; -1 when it is in the same or there is none
}

// parseDevice reads the body of an RTM_NEWLINK message.
func parseDevice(body []byte) device {
	if len(body) < unix.SizeofIfInfomsg {
		return device{}
	}
	d := device{index: int(kernel.Uint32(body[4:])), flags: kernel.Uint32(body[8:]), elsewhere: -1}
	for t, v := range kernel.Attrs(body[unix.SizeofIfInfomsg:]) {
		switch t {
		case unix.IFLA_IFNAME:
			d.name = kernel.Text(v)
		case unix.IFLA_ADDRESS:
			copy(d.mac[:], v)
		case unix.IFLA_MTU:
			d.mtu = int(kernel.Uint32(v))
		case unix.IFLA_LINK_NETNSID:
			if len(v) >= 4 {
				d.elsewhere = int(int32(kernel.Uint32(v)))
			}
		case unix.IFLA_LINKINFO:
			for t, v := range kernel.Attrs(v) {
				if t == unix.IFLA_INFO_KIND {
					d.kind = kernel.Text(v)
				}
			}
		}
	}
	return d
}

// observeLink returns a device by its name, a zero one when there is none.
func observeLink(c *kernel.Conn, name string) (device, error) {
	var b kernel.Batch
	askLink(&b, name)
	a, err := c.Query(&b)
	if err != nil {
		return device{}, err
	}
	if a[0].Err != nil {
		if errors.Is(a[0].Err, unix.ENODEV) {
			return device{}, nil
		}
		return device{}, fmt.Errorf("look for device %s: %w", name, a[0].Err)
	}
	return parseDevice(a[0].Body), nil
}

// address4 is an address of a device and the one at its other end.
type address4 struct{ local, peer netip.Addr }

// observeAddrs returns the IPv4 addresses of a device.
func observeAddrs(c *kernel.Conn, index int) ([]address4, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETADDR, 0, kernel.IfAddr(index, 0, 0))
	var list []address4
	err := c.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		if len(m.Body) < unix.SizeofIfAddrmsg || int(kernel.Uint32(m.Body[4:])) != index {
			return nil // a kernel without filters (before 4.20) sends all
		}
		var a address4
		for t, v := range kernel.Attrs(m.Body[unix.SizeofIfAddrmsg:]) {
			switch t {
			case unix.IFA_LOCAL:
				a.local, _ = netip.AddrFromSlice(v)
			case unix.IFA_ADDRESS:
				a.peer, _ = netip.AddrFromSlice(v)
			}
		}
		list = append(list, a)
		return nil
	})
	return list, none(err)
}

// none passes over what the kernel answers instead of an empty list: ENODEV when the device has gone since its number was looked
// up, ENOENT when the namespace has never had a route and so has no table for them.
func none(err error) error {
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// route is a unicast route of the main table; via is zero for one without a next hop.
type route struct {
	dst netip.Prefix
	via netip.Addr
}

// observeRoutes returns the IPv4 routes by a device.
func observeRoutes(c *kernel.Conn, index int) ([]route, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETROUTE, 0, append([]byte{unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN}, make([]byte, 7)...))
	b.Uint32(unix.RTA_OIF, uint32(index))
	var list []route
	err := c.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		if len(m.Body) < unix.SizeofRtMsg || m.Body[4] != unix.RT_TABLE_MAIN || m.Body[7] != unix.RTN_UNICAST {
			return nil
		}
		r := route{dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
		ours := false
		for t, v := range kernel.Attrs(m.Body[unix.SizeofRtMsg:]) {
			switch t {
			case unix.RTA_DST:
				if a, ok := netip.AddrFromSlice(v); ok {
					r.dst = netip.PrefixFrom(a, int(m.Body[1]))
				}
			case unix.RTA_GATEWAY:
				r.via, _ = netip.AddrFromSlice(v)
			case unix.RTA_OIF:
				ours = int(kernel.Uint32(v)) == index
			}
		}
		if ours {
			list = append(list, r)
		}
		return nil
	})
	return list, none(err)
}

// neighbour is an entry of a device's neighbour table.
type neighbour struct {
	addr  netip.Addr
	mac   mac.Addr
	state uint16
}

// observeNeighbours returns the IPv4 neighbours of a device.
func observeNeighbours(c *kernel.Conn, index int) ([]neighbour, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETNEIGH, 0, kernel.Nd(unix.AF_INET, 0, 0, 0))
	b.Uint32(unix.NDA_IFINDEX, uint32(index))
	var list []neighbour
	err := c.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		if len(m.Body) < unix.SizeofNdMsg || int(kernel.Uint32(m.Body[4:])) != index {
			return nil
		}
		n := neighbour{state: binary.NativeEndian.Uint16(m.Body[8:])}
		for t, v := range kernel.Attrs(m.Body[unix.SizeofNdMsg:]) {
			switch t {
			case unix.NDA_DST:
				n.addr, _ = netip.AddrFromSlice(v)
			case unix.NDA_LLADDR:
				copy(n.mac[:], v)
			}
		}
		list = append(list, n)
		return nil
	})
	return list, none(err)
}

// Container is a container's device as the kernel has it, with or without a record.
type Container struct {
	Device  string
	Index   int
	Address netip.Addr
}

// Containers returns the container devices of ns, nil for the calling thread's namespace, in the order of their addresses:
// those of this package and those of earlier releases, which named them alike.
func Containers(ns *kernel.NS) ([]Container, error) {
	c, err := kernel.Dial(ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.Nest(unix.IFLA_LINKINFO, func() { b.Attr(unix.IFLA_INFO_KIND, []byte("veth")) })
	var list []Container
	err = c.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		d := parseDevice(m.Body)
		if a, ok := AddressOf(d.name); ok && d.kind == "veth" {
			list = append(list, Container{d.name, d.index, a})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list container devices: %w", err)
	}
	slices.SortFunc(list, func(a, b Container) int { return a.Address.Compare(b.Address) })
	return list, nil
}
