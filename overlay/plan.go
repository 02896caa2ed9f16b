package overlay

import (
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

// What is in the kernel. Every type holds what tells a right object from a wrong one, no more.

// link is a device that bears the VTEP's name.
type link struct {
	index  int
	kind   string // "vxlan"
	vxlan  vxlan
	mac    lease.MAC
	mtu    int
	txqlen int
	master int
	up     bool
	ipv6   bool // not switched off
	asks   bool // ARP requests are sent by it
}

// vxlan is what cannot be changed without making the device anew.
type vxlan struct {
	vni                                   uint32
	port                                  uint16
	local                                 netip.Addr
	lower                                 int
	gbp, learning, external, flood, other bool // flood: it has a default destination; other: it does what ours never does
}

// lowerLink is the device below. The zero lowerLink stands for one that was not found.
type lowerLink struct {
	index, mtu int
	name       string
}

const (
	scopeGlobal = 0
	scopeLink   = 253
	protoKernel = 2
	protoBoot   = 3
)

type address struct {
	prefix netip.Prefix // with the address itself in it
	scope  uint8
}

// route is a unicast route of the main table by the device.
type route struct {
	dst      netip.Prefix
	via, src netip.Addr
	metric   uint32
	proto    uint8
	scope    uint8
	tos      uint8
	odd      bool // it has attributes that ours never have
}

type neigh struct {
	addr      netip.Addr
	mac       lease.MAC
	permanent bool
}

// entry is a forwarding entry: frames to mac go to the host dst.
type entry struct {
	mac       lease.MAC
	dst       netip.Addr
	permanent bool
	odd       bool // it has attributes that ours never have
}

// chain is a base chain of the guard, as nft would print it.
type chain struct {
	name  string
	hook  string // "type filter hook input priority 0; policy accept;"
	rules []string
}

// guard is what of the guard is in the kernel.
type guard struct {
	table  bool // it exists and is not dormant
	set    bool // there is a set of our name, of IPv4 addresses
	other  bool // there is something else of the set's name
	own    bool // there is the set of containers' sources, if there should be, just as it should be
	ownIs  bool // there is something of its name
	ownFit bool // of the right kind
	chains []chain
	peers  []netip.Addr
}

// observed is what is in the kernel that bears on the overlay.
type observed struct {
	link    *link
	lower   lowerLink
	addrs   []address
	routes  []route
	neighs  []neigh
	entries []entry
	guard   guard
	foreign int // objects on the device that are of a kind we never make
}

// plan is what is to be done, in the order of its fields: adds before deletes, except where the old is in the way.
type plan struct {
	device string
	guard  guardPlan
	link   linkPlan

	delAddrs []address // before the new one: of two addresses in one network the kernel drops the second with the first
	addAddrs []address

	connected  []route // the network's, if it is missing
	badEntries []entry // in the way of right ones: deleted before those are put
	putEntries []entry
	putNeighs  []neigh
	clash      []route // same destination and metric as a right one: deleted before it is put
	putRoutes  []route

	delRoutes  []route
	delNeighs  []neigh
	delEntries []entry
	delPeers   []netip.Addr // set elements

	counts
}

type counts struct{ desired, observed, foreign int }

// linkPlan says what to do to the device. Want is what it should become.
type linkPlan struct {
	remove, create                                bool
	setMAC, setMTU, setQueue, free, noIPv6, noARP bool
	up                                            bool
	want                                          link
}

func (l linkPlan) empty() bool {
	return !(l.remove || l.create || l.setMAC || l.setMTU || l.setQueue || l.free || l.noIPv6 || l.noARP || l.up)
}

// guardPlan says what to do to the guard rules.
type guardPlan struct {
	replaceSet bool // what bears the set's name is no such set: it goes, and the chains that refer to it before it
	makeSet    bool
	addPeers   []netip.Addr
	old        []string // chains that stand where others are to be written, or refer to what must go
	dropOwn    bool     // what bears the name of the set of containers' sources goes
	flushOwn   bool     // its elements go, since others' rules may refer to it
	own        []pair   // the set is made anew with these
	chains     []chain  // to be written whole
}

func (g guardPlan) empty() bool {
	return !g.replaceSet && !g.makeSet && len(g.addPeers)+len(g.chains) == 0
}

func (p *plan) empty() bool {
	return p.guard.empty() && p.link.empty() && len(p.delAddrs)+len(p.addAddrs)+len(p.connected)+p.requests() == 0
}

// requests counts the requests that concern peers.
func (p *plan) requests() int {
	return len(p.badEntries) + len(p.putEntries) + len(p.putNeighs) + len(p.clash) + len(p.putRoutes) +
		len(p.delRoutes) + len(p.delNeighs) + len(p.delEntries) + len(p.delPeers)
}

// makePlan compares. It is pure. The error is a fault.Conflict: what bears the device's name is none of ours, or
// fault.Unavailable: the device must be made and there is no lower device.
func makePlan(w *wish, o *observed) (*plan, error) {
	p := &plan{device: w.cfg.Device, counts: counts{foreign: o.foreign}}
	if err := p.planLink(w, o); err != nil {
		return nil, err
	}
	seen, lost := *o, uint8(0)
	switch {
	case p.link.create: // with the old device went all that was on it
		seen.addrs, seen.routes, seen.neighs, seen.entries = nil, nil, nil, nil
	case p.link.setMAC: // the kernel forgets the device's neighbours
		lost |= hasNeigh
	}
	if p.planAddrs(w, &seen); len(p.delAddrs) > 0 {
		// With an address the kernel drops routes, not always only its own; with the last one neighbours too.
		lost |= hasRoute | hasNeigh
	}
	p.planPeers(w, &seen, lost)
	p.planGuard(w, o)
	return p, nil
}

func (p *plan) planLink(w *wish, o *observed) error {
	c := w.cfg
	want := link{kind: "vxlan", mac: c.Local.MAC, mtu: o.lower.mtu - Overhead, up: true}
	want.vxlan = vxlan{vni: c.VNI, port: c.Port, local: c.Underlay, lower: o.lower.index, gbp: true}
	have := o.link
	if have != nil && have.kind != "vxlan" {
		return fault.Conflictf("device %s is of kind %q, not a VXLAN device: rename or remove it, or set another vtep_name", c.Device, have.kind)
	}
	if o.lower.index == 0 {
		if have == nil || !sameVXLAN(have.vxlan, want.vxlan, true) {
			return fault.Unavailablef("make device %s: no interface has the underlay address %v%s", c.Device, c.Underlay, lowerHint(c))
		}
		want.vxlan.lower, want.mtu = have.vxlan.lower, have.mtu // while the lower device is away, keep what there is
	}
	p.link.want = want
	switch {
	case have == nil:
		p.link.create = true
		p.link.up = true
		return nil
	case !sameVXLAN(have.vxlan, want.vxlan, false):
		p.link.remove, p.link.create, p.link.up = true, true, true
		return nil
	}
	p.link.want.index = have.index
	p.link.setMAC = have.mac != want.mac
	p.link.setMTU = have.mtu != want.mtu
	p.link.setQueue = have.txqlen != 0
	p.link.free = have.master != 0
	p.link.noIPv6, p.link.noARP = have.ipv6, have.asks
	p.link.up = !have.up
	return nil
}

func lowerHint(c Config) string {
	if c.Lower == "" {
		return ""
	}
	return " (device " + c.Lower + " was asked for and is not there)"
}

func sameVXLAN(a, b vxlan, butLower bool) bool {
	if butLower {
		a.lower = b.lower
	}
	return a == b
}

// planAddrs keeps foreign addresses: those outside the overlay that are not of the form a VTEP address has.
func (p *plan) planAddrs(w *wish, o *observed) {
	want := w.address()
	for _, a := range o.addrs {
		switch {
		case a == want && !w.cfg.Fenced:
		case a.scope == scopeLink || w.cfg.Network.Contains(a.prefix.Addr()):
			p.delAddrs = append(p.delAddrs, a)
		default:
			p.foreign++
		}
	}
	switch {
	case w.cfg.Fenced:
	case !slices.Contains(o.addrs, want) || len(p.delAddrs) > 0:
		p.addAddrs = []address{want}
	case !slices.Contains(o.routes, w.connected()): // without it no next hop is reachable
		p.connected = []route{w.connected()}
	}
}

// connected is the route that the kernel makes with the VTEP's address.
func (w *wish) connected() route {
	return route{dst: w.cfg.Network, src: w.cfg.Local.Base(), proto: protoKernel, scope: scopeLink}
}

// ours reports whether r, on our device, is one that we or a deployed daemon made: by its protocol number, because it
// concerns the overlay, or by its form.
func (w *wish) ours(r route) bool {
	return r.proto == Protocol || w.cfg.Network.Overlaps(r.dst) && r.dst.Bits() >= w.cfg.Network.Bits() ||
		r.proto == protoBoot && r.via == r.dst.Addr()
}

// What there is already for a peer.
const (
	hasRoute = 1 << iota
	hasNeigh
	hasEntry
)

// finder returns the index of the peer whose base is a.
type finder func(a netip.Addr) (int32, bool)

// planPeers compares the paths to peers. lost says what will not be there any more when paths are put.
func (p *plan) planPeers(w *wish, o *observed, lost uint8) {
	index := make(map[uint32]int32, len(w.peers))
	for i, l := range w.peers {
		index[number(l.Base())] = int32(i)
	}
	at := func(a netip.Addr) (int32, bool) {
		i, ok := index[number(a)]
		return i, ok
	}
	has := make([]uint8, len(w.peers))
	p.desired += 3 * len(w.peers)
	p.compareRoutes(w, o.routes, has, at)
	p.compareNeighs(w, o.neighs, has, at)
	p.compareEntries(w, o.entries, has, at)
	for i, l := range w.peers {
		has[i] &^= lost
		if has[i]&hasEntry == 0 {
			p.putEntries = append(p.putEntries, entry{mac: l.MAC, dst: l.Underlay, permanent: true})
		}
		if has[i]&hasNeigh == 0 {
			p.putNeighs = append(p.putNeighs, neigh{l.Base(), l.MAC, true})
		}
		if has[i]&hasRoute == 0 {
			p.putRoutes = append(p.putRoutes, w.route(l))
		}
	}
}

func (p *plan) compareRoutes(w *wish, routes []route, has []uint8, at finder) {
	alike := map[int32][]route{} // wrong ones with the destination and metric of a right one
	for _, r := range routes {
		if r.proto == protoKernel {
			continue
		}
		if !w.ours(r) {
			p.foreign++
			continue
		}
		i, ok := at(r.dst.Addr())
		if ok && has[i]&hasRoute != 0 && r == w.route(w.peers[i]) { // listed twice
			continue
		}
		p.observed++
		if !ok {
			p.delRoutes = append(p.delRoutes, r)
			continue
		}
		switch want := w.route(w.peers[i]); {
		case r == want:
			has[i] |= hasRoute
		case r.dst == want.dst && r.metric == want.metric && r.tos == 0:
			alike[i] = append(alike[i], r)
		default:
			p.delRoutes = append(p.delRoutes, r)
		}
	}
	for i, rs := range alike {
		if len(rs) == 1 && has[i]&hasRoute == 0 {
			continue // put replaces it in place, without a gap
		}
		// A request to delete one of several may hit another, the right one too: that is put again right after.
		p.clash = append(p.clash, rs...)
		has[i] &^= hasRoute
	}
	slices.SortFunc(p.clash, func(a, b route) int { return a.dst.Addr().Compare(b.dst.Addr()) })
}

func (p *plan) compareNeighs(w *wish, neighs []neigh, has []uint8, at finder) {
	for _, n := range neighs {
		i, ok := at(n.addr)
		switch {
		case ok && has[i]&hasNeigh != 0: // listed twice
		case ok && n == (neigh{n.addr, w.peers[i].MAC, true}):
			has[i] |= hasNeigh
			p.observed++
		case ok: // put replaces it
			p.observed++
		case n.permanent:
			p.delNeighs = append(p.delNeighs, n)
			p.observed++
		}
	}
}

func (p *plan) compareEntries(w *wish, entries []entry, has []uint8, at finder) {
	for _, e := range entries {
		i, ok := at(netip.AddrFrom4([4]byte(e.mac[2:])))
		ok = ok && w.peers[i].MAC == e.mac
		right := ok && e == (entry{mac: e.mac, dst: w.peers[i].Underlay, permanent: true})
		if right && has[i]&hasEntry != 0 { // listed twice
			continue
		}
		p.observed++
		switch {
		case right:
			has[i] |= hasEntry
		case !ok:
			p.delEntries = append(p.delEntries, e)
		case e.odd: // put cannot turn an entry by a nexthop object into ours
			p.badEntries = append(p.badEntries, e)
		} // otherwise put replaces it
	}
}

func (p *plan) planGuard(w *wish, o *observed) {
	g := o.guard
	p.guard.replaceSet = g.other
	p.guard.makeSet = !g.set || !g.table
	if !g.own {
		p.guard.dropOwn, p.guard.flushOwn, p.guard.own = g.ownIs && !g.ownFit, g.ownIs && g.ownFit, pairs(w.cfg.Local.Subnet)
	}
	for _, c := range guardChains(w.cfg, o.lower.name) {
		i := slices.IndexFunc(g.chains, func(x chain) bool { return x.name == c.name })
		refers := c.name == chainPrerouting && !g.own // to a set that is exchanged
		if i >= 0 && !g.other && !refers && g.chains[i].hook == c.hook && slices.Equal(g.chains[i].rules, c.rules) {
			continue
		}
		if i >= 0 {
			p.guard.old = append(p.guard.old, c.name)
		}
		p.guard.chains = append(p.guard.chains, c)
	}
	p.planSet(w, g.peers)
}

// planSet compares the set of known peers. The kernel may list an element twice, while it makes a set's hash table larger.
func (p *plan) planSet(w *wish, elements []netip.Addr) {
	wanted := make(map[netip.Addr]bool, len(w.peers)) // whether it is there
	for _, l := range w.peers {
		wanted[l.Underlay] = false
	}
	p.desired += len(wanted)
	seen := make(map[netip.Addr]bool, len(elements))
	for _, a := range elements {
		if seen[a] {
			continue
		}
		seen[a] = true
		if _, ok := wanted[a]; ok {
			wanted[a] = true
		} else {
			p.delPeers = append(p.delPeers, a)
		}
	}
	p.observed += len(seen)
	for _, l := range w.peers {
		if !wanted[l.Underlay] {
			wanted[l.Underlay] = true
			p.guard.addPeers = append(p.guard.addPeers, l.Underlay)
		}
	}
}

// planDelta is the plan from the peers of a kernel state that is known to hold old to those of w, at a cost that
// follows the difference but for one comparison of the two lists.
func planDelta(w *wish, old []lease.Lease, known counts) *plan {
	p := &plan{device: w.cfg.Device, counts: counts{foreign: known.foreign}}
	gone, came := delta(old, w.peers)
	part := wish{cfg: w.cfg, peers: came}
	var o observed
	before, after := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, l := range gone {
		o.routes = append(o.routes, w.route(l))
		o.neighs = append(o.neighs, neigh{l.Base(), l.MAC, true})
		o.entries = append(o.entries, entry{mac: l.MAC, dst: l.Underlay, permanent: true})
		before[l.Underlay], after[l.Underlay] = false, false
	}
	for _, l := range came {
		before[l.Underlay], after[l.Underlay] = false, false
	}
	p.planPeers(&part, &o, 0)
	if len(before) > 0 {
		for _, l := range old {
			if _, ok := before[l.Underlay]; ok {
				before[l.Underlay] = true
			}
		}
		for _, l := range w.peers {
			if _, ok := after[l.Underlay]; ok {
				after[l.Underlay] = true
			}
		}
	}
	for a := range before {
		switch {
		case !before[a] && after[a]:
			p.guard.addPeers = append(p.guard.addPeers, a)
		case before[a] && !after[a]:
			p.delPeers = append(p.delPeers, a)
		}
	}
	slices.SortFunc(p.guard.addPeers, netip.Addr.Compare)
	slices.SortFunc(p.delPeers, netip.Addr.Compare)
	p.desired = known.desired + 3*(len(w.peers)-len(old)) + len(p.guard.addPeers) - len(p.delPeers)
	p.observed = known.desired
	return p
}
