package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// What package syscall lacks of linux/rtnetlink.h, linux/neighbour.h, linux/if_link.h, linux/veth.h and
// linux/netfilter/nf_tables.h.
const (
	linkInfo, infoKind, infoData                                 = 18, 1, 2
	vethPeer                                                     = 1
	vxlanID, vxlanLink, vxlanLocal, vxlanPort, vxlanLearn, vxGBP = 1, 3, 4, 15, 7, 23
	neighDst, neighMAC, neighIndex                               = 1, 2, 8
	permanent, noARP, self                                       = 0x80, 0x40, 2
	scopeLink                                                    = 253
	nested                                                       = 1 << 15
	inet                                                         = 1
	newTable, newSet, newElem, getElem, delElem                  = 0, 9, 12, 13, 14
)

// host returns a namespace with an underlay device.
func host() (*kernel.NS, error) {
	ns, err := kernel.NewNS()
	if err != nil {
		return nil, err
	}
	s, err := newSender(ns)
	if err != nil {
		return nil, err
	}
	defer s.close()
	var b kernel.Batch
	b.Add(syscall.RTM_NEWLINK, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, kernel.IfInfo(0, 0, 0))
	b.String(syscall.IFLA_IFNAME, "eth0")
	b.Nest(linkInfo, func() {
		b.Attr(infoKind, []byte("veth"))
		b.Nest(infoData, func() {
			b.Nest(vethPeer, func() {
				b.Raw(kernel.IfInfo(0, 0, 0))
				b.String(syscall.IFLA_IFNAME, "wire")
			})
		})
	})
	if err := s.do(&b); err != nil {
		return nil, err
	}
	b.Reset()
	for _, end := range []string{"wire", "eth0"} {
		if err := s.find(end); err != nil {
			return nil, err
		}
		b.Add(syscall.RTM_NEWLINK, 0, kernel.IfInfo(s.index, syscall.IFF_UP, syscall.IFF_UP))
	}
	b.Add(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, kernel.IfAddr(s.index, 24, 0))
	b.Attr(syscall.IFA_LOCAL, config(0).Underlay.AsSlice())
	return ns, s.do(&b)
}

// sender sends what it is told and looks at nothing.
type sender struct {
	rt, nf *kernel.Conn
	index  int
}

func newSender(ns *kernel.NS) (*sender, error) {
	rt, err := kernel.Dial(ns)
	if err != nil {
		return nil, err
	}
	nf, err := kernel.DialNetfilter(ns)
	if err != nil {
		rt.Close()
		return nil, err
	}
	return &sender{rt: rt, nf: nf}, nil
}

func (s *sender) close() { s.rt.Close(); s.nf.Close() }

func (s *sender) do(b *kernel.Batch) error {
	refused, err := s.rt.Do(b)
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	return err
}

