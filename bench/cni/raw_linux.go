package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// The kernel's own minimum: the objects of an attached container, made in one process that has everything ready, by as few
// requests as they take. Making the namespace is not part of it.

var gateway = netip.AddrFrom4([4]byte{169, 254, 0, 1})

func rawAddress(c *container) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 2, byte(c.number >> 8), byte(c.number)})
}

func rawName(c *container) string { return fmt.Sprintf("r-%d", c.number) }

func rawMAC(first byte, a netip.Addr) []byte { return append([]byte{first, first}, a.AsSlice()...) }

const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL

// rawAttach makes the objects for c, in the host namespace of the calling thread.
func rawAttach(c *container) (float64, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return 0, err
	}
	defer host.Close()
	var took time.Duration
	inside := make(chan func() error)
	done := make(chan error, 1)
	go func() { done <- c.ns.Do(func() error { return (<-inside)() }) }() // the thread is there before the clock starts
	start := time.Now()
	err = rawHost(host, c)
	inside <- func() error {
		if err != nil {
			return err
		}
		return rawContainer(c)
	}
	err = <-done
	took = time.Since(start)
	return float64(took) / 1e6, err
}

func rawLink(b *kernel.Batch, name string, mac []byte) {
	b.String(unix.IFLA_IFNAME, name)
	b.Attr(unix.IFLA_ADDRESS, mac)
	b.Uint32(unix.IFLA_MTU, 1450)
	b.Uint32(unix.IFLA_TXQLEN, 0)
	b.Uint32(unix.IFLA_NUM_TX_QUEUES, 1)
	b.Uint32(unix.IFLA_NUM_RX_QUEUES, 1)
}

func rawStrict(b *kernel.Batch) {
	b.Nest(unix.IFLA_AF_SPEC, func() {
		b.Nest(unix.AF_INET, func() { b.Nest(1, func() { b.Uint32(8, 1) }) }) // IFLA_INET_CONF, IPV4_DEVCONF_RP_FILTER
	})
}

func rawEnd(b *kernel.Batch, index int, local, peer netip.Addr, mac []byte) {
	b.Add(unix.RTM_NEWADDR, create, kernel.IfAddr(index, 32, unix.RT_SCOPE_LINK))
	b.Attr(unix.IFA_LOCAL, local.AsSlice())
	b.Attr(unix.IFA_ADDRESS, peer.AsSlice())
	b.Add(unix.RTM_NEWNEIGH, create, kernel.Nd(unix.AF_INET, index, unix.NUD_PERMANENT, 0))
	b.Attr(unix.NDA_DST, peer.AsSlice())
	b.Attr(unix.NDA_LLADDR, mac)
}

func rawHost(host *kernel.Conn, c *container) error {
	a, index := rawAddress(c), 1<<24+c.number
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, create, kernel.IfInfo(index, unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP))
	rawLink(&b, rawName(c), rawMAC(0xaa, a))
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("veth"))
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Nest(1, func() { // VETH_INFO_PEER
				b.Raw(kernel.IfInfo(100, unix.IFF_NOARP, unix.IFF_NOARP))
				rawLink(&b, "eth0", rawMAC(0xee, a))
				b.Uint32(unix.IFLA_NET_NS_FD, uint32(c.ns.FD()))
			})
		})
	})
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(index, 0, 0))
	rawStrict(&b)
	rawEnd(&b, index, gateway, a, rawMAC(0xee, a))
	if err := rawDo(host, &b); err != nil {
		return err
	}
	return kernel.SetSysctl("net/ipv6/conf/"+rawName(c)+"/disable_ipv6", "1")
}

func rawContainer(c *container) error {
	conn, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := kernel.SetSysctl("net/ipv6/conf/eth0/disable_ipv6", "1"); err != nil {
		return err
	}
	a := rawAddress(c)
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(100, unix.IFF_UP, unix.IFF_UP))
	rawStrict(&b)
	rawEnd(&b, 100, a, gateway, rawMAC(0xaa, a))
	b.Add(unix.RTM_NEWROUTE, create, kernel.Rt(0, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, 0))
	b.Attr(unix.RTA_GATEWAY, gateway.AsSlice())
	b.Attr(unix.RTA_PREFSRC, a.AsSlice())
	b.Uint32(unix.RTA_OIF, 100)
	return rawDo(conn, &b)
}

func rawDo(c *kernel.Conn, b *kernel.Batch) error {
	refused, err := c.Do(b)
	for _, r := range refused {
		err = errors.Join(err, r)
	}
	return err
}

// rawDetach removes what rawAttach made.
func rawDetach(c *container) (float64, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return 0, err
	}
	defer host.Close()
	var b kernel.Batch
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, rawName(c))
	return 0, rawDo(host, &b)
}
