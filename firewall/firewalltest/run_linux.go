package firewalltest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
)

// Engine enforces rulesets in one namespace.
type Engine interface {
	// Enforce returns when the ruleset is in force.
	Enforce(ctx context.Context, rs firewall.Ruleset) error
	Close() error
}

const (
	perHost   = 20          // containers that take part
	watchers  = perHost + 2 // two more of each host say when all packets have passed
	inBatch   = 500         // packets between two changes
	firstPort = 10000       // of sources
	watchPort = 9           // of the watchers
	watchTag  = identity.Tag(0xfffe)
)

// Run checks that an engine and the Reference agree on packets random packets: same host and across hosts, tcp, udp and others,
// first packets and answers, with ranges, overlaps, policies of a group with itself, spoofed sources, containers without rules, marks that
// others set, and changes of everything in between.
func Run(t *testing.T, packets int, open func(ns *kernel.NS) (Engine, error)) {
	w := NewWorld(t, watchers)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := &runner{t: t, w: w, r: rand.New(rand.NewPCG(seed, 1)), ref: &Reference{Hosts: make([]firewall.Input, 2)}, port: firstPort}
	for i, h := range w.Hosts {
		e, err := open(h.NS)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		r.engines[i] = e
	}
	defer pin(t)()
	r.groups()
	for done := 0; done < packets; done += inBatch {
		r.change()
		r.batch()
		if done == packets/2 {
			r.meddle()
		}
	}
	t.Logf("%d packets and %d answers arrived, %d were refused", r.arrived, r.answered, r.refused)
	if r.arrived < packets/50 || r.refused < packets/50 || r.answered < packets/100 {
		t.Errorf("the mix proves little")
	}
}

type runner struct {
	t       *testing.T
	w       *World
	r       *rand.Rand
	ref     *Reference
	engines [2]Engine
	tags    map[identity.Group]identity.Tag
	names   []identity.Group
	in      firewall.Input // what both hosts have in common
	port    uint16

	arrived, answered, refused int
}

// groups gives names and tags. A name may be anything that prints.
func (r *runner) groups() {
	r.tags = map[identity.Group]identity.Tag{"watch": watchTag}
	for _, n := range []identity.Group{"web", "api", `"; flush ruleset #`, "db $(reboot)", "größe", "a b", "x", "*", "@p", "{}", "%s%n", "s-010255001001"} {
		r.names = append(r.names, n)
		r.retag(n)
	}
	r.in = firewall.Input{Network: Network, VTEP: VTEP}
	for range 40 {
		r.addRule()
	}
	for i, h := range r.w.Hosts {
		for n := 1; n <= perHost; n++ {
			r.ref.Hosts[i].Endpoints = append(r.ref.Hosts[i].Endpoints, firewall.Endpoint{Device: h.Device(n), Address: h.Address(n), Group: r.group()})
		}
	}
}

// retag gives a group a tag that no other has.
func (r *runner) retag(g identity.Group) {
	for {
		t := identity.Tag(1 + r.r.IntN(65535))
		if r.r.IntN(2) == 0 {
			t = identity.Tag(1 + r.r.IntN(20))
		}
		free := true
		for _, had := range r.tags {
			free = free && had != t
		}
		if free {
			r.tags[g] = t
			return
		}
	}
}

func (r *runner) group() identity.Group {
	if r.r.IntN(10) == 0 {
		return ""
	}
	return r.names[r.r.IntN(len(r.names))]
}

func (r *runner) named() identity.Group { return r.names[r.r.IntN(len(r.names))] }

var ports = []uint16{1, 22, 53, 79, 80, 81, 443, 1023, 1024, 5000, 8080, 8081, 9999, 65534, 65535}

func (r *runner) addRule() {
	p := policy.Policy{Source: r.named(), Destination: r.named(), Protocol: policy.TCP, Ports: policy.Ports{First: ports[r.r.IntN(len(ports))]}}
	if r.r.IntN(2) == 0 {
		p.Protocol = policy.UDP
	}
	p.Ports.Last = p.Ports.First
	switch r.r.IntN(6) {
	case 0, 1:
		p.Ports.Last += uint16(r.r.IntN(min(20, 65536-int(p.Ports.First))))
	case 2:
		p.Ports.Last += uint16(r.r.IntN(65536 - int(p.Ports.First)))
	}
	if r.r.IntN(8) == 0 {
		p.Destination = p.Source
	}
	r.in.Rules = append(r.in.Rules, policy.Rule{Policy: p})
}

