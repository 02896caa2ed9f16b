package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// wire makes the kernel's objects of r: two sends and what has no place in them. The caller undoes what a failed wire
// leaves, which is at most the host's device.
func (d *Dir) wire(host *kernel.Conn, r Record, ix indexes, ns *kernel.NS) error {
	if err := d.Sysctls().Set("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	ix, err := wireHost(host, r, ix, ns)
	if err != nil {
		return err
	}
	if err := disableIPv6(r.Device); err != nil {
		return err
	}
	return ns.Visit(host, func() error { return wireContainer(r, ix.container) })
}

// wireHost makes both devices and the host's side of them. The number of the host's device was seen to be free: what follows
// the device in the batch would otherwise hit another one.
func wireHost(host *kernel.Conn, r Record, ix indexes, ns *kernel.NS) (indexes, error) {
	for range 8 {
		plan := planHost(r, ix, ns.FD())
		refused, err := host.Do(plan)
		if err != nil {
			return ix, fmt.Errorf("make device %s: %w", r.Device, err)
		}
		if len(refused) == 0 {
			return ix, nil
		}
		first := refused[0]
		if first.Index != 0 {
			return ix, fmt.Errorf("set up device %s: %w", r.Device, first)
		}
		if len(refused) != plan.Len() {
			revert(host, r, ix.host) // somebody made a device of our number in between
		}
		if !errors.Is(first, unix.EEXIST) && !errors.Is(first, unix.EBUSY) {
			return ix, fmt.Errorf("make devices %s and %s: %w", r.Device, r.Interface, first)
		}
		if err := nameTaken(host, r, ns); err != nil {
			return ix, err
		}
		ix = others()
	}
	return ix, fault.Unavailablef("make device %s: every device number tried was taken", r.Device)
}

// revert takes back what the requests after a refused device did to a foreign one.
func revert(host *kernel.Conn, r Record, index int) {
	var b kernel.Batch
	b.Add(unix.RTM_DELADDR, 0, kernel.IfAddr(index, 32, unix.RT_SCOPE_LINK))
	b.Attr(unix.IFA_LOCAL, Gateway.AsSlice())
	b.Attr(unix.IFA_ADDRESS, r.Address().AsSlice())
	b.Add(unix.RTM_DELNEIGH, 0, kernel.Nd(unix.AF_INET, index, 0, 0))
	b.Attr(unix.NDA_DST, r.Address().AsSlice())
	host.Do(&b)
}

// errNotOurs marks a device that stood in the way: undoing must not remove it.
var errNotOurs = errors.New("made by somebody else")

// nameTaken tells which of the two names, if any, stands in the way.
func nameTaken(host *kernel.Conn, r Record, ns *kernel.NS) error {
	if there, err := exists(host, r.Device); err != nil {
		return err
	} else if there {
		return fault.New(fault.Conflict, fmt.Errorf("device %s exists, %w", r.Device, errNotOurs))
	}
	inside, err := kernel.Dial(ns)
	if err != nil {
		return err
	}
	defer inside.Close()
	if there, err := exists(inside, r.Interface); err != nil {
		return err
	} else if there {
		return fault.Conflictf("interface %s exists in the container already", r.Interface)
	}
	return nil
}

// wireContainer sets the container's end up, on a thread in its namespace.
func wireContainer(r Record, index int) error {
	if err := disableIPv6(r.Interface); err != nil {
		return err
	}
	c, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	plan := planContainer(r, index, 0)
	refused, err := c.Do(plan)
	if err == nil && len(refused) == 1 && refused[0].Index == plan.Len()-1 && errors.Is(refused[0], unix.EEXIST) {
		// Another interface has the default route. Ours stands behind it.
		var b kernel.Batch
		defaultRoute(&b, r, index, uint32(index))
		refused, err = c.Do(&b)
	}
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	if err != nil {
		return fmt.Errorf("set up interface %s in the container: %w", r.Interface, err)
	}
	return nil
}

// disableIPv6 keeps a device of the calling thread's namespace free of IPv6 before it has a carrier, so that it never gets
// a link-local address. A kernel without IPv6 has nothing to disable, nor has a device whose MTU is less than IPv6 allows (1280).
func disableIPv6(device string) error {
	err := kernel.SetSysctl("net/ipv6/conf/"+device+"/disable_ipv6", "1")
	if errors.Is(err, fs.ErrNotExist) {
		if _, there := os.Stat("/proc/sys/net/ipv4/conf/" + device); there == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("disable IPv6 on %s: %w", device, err)
	}
	return nil
}

// unwireHost removes what an address has in devices on the host: the container's and its limiter. The same holds as for unwire.
func unwireHost(host *kernel.Conn, a netip.Addr) error {
	if Device(a) == "" {
		return nil
	}
	veth, ifb, err := observePair(host, a)
	if err != nil {
		return err
	}
	var b kernel.Batch
	for _, d := range []struct {
		device
		kind string
	}{{veth, "veth"}, {ifb, "ifb"}} {
		if d.index != 0 && d.device.kind == d.kind {
			b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(d.index, 0, 0))
		}
	}
	if b.Len() == 0 {
		return nil
	}
	refused, err := host.Do(&b)
	for _, e := range refused {
		if err == nil && !errors.Is(e, unix.ENODEV) {
			err = e
		}
	}
	if err != nil {
		return fmt.Errorf("remove devices of %v: %w", a, err)
	}
	return nil
}

// unwire removes both ends of a device. One that does not exist is no error. One that is no veth, or has the name only as an
// alternative one, was not made here.
func unwire(host *kernel.Conn, device string) error {
	l, err := observeLink(host, device)
	if err != nil || l.index == 0 || l.kind != "veth" || l.name != device {
		return err
	}
	refused, err := host.Do(planRemoval(device))
	if err == nil && len(refused) > 0 && !errors.Is(refused[0], unix.ENODEV) {
		err = refused[0]
	}
	if err != nil {
		return fmt.Errorf("remove device %s: %w", device, err)
	}
	return nil
}
