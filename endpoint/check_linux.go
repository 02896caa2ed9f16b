package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease/mac"
	"golang.org/x/sys/unix"
)

// Difference is one thing in which the kernel is not as a record plans it.
type Difference struct {
	What string // "mtu of s-010255030002"
	Want string
	Have string // "" when the thing is missing
}

// String returns the difference as a sentence.
func (d Difference) String() string {
	if d.Have == "" {
		return fmt.Sprintf("%s is missing: expected %s", d.What, d.Want)
	}
	return fmt.Sprintf("%s is %s: expected %s", d.What, d.Have, d.Want)
}

// severs reports whether the endpoint cannot work like this: something is missing, rather than changed, perhaps on
// purpose by a plugin that came later.
func (d Difference) severs() bool { return d.Have == "" }

// Check compares the endpoint k with the kernel, in the host namespace of the calling thread, and returns its record and what
// differs. fault.NotFound when there is no record.
func (d *Dir) Check(k Key, ns *kernel.NS) (Record, []Difference, error) {
	r, err := d.Lookup(k)
	if err != nil {
		return Record{}, nil, err
	}
	host, err := kernel.Dial(nil)
	if err != nil {
		return r, nil, err
	}
	defer host.Close()
	diffs, err := differences(host, r, ns)
	if err != nil {
		return r, nil, err
	}
	more, err := r.edgeDifferences(host)
	if err != nil {
		return r, nil, err
	}
	diffs = append(diffs, more...)
	if id, err := ns.ID(); err != nil {
		return r, nil, err
	} else if id != r.Namespace {
		diffs = append(diffs, Difference{"network namespace", fmt.Sprint(r.Namespace), fmt.Sprint(id)})
	}
	return r, diffs, nil
}

// end is one end of an endpoint: what it should be like, and the connection to its namespace.
type end struct {
	name        string
	mac         mac.Addr
	mtu         int
	local, peer netip.Addr
	peerMAC     mac.Addr
}

// differences compares both ends of r with the kernel.
func differences(host *kernel.Conn, r Record, ns *kernel.NS) ([]Difference, error) {
	diffs, err := compare(host, end{r.Device, r.HostMAC, r.MTU, Gateway, r.Address(), r.ContainerMAC})
	if err != nil {
		return nil, err
	}
	diffs = append(diffs, sysctl("net/ipv4/ip_forward", "1")...)
	err = ns.Visit(host, func() error {
		inside, err := kernel.Dial(nil)
		if err != nil {
			return err
		}
		defer inside.Close()
		more, err := compare(inside, end{r.Interface, r.ContainerMAC, r.MTU, r.Address(), Gateway, r.HostMAC})
		if err != nil {
			return err
		}
		route, err := compareDefault(inside, r)
		diffs = append(append(diffs, more...), route...)
		return err
	})
	return diffs, err
}

// compare compares one end with the namespace of the connection, which is the calling thread's.
func compare(c *kernel.Conn, want end) ([]Difference, error) {
	l, err := observeLink(c, want.name)
	if err != nil {
		return nil, err
	}
	if l.index == 0 {
		return []Difference{{"device " + want.name, "a veth " + want.mac.String(), ""}}, nil
	}
	var diffs []Difference
	differ := func(what string, w, h any) {
		if w != h {
			diffs = append(diffs, Difference{what + " of " + want.name, fmt.Sprint(w), fmt.Sprint(h)})
		}
	}
	differ("kind", "veth", l.kind)
	differ("hardware address", want.mac, l.mac)
	differ("mtu", want.mtu, l.mtu)
	differ("administrative state", "up", map[bool]string{true: "up", false: "down"}[l.flags&unix.IFF_UP != 0])
	differ("arp", "off", map[bool]string{true: "off", false: "on"}[l.flags&unix.IFF_NOARP != 0])
	diffs = append(diffs, sysctl("net/ipv4/conf/"+want.name+"/rp_filter", "1")...)
	diffs = append(diffs, sysctl("net/ipv6/conf/"+want.name+"/disable_ipv6", "1")...)

	missing := func(what string, is bool) {
		if is {
			diffs = append(diffs, Difference{What: what + " on " + want.name, Want: "present"})
		}
	}
	addrs, err := observeAddrs(c, l.index)
	if err != nil {
		return nil, err
	}
	missing(fmt.Sprintf("address %v peer %v", want.local, want.peer), !slices.Contains(addrs, address4{want.local, want.peer}))
	routes, err := observeRoutes(c, l.index)
	if err != nil {
		return nil, err
	}
	missing(fmt.Sprintf("route to %v", want.peer), !slices.ContainsFunc(routes, func(r route) bool { return r.dst == netip.PrefixFrom(want.peer, 32) && !r.via.IsValid() }))
	neighbours, err := observeNeighbours(c, l.index)
	if err != nil {
		return nil, err
	}
	missing(fmt.Sprintf("permanent neighbour %v %v", want.peer, want.peerMAC), !slices.Contains(neighbours, neighbour{want.peer, want.peerMAC, unix.NUD_PERMANENT}))
	return diffs, nil
}

// compareDefault looks for the container's default route.
func compareDefault(c *kernel.Conn, r Record) ([]Difference, error) {
	l, err := observeLink(c, r.Interface)
	if err != nil || l.index == 0 {
		return nil, err
	}
	routes, err := observeRoutes(c, l.index)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(routes, func(x route) bool { return x.dst.Bits() == 0 && x.via == Gateway }) {
		return nil, nil
	}
	return []Difference{{What: DefaultRoute + " of " + r.Interface, Want: "via " + Gateway.String()}}, nil
}

// DefaultRoute begins the What of the difference that a missing default route is.
const DefaultRoute = "default route"

// sysctl compares a value of the calling thread's namespace. One that this kernel does not have is no difference.
func sysctl(key, want string) []Difference {
	have, err := kernel.Sysctl(key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return []Difference{{"sysctl " + key, want, err.Error()}}
	case have != want:
		return []Difference{{"sysctl " + key, want, have}}
	}
	return nil
}
