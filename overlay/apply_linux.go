package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// applier carries out one plan and keeps count.
type applier struct {
	f       *Fabric
	ctx     context.Context
	index   int // of the device
	guard   []ruleChain
	changed int
	failed  int
	said    []error // of the failed requests, the first few
	err     error   // of the conversation with the kernel: nothing more can be done
	again   bool
}

// sayAtMost bounds the failures that an error spells out.
const sayAtMost = 10

func (a *applier) fail(err error) {
	if a.failed++; len(a.said) < sayAtMost {
		a.said = append(a.said, err)
	}
}

func (a *applier) error() error {
	errs := append(slices.Clone(a.said), a.err)
	if more := a.failed - len(a.said); more > 0 {
		errs = append(errs, fmt.Errorf("and %d more requests were refused", more))
	}
	return errors.Join(errs...)
}

// apply goes through the plan in the order of its fields. What fails is counted and the rest goes on, as far as it can
// make sense: without the device there is nothing to put on it.
func (a *applier) apply(p *plan) {
	a.applyGuard(p.guard)
	if a.failed > 0 && (p.link.create || p.link.up) { // one that is up stays up: what is established is not cut
		a.fail(fmt.Errorf("device %s is not set up without the rules that guard its port", p.device))
		return
	}
	if !a.applyLink(p) {
		return
	}
	a.applyAddrs(p)
	put, gone := unix.NLM_F_CREATE|unix.NLM_F_REPLACE, []unix.Errno{unix.ENOENT, unix.ESRCH, unix.ENODEV}
	entries := func(what string, typ uint16, flags int, es []entry, fine ...unix.Errno) {
		a.each(len(es), func(b *kernel.Batch, i int) { a.entry(b, typ, flags, es[i]) },
			func(i int) string { return what + " forwarding entry " + es[i].String() }, fine...)
	}
	neighs := func(what string, typ uint16, flags int, ns []neigh, fine ...unix.Errno) {
		a.each(len(ns), func(b *kernel.Batch, i int) { a.neigh(b, typ, flags, ns[i]) },
			func(i int) string { return what + " neighbour " + ns[i].String() }, fine...)
	}
	routes := func(what string, typ uint16, flags int, rs []route, fine ...unix.Errno) {
		a.each(len(rs), func(b *kernel.Batch, i int) { a.route(b, typ, flags, rs[i]) },
			func(i int) string { return what + " route " + rs[i].String() }, fine...)
	}
	routes("put", unix.RTM_NEWROUTE, put, p.connected, unix.EEXIST)
	entries("delete", unix.RTM_DELNEIGH, 0, p.badEntries, gone...)
	entries("put", unix.RTM_NEWNEIGH, put, p.putEntries)
	neighs("put", unix.RTM_NEWNEIGH, put, p.putNeighs)
	routes("delete", unix.RTM_DELROUTE, 0, p.clash, gone...)
	routes("put", unix.RTM_NEWROUTE, put, p.putRoutes, unix.EEXIST) // it is there, behind another of the same metric
	routes("delete", unix.RTM_DELROUTE, 0, p.delRoutes, gone...)
	neighs("delete", unix.RTM_DELNEIGH, 0, p.delNeighs, gone...)
	entries("delete", unix.RTM_DELNEIGH, 0, p.delEntries, gone...)
	a.elements(unix.NFT_MSG_DELSETELEM, 0, p.delPeers)
}

// each sends n requests packed. A refusal with one of the errnos in fine is none.
func (a *applier) each(n int, add func(*kernel.Batch, int), name func(int) string, fine ...unix.Errno) {
	if n == 0 || !a.mayGoOn() {
		return
	}
	var b kernel.Batch
	for i := range n {
		add(&b, i)
	}
	refused, err := a.f.rt.Do(&b)
	if err != nil {
		a.err = err
		return
	}
	a.changed += n
	for _, e := range refused {
		a.changed--
		if !slices.Contains(fine, e.Errno) {
			a.fail(fmt.Errorf("%s: %w", name(e.Index), e))
		}
	}
}

func (a *applier) mayGoOn() bool {
	if a.err == nil {
		a.err = a.ctx.Err()
	}
	return a.err == nil
}

func addr(b *kernel.Batch, typ uint16, a netip.Addr) {
	if a.IsValid() {
		b.Attr(typ, a.AsSlice())
	}
}