// change changes some of everything and has it enforced.
func (r *runner) change() {
	for range r.r.IntN(6) {
		if n := len(r.in.Rules); n > 0 && (n > 60 || r.r.IntN(2) == 0) {
			i := r.r.IntN(n)
			r.in.Rules = slices.Delete(r.in.Rules, i, i+1)
		} else {
			r.addRule()
		}
	}
	if r.r.IntN(4) == 0 {
		r.retag(r.named())
	}
	if r.r.IntN(40) == 0 {
		r.in.Rules = nil
	}
	r.in.Unrestricted = r.r.IntN(20) == 0
	for i := range r.in.Rules {
		x := &r.in.Rules[i]
		x.SourceTag, x.DestinationTag = r.tags[x.Source], r.tags[x.Destination]
	}
	for i, h := range r.w.Hosts {
		r.ref.Hosts[i] = r.host(h, r.ref.Hosts[i].Endpoints)
		rs, problems := firewall.Compile(r.ref.Hosts[i])
		if len(problems) > 0 {
			r.t.Fatal(problems)
		}
		if err := r.engines[i].Enforce(context.Background(), rs); err != nil {
			r.t.Fatal(err)
		}
	}
}

// host returns the input of a host, after some of its containers came, went or changed their groups.
func (r *runner) host(h *Host, endpoints []firewall.Endpoint) firewall.Input {
	in := r.in
	in.Endpoints = nil
	had := map[netip.Addr]firewall.Endpoint{}
	for _, e := range endpoints {
		had[e.Address] = e
	}
	for n := 1; n <= perHost; n++ {
		e, ok := had[h.Address(n)]
		if r.r.IntN(15) == 0 {
			ok = !ok
			e = firewall.Endpoint{Device: h.Device(n), Address: h.Address(n), Group: r.group()}
		}
		if ok {
			in.Endpoints = append(in.Endpoints, e)
		}
	}
	for n := perHost + 1; n <= watchers; n++ {
		in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: h.Device(n), Address: h.Address(n), Group: "watch"})
	}
	in.Rules = append(slices.Clone(r.in.Rules), policy.Rule{
		Policy:    policy.Policy{Source: "watch", Destination: "watch", Protocol: policy.UDP, Ports: policy.Ports{First: watchPort, Last: watchPort}},
		SourceTag: watchTag, DestinationTag: watchTag,
	})
	r.r.Shuffle(len(in.Rules), func(i, j int) { in.Rules[i], in.Rules[j] = in.Rules[j], in.Rules[i] })
	return in
}

// packet returns a random one, as a container on a host sends it.
func (r *runner) packet(host int) Packet {
	h := r.w.Hosts[host]
	n := 1 + r.r.IntN(perHost)
	to := r.w.Hosts[r.r.IntN(2)]
	p := Packet{Device: h.Device(n), Source: h.Address(n), Destination: to.Address(1 + r.r.IntN(perHost+3)), SourcePort: r.nextPort(),
		Protocol: policy.TCP, Port: ports[r.r.IntN(len(ports))]}
	if r.r.IntN(2) == 0 {
		p.Protocol = policy.UDP
	}
	if len(r.in.Rules) > 0 && r.r.IntN(3) > 0 {
		p = r.aim(host, p)
	}
	switch r.r.IntN(40) {
	case 0:
		p.Source = r.w.Hosts[r.r.IntN(2)].Address(1 + r.r.IntN(perHost)) // most likely another's
	case 1:
		p.Protocol = 1 // ICMP
	}
	return p
}

// aim turns a packet into one that a rule speaks of, or nearly so.
func (r *runner) aim(host int, p Packet) Packet {
	x := r.in.Rules[r.r.IntN(len(r.in.Rules))]
	var from, to []firewall.Endpoint
	for i := range r.w.Hosts {
		for _, e := range r.ref.Hosts[i].Endpoints {
			if e.Group == x.Source && i == host {
				from = append(from, e)
			}
			if e.Group == x.Destination {
				to = append(to, e)
			}
		}
	}
	if len(from) == 0 || len(to) == 0 {
		return p
	}
	f := from[r.r.IntN(len(from))]
	p.Device, p.Source, p.Destination = f.Device, f.Address, to[r.r.IntN(len(to))].Address
	if r.r.IntN(8) > 0 {
		p.Protocol = x.Protocol
	}
	p.Port = []uint16{x.Ports.First - 1, x.Ports.First, x.Ports.Last, x.Ports.Last + 1,
		x.Ports.First + uint16(r.r.IntN(1+int(x.Ports.Last-x.Ports.First)))}[r.r.IntN(5)]
	if p.Port == 0 {
		p.Port = 1
	}
	return p
}

