package overlay

import (
	"encoding/binary"
	"net/netip"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"golang.org/x/sys/unix"
)

// Readers of rtnetlink messages. They take any bytes and report whether those were a message of the kind they read.

var ne = binary.NativeEndian

// Missing in x/sys/unix: linux/rtnetlink.h, linux/neighbour.h.
const (
	rtaNexthop = 30 // RTA_NH_ID
	ndaNexthop = 13 // NDA_NH_ID
)

// parseLink reads an ifinfomsg: the link and its name.
func parseLink(b []byte) (l link, name string, ok bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return link{}, "", false
	}
	l.index = int(int32(ne.Uint32(b[4:])))
	l.up = ne.Uint32(b[8:])&unix.IFF_UP != 0
	for t, v := range kernel.Attrs(b[unix.SizeofIfInfomsg:]) {
		switch t {
		case unix.IFLA_IFNAME:
			name = kernel.Text(v)
		case unix.IFLA_ADDRESS:
			copy(l.mac[:], v)
		case unix.IFLA_MTU:
			l.mtu = int(kernel.Uint32(v))
		case unix.IFLA_TXQLEN:
			l.txqlen = int(kernel.Uint32(v))
		case unix.IFLA_MASTER:
			l.master = int(kernel.Uint32(v))
		case unix.IFLA_LINKINFO:
			parseLinkInfo(v, &l)
		}
	}
	return l, name, true
}

func parseLinkInfo(b []byte, l *link) {
	for t, v := range kernel.Attrs(b) {
		switch t {
		case unix.IFLA_INFO_KIND:
			l.kind = kernel.Text(v)
		case unix.IFLA_INFO_DATA:
			l.vxlan = parseVXLAN(v)
		}
	}
}

func parseVXLAN(b []byte) (x vxlan) {
	for t, v := range kernel.Attrs(b) {
		on := len(v) > 0 && v[0] != 0
		switch t {
		case unix.IFLA_VXLAN_ID:
			x.vni = kernel.Uint32(v)
		case unix.IFLA_VXLAN_PORT:
			if len(v) == 2 {
				x.port = binary.BigEndian.Uint16(v)
			}
		case unix.IFLA_VXLAN_LOCAL:
			x.local, _ = netip.AddrFromSlice(v)
		case unix.IFLA_VXLAN_LINK:
			x.lower = int(kernel.Uint32(v))
		case unix.IFLA_VXLAN_GBP:
			x.gbp = true
		case unix.IFLA_VXLAN_LEARNING:
			x.learning = on
		case unix.IFLA_VXLAN_COLLECT_METADATA:
			x.external = on
		case unix.IFLA_VXLAN_GROUP, unix.IFLA_VXLAN_GROUP6:
			x.flood = true
		case unix.IFLA_VXLAN_GPE:
			x.other = true
		case unix.IFLA_VXLAN_PROXY, unix.IFLA_VXLAN_RSC, unix.IFLA_VXLAN_L2MISS, unix.IFLA_VXLAN_L3MISS, unix.IFLA_VXLAN_VNIFILTER:
			x.other = x.other || on
		}
	}
	return x
}

// parseAddr reads an ifaddrmsg of an IPv4 address: the device's index and the address.
func parseAddr(b []byte) (index int, a address, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg || b[0] != unix.AF_INET || b[1] > 32 {
		return 0, address{}, false
	}
	index = int(ne.Uint32(b[4:]))
	a.scope = b[3]
	for t, v := range kernel.Attrs(b[unix.SizeofIfAddrmsg:]) {
		if t == unix.IFA_LOCAL && len(v) == 4 {
			a.prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte(v)), int(b[1]))
		}
	}
	return index, a, a.prefix.IsValid()
}

// parseRoute reads an rtmsg. It is ok for an IPv4 unicast route of the main table by one device; oif is that
// device also when the route is of another kind.
func parseRoute(b []byte) (r route, oif int, ok bool) {
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET || b[1] > 32 {
		return route{}, 0, false
	}
	dst, table := netip.IPv4Unspecified(), uint32(b[4])
	r.tos, r.proto, r.scope = b[3], b[5], b[6]
	ok = b[7] == unix.RTN_UNICAST
	r.odd = ne.Uint32(b[8:])&unix.RTNH_F_ONLINK != 0
	for t, v := range kernel.Attrs(b[unix.SizeofRtMsg:]) {
		switch t {
		case unix.RTA_DST:
			if len(v) == 4 {
				dst = netip.AddrFrom4([4]byte(v))
			}
		case unix.RTA_GATEWAY:
			r.via, _ = netip.AddrFromSlice(v)
		case unix.RTA_PREFSRC:
			r.src, _ = netip.AddrFromSlice(v)
		case unix.RTA_PRIORITY:
			r.metric = kernel.Uint32(v)
		case unix.RTA_OIF:
			oif = int(kernel.Uint32(v))
		case unix.RTA_TABLE:
			table = kernel.Uint32(v)
		case unix.RTA_MULTIPATH, rtaNexthop:
			ok = false
		case unix.RTA_METRICS, unix.RTA_ENCAP, unix.RTA_FLOW, unix.RTA_VIA:
			r.odd = true
		}
	}
	r.dst = netip.PrefixFrom(dst, int(b[1])).Masked()
	return r, oif, ok && oif != 0 && table == unix.RT_TABLE_MAIN
}

// parseNeigh reads an ndmsg of an IPv4 neighbour.
func parseNeigh(b []byte) (index int, n neigh, ok bool) {
	if len(b) < unix.SizeofNdMsg || b[0] != unix.AF_INET {
		return 0, neigh{}, false
	}
	index = int(ne.Uint32(b[4:]))
	n.permanent = ne.Uint16(b[8:]) == unix.NUD_PERMANENT && b[10]&unix.NTF_PROXY == 0
	for t, v := range kernel.Attrs(b[unix.SizeofNdMsg:]) {
		switch {
		case t == unix.NDA_DST && len(v) == 4:
			n.addr = netip.AddrFrom4([4]byte(v))
		case t == unix.NDA_LLADDR:
			copy(n.mac[:], v)
		}
	}
	return index, n, n.addr.IsValid()
}

// parseEntry reads an ndmsg of a forwarding entry.
func parseEntry(b []byte) (index int, e entry, ok bool) {
	if len(b) < unix.SizeofNdMsg || b[0] != unix.AF_BRIDGE {
		return 0, entry{}, false
	}
	index = int(ne.Uint32(b[4:]))
	e.permanent = ne.Uint16(b[8:])&unix.NUD_PERMANENT != 0
	for t, v := range kernel.Attrs(b[unix.SizeofNdMsg:]) {
		switch t {
		case unix.NDA_LLADDR:
			ok = len(v) == len(lease.MAC{})
			copy(e.mac[:], v)
		case unix.NDA_DST:
			e.dst, _ = netip.AddrFromSlice(v)
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, unix.NDA_SRC_VNI, ndaNexthop:
			e.odd = true
		}
	}
	return index, e, ok
}
