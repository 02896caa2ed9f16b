package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// The underlay is one bridge in the lab's own network namespace, with a port for every host and for the controller. All
// device indexes in it are chosen, so that nothing has to be looked up.
const (
	underlayName = "underlay" // of the bridge, and of the namespace it is in
	controlName  = "control"  // the controller's namespace and port

	bridgeIndex = 2
	portIndex   = 100 // plus the host's index; control has index 0
	eth0Index   = 2   // in the host
)

// Attributes and states of linux/if_bridge.h that the unix package does not have.
const (
	brportState     = 1
	stateDisabled   = 0
	stateForwarding = 3
	vethInfoPeer    = 1
)

// makeUnderlay makes the bridge in the calling process's namespace. It may be there already.
func makeUnderlay(nf bool) error {
	if err := bridgeNF(nf); err != nil {
		return err
	}
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, kernel.IfInfo(bridgeIndex, unix.IFF_UP, unix.IFF_UP))
	b.String(unix.IFLA_IFNAME, underlayName)
	b.Nest(unix.IFLA_LINKINFO, func() { b.Attr(unix.IFLA_INFO_KIND, []byte("bridge")) })
	return request(nil, &b, "make the underlay bridge", unix.EEXIST)
}

// bridgeNF sets whether the namespace's bridges hand their frames to the firewall. With br_netfilter loaded a new
// namespace starts with this on, and packets between hosts of a lab would meet rules as if one host were on their way.
func bridgeNF(on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	var errs []error
	for _, k := range []string{"arptables", "iptables", "ip6tables"} {
		if err := kernel.SetSysctl("net/bridge/bridge-nf-call-"+k, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("set bridge-nf-call of the underlay: %w", err)
	}
	return nil
}

// plug joins the host in ns to the underlay: eth0 with the address of index, its other end a port of the bridge under
// the host's name. What is there already stays. While it is partitioned, the port carries nothing, which neither end notices.
func plug(ns *kernel.NS, name string, index int, partitioned bool) error {
	port := portIndex + index
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, kernel.IfInfo(port, unix.IFF_UP, unix.IFF_UP))
	b.String(unix.IFLA_IFNAME, name)
	b.Uint32(unix.IFLA_MASTER, bridgeIndex)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("veth"))
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Nest(vethInfoPeer, func() {
				b.Raw(kernel.IfInfo(eth0Index, 0, 0)) // not up: the kernel would open it before it has its other end
				b.String(unix.IFLA_IFNAME, "eth0")
				b.Uint32(unix.IFLA_NET_NS_FD, uint32(ns.FD()))
			})
		})
	})
	if err := request(nil, &b, "plug "+name+" into the underlay", unix.EEXIST); err != nil {
		return err
	}
	if err := configure(ns, netip.PrefixFrom(address(index), underlay.Bits())); err != nil {
		return fmt.Errorf("configure eth0 of %s: %w", name, err)
	}
	state := uint8(stateForwarding)
	if partitioned {
		state = stateDisabled
	}
	b.Reset()
	h := kernel.IfInfo(port, 0, 0)
	h[0] = unix.AF_BRIDGE
	b.Add(unix.RTM_SETLINK, 0, h)
	b.Nest(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, func() { b.Uint8(brportState, state) })
	// A peer that is still on its way down has no carrier; the next pass finds it gone.
	return request(nil, &b, "set the port of "+name, unix.ENETDOWN)
}

// configure gives eth0 its address and brings it up.
func configure(ns *kernel.NS, addr netip.Prefix) error {
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(eth0Index, unix.IFF_UP, unix.IFF_UP))
	b.Add(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, kernel.IfAddr(eth0Index, addr.Bits(), unix.RT_SCOPE_UNIVERSE))
	b.Attr(unix.IFA_LOCAL, addr.Addr().AsSlice())
	b.Attr(unix.IFA_ADDRESS, addr.Addr().AsSlice())
	return request(ns, &b, "set address", unix.EEXIST)
}

// unplug removes a host's port, and with it its eth0.
func unplug(index int) error {
	var b kernel.Batch
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(portIndex+index, 0, 0))
	return request(nil, &b, "unplug from the underlay", unix.ENODEV)
}

// loopbackUp brings up lo in the calling thread's namespace.
func loopbackUp() error {
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(1, unix.IFF_UP, unix.IFF_UP))
	return request(nil, &b, "bring up lo")
}

// request sends the batch in ns and returns the first refusal that is none of those expected.
func request(ns *kernel.NS, b *kernel.Batch, what string, expected ...unix.Errno) error {
	c, err := kernel.Dial(ns)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer c.Close()
	refused, err := c.Do(b)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
next:
	for _, r := range refused {
		for _, e := range expected {
			if r.Errno == e {
				continue next
			}
		}
		return fmt.Errorf("%s: %w", what, r)
	}
	return nil
}

// hasLink reports whether the calling thread's network namespace has a device of that name. It asks the kernel for
// the one device, not /sys, which shows the namespace of whoever mounted it.
func hasLink(name string) (bool, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, name)
	c, err := kernel.Dial(nil)
	if err != nil {
		return false, err
	}
	defer c.Close()
	refused, err := c.Do(&b)
	switch {
	case err != nil:
		return false, err
	case len(refused) == 0:
		return true, nil
	case errors.Is(refused[0], unix.ENODEV), errors.Is(refused[0], os.ErrNotExist):
		return false, nil
	}
	return false, refused[0]
}
