package firewalltest

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
	"golang.org/x/sys/unix"
)

// Outside is what a host reaches by its default route: it hears everything and answers nothing.
type Outside struct {
	host *Host
	NS   *kernel.NS
	fd   int
}

// NewOutside gives a host of a world an outside.
func NewOutside(h *Host) *Outside {
	t := h.World.t
	t.Helper()
	o := &Outside{host: h, NS: newNS(t)}
	h.Shell(o.NS, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1; ip link set lo up")
	h.Shell(h.NS, "ip link add out type veth peer name in netns "+path(o.NS)+`
		ip addr add 203.0.113.1/30 dev out; ip link set out up
		ip neigh add 203.0.113.2 lladdr ee:ee:00:00:00:01 dev out nud permanent; ip route add default via 203.0.113.2 dev out`)
	h.Shell(o.NS, "ip link set in up")
	h.settle()
	err := o.NS.Do(func() (err error) {
		link, err := net.InterfaceByName("in")
		if err != nil {
			return err
		}
		if o.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(ethIP)); err != nil {
			return err
		}
		return unix.Bind(o.fd, &unix.SockaddrLinklayer{Protocol: ethIP, Ifindex: link.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(o.fd) })
	unix.SetsockoptInt(o.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	return o
}

// Hear calls each for every IPv4 packet that has arrived outside. It is valid until each returns.
func (o *Outside) Hear(each func(packet []byte)) {
	o.host.World.t.Helper()
	var buf [4096]byte
	for {
		n, from, err := unix.Recvfrom(o.fd, buf[:], 0)
		switch {
		case err == unix.EAGAIN:
			return
		case err == unix.EINTR:
			continue
		case err != nil:
			o.host.World.t.Fatal(err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && n >= 20 {
			each(buf[:n])
		}
	}
}

// Opening is the first packet of a connection, as a container sends it: an IPv4 packet that ends with a number.
func Opening(from netip.Addr, p secgroup.Packet, number uint32) []byte {
	src, dst := from.As4(), p.Destination.As4()
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, uint16(20000+number%40000)), p.Port)
	var l4 []byte
	at := 0 // of the checksum, 0: none
	switch p.Protocol {
	case secgroup.TCP:
		l4, at = append(ports, byte(number>>24), byte(number>>16), byte(number>>8), byte(number), 0, 0, 0, 0, 5<<4, syn, 0xff, 0xff, 0, 0, 0, 0), 16
	case secgroup.UDP:
		l4 = append(ports, 0, 12, 0, 0)
	case secgroup.ICMP:
		l4, at = append([]byte{p.Type, p.Code, 0, 0}, ports...), 2
	default:
		l4 = []byte{1, 2, 3, 4, 0, 0, 0, 0}
	}
	l4 = binary.BigEndian.AppendUint32(l4, number)
	switch {
	case p.Protocol == secgroup.TCP:
		pseudo := append(append(append([]byte(nil), src[:]...), dst[:]...), 0, byte(p.Protocol), 0, byte(len(l4)))
		binary.BigEndian.PutUint16(l4[at:], checksum(append(pseudo, l4...)))
	case at > 0:
		binary.BigEndian.PutUint16(l4[at:], checksum(l4))
	}
	return IPv4(from, p.Destination, byte(p.Protocol), l4)
}

// Number returns what an Opening ends with.
func Number(packet []byte) uint32 { return binary.BigEndian.Uint32(packet[len(packet)-4:]) }

// tester is a container that may reach everything; it says when all packets of others have passed.
const tester = 9

// RunEgress checks that an engine and Reach agree on random packets that containers send to the outside, of every protocol, while what they may reach changes.
func RunEgress(t *testing.T, packets int, open func(ns *kernel.NS) (Engine, error)) {
	w := NewWorld(t, tester)
	h := w.Hosts[0]
	o := NewOutside(h)
	e, err := open(h.NS)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := &egress{t: t, h: h, o: o, r: rand.New(rand.NewPCG(seed, 1)), engine: e, reach: map[int]*Reach{}}
	defer pin(t)()
	for done := 0; done < packets; done += inBatch {
		r.change()
		r.batch()
		if done%20000 == 0 {
			if err := h.Forget(); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d packets arrived, %d were refused", r.arrived, r.refused)
	if r.arrived < packets/10 || r.refused < packets/10 {
		t.Errorf("the mix proves little")
	}
}

// pin keeps the test on one processor, on which packets of one path are handled in order, until the function that it returns is called.
func pin(t *testing.T) (release func()) {
	runtime.LockOSThread()
	var had, one unix.CPUSet
	unix.SchedGetaffinity(0, &had)
	for i := 0; one.Count() == 0; i++ {
		if had.IsSet(i) {
			one.Set(i)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	return func() {
		unix.SchedSetaffinity(0, &had)
		runtime.UnlockOSThread()
	}
}

type egress struct {
	t      *testing.T
	h      *Host
	o      *Outside
	r      *rand.Rand
	engine Engine
	all    []*Reach // what there is to reach
	reach  map[int]*Reach
	number uint32

	arrived, refused int
}

// change changes what some containers may reach, and has it enforced.
func (r *egress) change() {
	for len(r.all) < 5 {
		r.all = append(r.all, r.something())
	}
	r.all[r.r.IntN(len(r.all))] = r.something()
	in := firewall.Input{Network: Network, VTEP: VTEP}
	if r.r.IntN(3) == 0 {
		in.Limit = firewall.Limit{Rate: 100000, Burst: 100000, Log: r.r.IntN(2) == 0, Dry: r.r.IntN(2) == 0}
	}
	made := map[*Reach]*firewall.Egress{nil: nil}
	for n := 1; n <= tester; n++ {
		if _, ok := r.reach[n]; n < tester && (!ok || r.r.IntN(4) == 0) {
			r.reach[n] = r.all[r.r.IntN(len(r.all))]
		}
		x := r.reach[n]
		if _, ok := made[x]; !ok {
			made[x] = r.compile(x)
		}
		in.Endpoints = append(in.Endpoints, firewall.Endpoint{Device: r.h.Device(n), Address: r.h.Address(n), Egress: made[x]})
	}
	rs, problems := firewall.Compile(in)
	if len(problems) > 0 {
		r.t.Fatal(problems)
	}
	rs.Log = firewall.Log{Egress: r.r.IntN(3) == 0}
	if err := r.engine.Enforce(context.Background(), rs); err != nil {
		r.t.Fatal(err)
	}
}

func (r *egress) compile(x *Reach) *firewall.Egress {
	e := &firewall.Egress{Deny: firewall.NewDeny(x.Deny), Open: x.Open}
	for _, rules := range x.Lists {
		l, problems := firewall.NewList(rules)
		if len(problems) > 0 {
			r.t.Fatal(problems)
		}
		e.Lists = append(e.Lists, l)
	}
	return e
}

// something returns a random reach.
func (r *egress) something() *Reach {
	if r.r.IntN(12) == 0 {
		return nil
	}
	x := &Reach{Open: r.r.IntN(10) == 0}
	for r.r.IntN(3) == 0 {
		x.Deny = append(x.Deny, netip.PrefixFrom(r.address(), 20+r.r.IntN(13)).Masked())
	}
	for range r.r.IntN(4) {
		var rules []secgroup.Rule
		for range r.r.IntN(12) {
			rules = append(rules, r.rule())
		}
		x.Lists = append(x.Lists, rules)
	}
	return x
}

// address returns one of few, or one beside it.
func (r *egress) address() netip.Addr {
	base := [][4]byte{{20, 0, 0, 0}, {20, 0, 0, 255}, {20, 0, 1, 0}, {20, 0, 1, 7}, {20, 0, 3, 255}, {172, 16, 0, 1}, {198, 51, 100, 9}}[r.r.IntN(7)]
	n := binary.BigEndian.Uint32(base[:]) + uint32(r.r.IntN(5)) - 2
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}

func (r *egress) port() uint16 { return ports[r.r.IntN(len(ports))] }

func (r *egress) rule() secgroup.Rule {
	x := secgroup.Rule{Protocol: []secgroup.Protocol{secgroup.All, secgroup.ICMP, secgroup.TCP, secgroup.TCP, secgroup.UDP, secgroup.UDP, 132, 47}[r.r.IntN(8)], Log: r.r.IntN(4) == 0}
	for len(x.Destinations) == 0 || r.r.IntN(3) == 0 {
		a, b := r.address(), r.address()
		switch r.r.IntN(6) {
		case 0:
			b = a
		case 1:
			a, b = netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255})
		}
		if b.Less(a) {
			a, b = b, a
		}
		x.Destinations = append(x.Destinations, secgroup.Range{First: a, Last: b})
	}
	switch x.Protocol {
	case secgroup.TCP, secgroup.UDP:
		for len(x.Ports) == 0 || r.r.IntN(3) == 0 {
			a, b := r.port(), r.port()
			if r.r.IntN(2) == 0 {
				b = a
			}
			x.Ports = append(x.Ports, policy.Ports{First: min(a, b), Last: max(a, b)})
		}
	case secgroup.ICMP:
		x.Type, x.Code = []int16{secgroup.Any, 0, 3, 8, 13, 255}[r.r.IntN(6)], []int16{secgroup.Any, 0, 0, 1, 255}[r.r.IntN(5)]
	}
	return x
}

func (r *egress) packet() secgroup.Packet {
	p := secgroup.Packet{Protocol: []secgroup.Protocol{secgroup.ICMP, secgroup.TCP, secgroup.TCP, secgroup.UDP, secgroup.UDP, 132, 47, 50}[r.r.IntN(8)], Destination: r.address()}
	switch p.Protocol {
	case secgroup.TCP, secgroup.UDP:
		p.Port = r.port()
	case secgroup.ICMP:
		p.Type, p.Code = []uint8{0, 3, 8, 8, 13, 77, 255}[r.r.IntN(7)], []uint8{0, 0, 1, 255}[r.r.IntN(4)]
	}
	return p
}

// batch sends packets and fails the test unless exactly those arrive that should.
func (r *egress) batch() {
	type expected struct {
		from int
		secgroup.Packet
		want bool
	}
	sent := map[uint32]expected{}
	for range inBatch {
		n := 1 + r.r.IntN(tester-1)
		p := r.packet()
		r.send(n, p)
		sent[r.number] = expected{n, p, r.reach[n].Allows(p)}
	}
	r.send(tester, secgroup.Packet{Protocol: secgroup.UDP, Destination: netip.AddrFrom4([4]byte{198, 51, 100, 200}), Port: watchPort})
	last, got := r.number, map[uint32]bool{}
	for deadline := time.Now().Add(10 * time.Second); !got[last]; {
		r.o.Hear(func(b []byte) { got[Number(b)] = true })
		if time.Now().After(deadline) {
			r.t.Fatal("a packet that may go everywhere did not arrive")
		}
	}
	for number, x := range sent {
		if got[number] != x.want {
			r.t.Fatalf("container %d, packet %+v: arrived %v, expected %v: it may reach %s", x.from, x.Packet, got[number], x.want, fmt.Sprintf("%+v", r.reach[x.from]))
		}
		if x.want {
			r.arrived++
		} else {
			r.refused++
		}
	}
}

func (r *egress) send(n int, p secgroup.Packet) {
	r.number++
	if err := r.h.SendIP(r.h.Device(n), Opening(r.h.Address(n), p, r.number)); err != nil {
		r.t.Fatal(err)
	}
}