// nextPort never gives a port twice between two calls of renew.
func (r *runner) nextPort() uint16 { r.port++; return r.port }

// renew lets ports be used again before they run out: all connections are forgotten.
func (r *runner) renew() {
	if r.port < 65535-2*inBatch {
		return
	}
	r.port = firstPort
	r.ref.Forget()
	for _, h := range r.w.Hosts {
		if err := h.Forget(); err != nil {
			r.t.Fatal(err)
		}
	}
}

type sent struct {
	host int
	Packet
	want bool
}

// batch sends packets, sees which arrive, and then lets those that received some answer.
func (r *runner) batch() {
	r.renew()
	var first []sent
	for range inBatch {
		host := r.r.IntN(2)
		p := r.packet(host)
		first = append(first, sent{host, p, r.ref.Allows(host, p)})
	}
	arrived := r.exchange(first, false)
	r.arrived += arrived
	r.refused += len(first) - arrived
	var answers []sent
	for _, s := range first {
		host, device := r.behind(s.Destination)
		if !s.want || device == "" || s.Protocol == 1 || r.r.IntN(3) > 0 {
			continue
		}
		p := Packet{Device: device, Source: s.Destination, Destination: s.Source, Protocol: s.Protocol, SourcePort: s.Port, Port: s.SourcePort}
		answers = append(answers, sent{host, p, r.ref.Allows(host, p)})
	}
	r.answered += r.exchange(answers, true)
}

// behind returns the host and device of an address.
func (r *runner) behind(a netip.Addr) (int, string) {
	for i, h := range r.w.Hosts {
		for n := 1; n <= watchers; n++ {
			if h.Address(n) == a {
				return i, h.Device(n)
			}
		}
	}
	return 0, ""
}

// exchange sends packets and fails the test unless exactly those that should arrive do, each where it belongs.
func (r *runner) exchange(list []sent, answers bool) (arrived int) {
	for _, s := range list {
		if err := r.w.Hosts[s.host].Send(s.Packet, answers); err != nil {
			r.t.Fatal(err)
		}
	}
	got := r.settle()
	for _, s := range list {
		_, device := r.behind(s.Destination)
		p := s.Packet
		p.Device = device
		if got[p] != s.want {
			r.t.Errorf("answer %v: packet %+v from host %d: arrived %v, expected %v", answers, s.Packet, s.host, got[p], s.want)
			r.explain(s)
		}
		if got[p] {
			arrived++
		}
		delete(got, p)
	}
	for p := range got {
		r.t.Errorf("packet %+v arrived, which nobody sent there", p)
	}
	if r.t.Failed() {
		r.t.FailNow()
	}
	return arrived
}

func (r *runner) explain(s sent) {
	for i, in := range r.ref.Hosts {
		for _, e := range in.Endpoints {
			if e.Address == s.Source || e.Address == s.Destination {
				r.t.Logf("host %d: %+v", i, e)
			}
		}
	}
}

// settle returns what has arrived once the watchers have heard of each other on every path.
func (r *runner) settle() map[Packet]bool {
	got, missing := map[Packet]bool{}, map[Packet]bool{}
	port := r.nextPort()
	for i, from := range r.w.Hosts {
		for _, to := range r.w.Hosts {
			p := Packet{Device: from.Device(perHost + 1), Source: from.Address(perHost + 1), Destination: to.Address(perHost + 2),
				Protocol: policy.UDP, SourcePort: port, Port: watchPort}
			if err := r.w.Hosts[i].Send(p, false); err != nil {
				r.t.Fatal(err)
			}
			p.Device = to.Device(perHost + 2)
			missing[p] = true
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		for _, h := range r.w.Hosts {
			if err := h.Hear(func(p Packet) {
				if missing[p] {
					delete(missing, p)
				} else {
					got[p] = true
				}
			}); err != nil {
				r.t.Fatal(err)
			}
		}
		if len(missing) == 0 {
			return got
		}
		for to := range missing {
			host, _ := r.behind(to.Destination)
			if !r.w.Hosts[host].wait(deadline) {
				r.t.Fatalf("packets that every engine lets through did not arrive: %v", fmt.Sprint(missing))
			}
			break
		}
	}
}

// meddle makes other software mark what containers send, before any rule looks at it, with a tag that means something and with bits of its own.
func (r *runner) meddle() {
	for _, h := range r.w.Hosts {
		h.Shell(h.NS, "nft add table inet other; nft 'add chain inet other pre { type filter hook prerouting priority -310; }'\n"+
			fmt.Sprintf(`nft add rule inet other pre iifname '"s-*"' meta mark set 0x%x`, uint32(watchTag)|0xabc<<20))
	}
}