// find sets the index of the device that requests are about.
func (s *sender) find(name string) error {
	var b kernel.Batch
	b.Add(syscall.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(syscall.IFLA_IFNAME, name)
	return s.rt.Get(&b, func(m kernel.Message) error {
		s.index = int(binary.NativeEndian.Uint32(m.Body[4:]))
		return nil
	})
}

// timeRaw times the baseline of timeSet: the same device, paths and set elements (but no rules).
func timeRaw(_ context.Context, ns *kernel.NS, c overlay.Config) (float64, error) {
	s, err := newSender(ns)
	if err != nil {
		return 0, err
	}
	defer s.close()
	ms, err := bench.Millis(func() error {
		if err := s.find("eth0"); err != nil {
			return err
		}
		if err := errors.Join(s.device(c), s.find(c.Device), s.address(c), s.table()); err != nil {
			return err
		}
		return s.paths(c, c.Peers, true)
	})
	if err != nil {
		return 0, err
	}
	var b kernel.Batch
	b.Add(syscall.RTM_DELLINK, 0, kernel.IfInfo(s.index, 0, 0))
	return ms, s.do(&b)
}

func (s *sender) device(c overlay.Config) error {
	var b kernel.Batch
	b.Add(syscall.RTM_NEWLINK, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, kernel.IfInfo(0, syscall.IFF_UP, syscall.IFF_UP))
	b.String(syscall.IFLA_IFNAME, c.Device)
	b.Attr(syscall.IFLA_ADDRESS, c.Local.MAC[:])
	b.Nest(linkInfo, func() {
		b.Attr(infoKind, []byte("vxlan"))
		b.Nest(infoData, func() {
			b.Uint32(vxlanID, c.VNI)
			b.Uint32(vxlanLink, uint32(s.index))
			b.Attr(vxlanLocal, c.Underlay.AsSlice())
			b.Uint16BE(vxlanPort, c.Port)
			b.Uint8(vxlanLearn, 0)
			b.Attr(vxGBP, nil)
		})
	})
	return s.do(&b)
}

func (s *sender) address(c overlay.Config) error {
	var b kernel.Batch
	b.Add(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE, kernel.IfAddr(s.index, c.Network.Bits(), scopeLink))
	b.Attr(syscall.IFA_LOCAL, c.Local.Base().AsSlice())
	return s.do(&b)
}

func (s *sender) table() error {
	var b kernel.Batch
	b.Add(kernel.NFTables(newTable), syscall.NLM_F_CREATE, kernel.NFGen(inet))
	b.String(1, overlay.Table)
	b.Add(kernel.NFTables(newSet), syscall.NLM_F_CREATE, kernel.NFGen(inet))
	b.String(1, overlay.Table)
	b.String(2, peerSet)
	b.Attr(3, []byte{0, 0, 0, 0})
	b.Attr(4, []byte{0, 0, 0, 7}) // ipv4_addr
	b.Attr(5, []byte{0, 0, 0, 4})
	b.Attr(10, []byte{0, 0, 0, 1})
	return s.nf.Transact(&b, 0)
}

// peerSet is the name that package overlay gives the set of known peers.
const peerSet = "overlay-peers"

// paths adds or deletes the paths to some peers: what Set does for them.
func (s *sender) paths(c overlay.Config, peers []lease.Lease, add bool) error {
	route, neigh, elem, flags := uint16(syscall.RTM_NEWROUTE), uint16(syscall.RTM_NEWNEIGH), uint16(newElem), syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE
	if !add {
		route, neigh, elem, flags = syscall.RTM_DELROUTE, syscall.RTM_DELNEIGH, delElem, 0
	}
	for some := range slices.Chunk(peers, 3000) {
		var b kernel.Batch
		b.Add(kernel.NFTables(elem), flags&syscall.NLM_F_CREATE, kernel.NFGen(inet))
		b.String(1, overlay.Table)
		b.String(2, peerSet)
		b.Nest(nested|3, func() {
			for _, p := range some {
				b.Nest(nested|1, func() { b.Nest(nested|1, func() { b.Attr(1, p.Underlay.AsSlice()) }) })
			}
		})
		if err := s.nf.Transact(&b, 0); err != nil {
			return fmt.Errorf("change %d set elements: %w", len(some), err)
		}
	}
	var b kernel.Batch
	for _, p := range peers {
		base := p.Base().As4()
		b.Add(neigh, flags, kernel.Nd(syscall.AF_BRIDGE, s.index, permanent|noARP, self))
		b.Attr(neighDst, p.Underlay.AsSlice())
		b.Attr(neighMAC, p.MAC[:])
		b.Add(neigh, flags, kernel.Nd(syscall.AF_INET, s.index, permanent, 0))
		b.Attr(neighDst, base[:])
		b.Attr(neighMAC, p.MAC[:])
		s.route(&b, route, flags, c, p)
	}
	return s.do(&b)
}

func (s *sender) route(b *kernel.Batch, typ uint16, flags int, c overlay.Config, p lease.Lease) {
	b.Add(typ, flags, kernel.Rt(p.Subnet.Bits(), overlay.Protocol, 0, 0))
	b.Attr(syscall.RTA_DST, p.Base().AsSlice())
	b.Attr(syscall.RTA_GATEWAY, p.Base().AsSlice())
	b.Attr(syscall.RTA_PREFSRC, c.Local.Base().AsSlice())
	b.Uint32(syscall.RTA_OIF, uint32(s.index))
	b.Uint32(syscall.RTA_PRIORITY, overlay.Metric(c.Network, p.Subnet))
}

func (s *sender) dropRoute(c overlay.Config, p lease.Lease) error {
	var b kernel.Batch
	s.route(&b, syscall.RTM_DELROUTE, 0, c, p)
	return s.do(&b)
}

// dumps reads the routes, neighbours, forwarding entries and set elements and does nothing with them.
func (s *sender) dumps() error {
	read := func(c *kernel.Conn, b *kernel.Batch) error {
		return c.Dump(b, func() {}, func(kernel.Message) error { return nil })
	}
	var routes, neighs, entries, elems kernel.Batch
	routes.Add(syscall.RTM_GETROUTE, 0, kernel.Rt(0, 0, 0, 0))
	routes.Uint32(syscall.RTA_OIF, uint32(s.index))
	neighs.Add(syscall.RTM_GETNEIGH, 0, kernel.Nd(syscall.AF_INET, 0, 0, 0))
	neighs.Uint32(neighIndex, uint32(s.index))
	entries.Add(syscall.RTM_GETNEIGH, 0, kernel.Nd(syscall.AF_BRIDGE, 0, 0, 0))
	entries.Uint32(neighIndex, uint32(s.index))
	elems.Add(kernel.NFTables(getElem), 0, kernel.NFGen(inet))
	elems.String(1, overlay.Table)
	elems.String(2, peerSet)
	return errors.Join(read(s.rt, &routes), read(s.rt, &neighs), read(s.rt, &entries), read(s.nf, &elems))
}
