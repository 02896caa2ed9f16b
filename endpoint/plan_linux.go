package endpoint

import (
	"net/netip"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL

// From linux/veth.h, linux/if_link.h and linux/ip.h; x/sys/unix has no names for them.
const (
	vethInfoPeer    = 1
	iflaInetConf    = 1
	devconfRPFilter = 8
)

// indexes are the device numbers of the two ends. Choosing them is what lets addresses, routes and neighbours follow the
// device in the same send.
type indexes struct{ host, container int }

// indexesOf returns the numbers that an endpoint asks for first. Those of the host differ for all addresses of a /8;
// whoever watches over other devices need not be woken for these (kernel.Listener.Sieve). Those in the container stay clear of what the kernel numbers itself, from 1 up.
func indexesOf(a netip.Addr) indexes {
	b := a.As4()
	return indexes{kernel.TransientIndex | int(b[1])<<16 | int(b[2])<<8 | int(b[3]), 100 + int(b[3])}
}

// planHost returns the requests in the host's namespace. As ip(8) would have them, for 10.255.30.2 in namespace C:
//
//	link add s-010255030002 up index H address aa:aa:0a:ff:1e:02 mtu 1450 txqlen 0 arp off type veth
//	     peer eth0 netns C index I address ee:ee:0a:ff:1e:02 mtu 1450 txqlen 0 arp off
//	sysctl net.ipv4.conf.s-010255030002.rp_filter=1
//	addr add 169.254.0.1 peer 10.255.30.2 dev s-010255030002 scope link
//	neigh add 10.255.30.2 lladdr ee:ee:0a:ff:1e:02 dev s-010255030002 nud permanent
//
// The kernel adds the route 10.255.30.2 dev s-010255030002 proto kernel scope link src 169.254.0.1 by itself. The host's end
// may be made up at once; it has no carrier until the container's end, which cannot be made up here (ENOTCONN), is.
func planHost(r Record, ix indexes, nsFD int) *kernel.Batch {
	b := new(kernel.Batch)
	b.Add(unix.RTM_NEWLINK, create, kernel.IfInfo(ix.host, unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP))
	link(b, r.Device, r.HostMAC[:], r.MTU)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("veth"))
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Nest(vethInfoPeer, func() {
				b.Raw(kernel.IfInfo(ix.container, unix.IFF_NOARP, unix.IFF_NOARP))
				link(b, r.Interface, r.ContainerMAC[:], r.MTU)
				b.Uint32(unix.IFLA_NET_NS_FD, uint32(nsFD))
			})
		})
	})
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(ix.host, 0, 0))
	strict(b)
	addr(b, ix.host, Gateway, r.Address())
	neigh(b, ix.host, r.Address(), r.ContainerMAC[:])
	return b
}

// planContainer returns the requests in the container's namespace; metric 0 leaves the default route without one.
//
//	link set eth0 up; sysctl net.ipv4.conf.eth0.rp_filter=1
//	addr add 10.255.30.2 peer 169.254.0.1 dev eth0 scope link
//	neigh add 169.254.0.1 lladdr aa:aa:0a:ff:1e:02 dev eth0 nud permanent
//	route add default via 169.254.0.1 dev eth0 src 10.255.30.2
func planContainer(r Record, index int, metric uint32) *kernel.Batch {
	b := new(kernel.Batch)
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(index, unix.IFF_UP, unix.IFF_UP))
	strict(b)
	addr(b, index, r.Address(), Gateway)
	neigh(b, index, Gateway, r.HostMAC[:])
	defaultRoute(b, r, index, metric)
	return b
}

func defaultRoute(b *kernel.Batch, r Record, index int, metric uint32) {
	b.Add(unix.RTM_NEWROUTE, create, kernel.Rt(0, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, 0))
	b.Attr(unix.RTA_GATEWAY, Gateway.AsSlice())
	b.Attr(unix.RTA_PREFSRC, r.Address().AsSlice())
	b.Uint32(unix.RTA_OIF, uint32(index))
	if metric != 0 {
		b.Uint32(unix.RTA_PRIORITY, metric)
	}
}

// planRemoval returns the request that removes both ends and all that hangs on them.
func planRemoval(device string) *kernel.Batch {
	b := new(kernel.Batch)
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, device)
	return b
}

// link appends what both ends have in common. A hardware address given at creation is not changed by udev. A veth device uses one
// queue in each direction unless somebody asks for more, but the kernel (since 5.17) makes one per processor when the request names
// no number, only to take all but one back: that waits for an RCU grace period per end, with the routing lock held.
func link(b *kernel.Batch, name string, mac []byte, mtu int) {
	b.String(unix.IFLA_IFNAME, name)
	b.Attr(unix.IFLA_ADDRESS, mac)
	b.Uint32(unix.IFLA_MTU, uint32(mtu))
	b.Uint32(unix.IFLA_TXQLEN, 0)
	b.Uint32(unix.IFLA_NUM_TX_QUEUES, 1)
	b.Uint32(unix.IFLA_NUM_RX_QUEUES, 1)
}

// strict appends the reverse path filter: what comes in must be routed back the same way.
func strict(b *kernel.Batch) { conf(b, devconfRPFilter, 1) }

// conf appends a sysctl of a device's (net.ipv4.conf).
func conf(b *kernel.Batch, key uint16, value uint32) {
	b.Nest(unix.IFLA_AF_SPEC, func() {
		b.Nest(unix.AF_INET, func() {
			b.Nest(iflaInetConf, func() { b.Uint32(key, value) })
		})
	})
}

// addr appends an address with a peer. Both are of link scope: only routes with an explicit source use them.
func addr(b *kernel.Batch, index int, local, peer netip.Addr) {
	b.Add(unix.RTM_NEWADDR, create, kernel.IfAddr(index, 32, unix.RT_SCOPE_LINK))
	b.Attr(unix.IFA_LOCAL, local.AsSlice())
	b.Attr(unix.IFA_ADDRESS, peer.AsSlice())
}

// neigh appends the peer's hardware address, so that nobody asks for it.
func neigh(b *kernel.Batch, index int, peer netip.Addr, mac []byte) {
	b.Add(unix.RTM_NEWNEIGH, create, kernel.Nd(unix.AF_INET, index, unix.NUD_PERMANENT, 0))
	b.Attr(unix.NDA_DST, peer.AsSlice())
	b.Attr(unix.NDA_LLADDR, mac)
}