func (a *applier) entry(b *kernel.Batch, typ uint16, flags int, e entry) {
	b.Add(typ, flags, kernel.Nd(unix.AF_BRIDGE, a.index, unix.NUD_PERMANENT|unix.NUD_NOARP, unix.NTF_SELF))
	b.Attr(unix.NDA_LLADDR, e.mac[:])
	if typ == unix.RTM_NEWNEIGH || !e.odd { // an odd one is deleted whole, whatever it points to
		addr(b, unix.NDA_DST, e.dst)
	}
}

func (a *applier) neigh(b *kernel.Batch, typ uint16, flags int, n neigh) {
	b.Add(typ, flags, kernel.Nd(unix.AF_INET, a.index, unix.NUD_PERMANENT, 0))
	addr(b, unix.NDA_DST, n.addr)
	if typ == unix.RTM_NEWNEIGH {
		b.Attr(unix.NDA_LLADDR, n.mac[:])
	}
}

func (a *applier) route(b *kernel.Batch, typ uint16, flags int, r route) {
	h := kernel.Rt(r.dst.Bits(), r.proto, r.scope, 0)
	h[3] = r.tos
	b.Add(typ, flags, h)
	addr(b, unix.RTA_DST, r.dst.Addr())
	addr(b, unix.RTA_GATEWAY, r.via)
	addr(b, unix.RTA_PREFSRC, r.src)
	b.Uint32(unix.RTA_OIF, uint32(a.index))
	if r.metric != 0 {
		b.Uint32(unix.RTA_PRIORITY, r.metric)
	}
}

func (a *applier) applyAddrs(p *plan) {
	request := func(typ uint16, flags int, as []address) func(*kernel.Batch, int) {
		return func(b *kernel.Batch, i int) {
			x := as[i]
			b.Add(typ, flags, kernel.IfAddr(a.index, x.prefix.Bits(), x.scope))
			addr(b, unix.IFA_LOCAL, x.prefix.Addr())
			addr(b, unix.IFA_ADDRESS, x.prefix.Addr())
			if typ == unix.RTM_NEWADDR {
				addr(b, unix.IFA_BROADCAST, last(x.prefix.Masked()))
			}
		}
	}
	a.each(len(p.delAddrs), request(unix.RTM_DELADDR, 0, p.delAddrs), func(i int) string { return "delete address " + p.delAddrs[i].String() },
		unix.EADDRNOTAVAIL, unix.ENODEV)
	a.each(len(p.addAddrs), request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, p.addAddrs),
		func(i int) string { return "add address " + p.addAddrs[i].String() })
}

// applyLink makes or mends the device and reports whether it is there and up.
func (a *applier) applyLink(p *plan) bool {
	l := p.link
	if !a.mayGoOn() {
		return false
	}
	if l.remove {
		a.each(1, func(b *kernel.Batch, _ int) { deleteLink(b, p.device) }, func(int) string { return "delete device " + p.device }, unix.ENODEV)
	}
	if l.create {
		if a.index = 0; !a.createLink(p.device, l.want) {
			return false
		}
	}
	for _, s := range []struct {
		is         bool
		key, value string
	}{{l.noIPv6, sysctlIPv6(p.device), "1"}, {l.noARP, sysctlARP(p.device), "0"}} {
		if l.create || s.is {
			if err := a.f.setSysctl(s.key, s.value); err != nil {
				a.fail(fmt.Errorf("set sysctl %s of %s to %s: %w", s.key, p.device, s.value, err))
			}
		}
	}
	for _, c := range []struct {
		is   bool
		what string
		add  func(*kernel.Batch)
	}{
		{l.setMAC, "address", func(b *kernel.Batch) { b.Attr(unix.IFLA_ADDRESS, l.want.mac[:]) }},
		{l.setMTU, "MTU", func(b *kernel.Batch) { b.Uint32(unix.IFLA_MTU, uint32(l.want.mtu)) }},
		{l.setQueue, "queue length", func(b *kernel.Batch) { b.Uint32(unix.IFLA_TXQLEN, 0) }},
		{l.free, "master", func(b *kernel.Batch) { b.Uint32(unix.IFLA_MASTER, 0) }},
	} {
		if c.is {
			a.each(1, func(b *kernel.Batch, _ int) { b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(a.index, 0, 0)); c.add(b) },
				func(int) string { return "set " + c.what + " of " + p.device })
		}
	}
	return a.mayGoOn() && (!l.up || a.raise(p.device, l.want.vxlan))
}

// createLink makes the device, down, and finds out its index.
func (a *applier) createLink(device string, want link) bool {
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, device)
	b.Attr(unix.IFLA_ADDRESS, want.mac[:])
	b.Uint32(unix.IFLA_MTU, uint32(want.mtu))
	b.Uint32(unix.IFLA_TXQLEN, 0)
	b.Nest(unix.IFLA_LINKINFO, func() {
		b.Attr(unix.IFLA_INFO_KIND, []byte("vxlan"))
		b.Nest(unix.IFLA_INFO_DATA, func() {
			b.Uint32(unix.IFLA_VXLAN_ID, want.vxlan.vni)
			b.Uint32(unix.IFLA_VXLAN_LINK, uint32(want.vxlan.lower))
			b.Attr(unix.IFLA_VXLAN_LOCAL, want.vxlan.local.AsSlice())
			b.Uint16BE(unix.IFLA_VXLAN_PORT, want.vxlan.port)
			b.Uint8(unix.IFLA_VXLAN_LEARNING, 0)
			b.Attr(unix.IFLA_VXLAN_GBP, nil)
		})
	})
	refused, err := a.f.rt.Do(&b)
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	if errors.Is(err, unix.EEXIST) {
		by := a.f.rival(device, want.vxlan)
		if by == "" {
			by = " by one that was moved from here to another network namespace: remove it there, or change vtep_port or vni"
		}
		err = fault.Conflictf("%w%s", err, by)
	}
	if err != nil {
		a.fail(fmt.Errorf("make VXLAN device %s: %w", device, err))
		return false
	}
	l, err := a.f.link(device)
	if err != nil || l == nil {
		a.fail(fmt.Errorf("find the new device %s: %w", device, errors.Join(err, fault.Unavailablef("it has gone again"))))
		return false
	}
	a.index = l.index
	a.changed++
	return true
}

// raise sets the device up. That is when the kernel binds the UDP port.
func (a *applier) raise(device string, x vxlan) bool {
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(a.index, unix.IFF_UP, unix.IFF_UP))
	refused, err := a.f.rt.Do(&b)
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = fault.Conflictf("UDP port %d is taken%s: %w", x.port, a.f.rival(device, x), err)
	}
	if err != nil {
		a.fail(fmt.Errorf("set %s up: %w", device, err))
		return false
	}
	a.changed++
	return true
}

// rival names the VXLAN device that is in the way of one like x, "" if there is none.
func (f *Fabric) rival(device string, x vxlan) string {
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	var found string
	f.rt.Dump(&b, func() { found = "" }, func(m kernel.Message) error {
		l, name, ok := parseLink(m.Body)
		switch {
		case !ok || l.kind != "vxlan" || name == device || l.vxlan.port != x.port:
		case l.vxlan.external:
			found = fmt.Sprintf(" by the external (collect metadata) VXLAN device %s, which cannot share a port with an ordinary one: "+
				"remove it or change vtep_port", name)
		default:
			found = fmt.Sprintf(" by the VXLAN device %s with VNI %d: remove it, or change vtep_port or vni", name, l.vxlan.vni)
		}
		return nil
	})
	return found
}

func deleteLink(b *kernel.Batch, device string) {
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, device)
}

// sysctlIPv6 keeps IPv6 off the device when it is 1: no link-local address, no router solicitations into the overlay.
func sysctlIPv6(device string) string { return "net/ipv6/conf/" + device + "/disable_ipv6" }

// sysctlARP, when it is 0, makes the kernel give up at once on addresses that have no neighbour entry: nobody would answer. An
// entry that waits for an answer cannot be taken for another use, so a container that scans the overlay would fill the neighbour
// table, which the whole machine shares.
func sysctlARP(device string) string { return "net/ipv4/neigh/" + device + "/mcast_solicit" }

// setSysctl sets what the kernel has: it may lack IPv6, and hides neighbour settings from unprivileged namespaces.
func (f *Fabric) setSysctl(key, value string) error {
	return f.ns.Do(func() error {
		err := kernel.SetSysctl(key, value)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}
