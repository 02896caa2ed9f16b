package firewalltest

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"golang.org/x/sys/unix"
)

// Network is the overlay of a World; its hosts have the subnets 10.255.1.0/24 and 10.255.2.0/24.
var Network = netip.MustParsePrefix("10.255.0.0/16")

// VTEP is the VXLAN device of each host.
const VTEP = "silk-vtep"

// World is two hosts joined by a wire, with containers. A container is one end of a veth pair in its host's box, a namespace
// without addresses: it hears everything and answers nothing by itself.
type World struct {
	t     testing.TB
	Hosts [2]*Host
}

// Host is a namespace that stands for a machine.
type Host struct {
	World *World
	NS    *kernel.NS
	Box   *kernel.NS
	index int
	ends  map[string]int // interface indexes in the box, by the device at the other end
	at    map[int]string // the inverse
	fd    int            // a packet socket in the box
}

// NewWorld makes a world with containers 1 to n on each host. It is gone when the test ends.
func NewWorld(t testing.TB, n int) *World {
	t.Helper()
	w := &World{t: t}
	for i := range w.Hosts {
		h := &Host{World: w, NS: newNS(t), Box: newNS(t), index: i, ends: map[string]int{}, at: map[int]string{}}
		w.Hosts[i] = h
		h.Shell(h.Box, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1; ip link set lo up")
		h.Shell(h.NS, `sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 net.ipv4.ip_forward=1 \
			net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv4.icmp_ratelimit=0; ip link set lo up`)
	}
	w.wire()
	for _, h := range w.Hosts {
		h.attach(n)
	}
	return w
}

func newNS(t testing.TB) *kernel.NS {
	t.Helper()
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

// Shell runs a script in a namespace and returns what it says.
func (h *Host) Shell(ns *kernel.NS, script string) string {
	h.World.t.Helper()
	var out []byte
	err := ns.Do(func() (err error) {
		cmd := exec.Command("sh", "-e")
		cmd.Stdin = strings.NewReader(script)
		out, err = cmd.CombinedOutput()
		return err
	})
	if errors.Is(err, exec.ErrNotFound) || bytes.Contains(out, []byte("not found\n")) && bytes.Contains(out, []byte("sh: ")) {
		testkit.Require(h.World.t, "tools", fmt.Errorf("%w: %s", err, out))
	}
	if err != nil {
		h.World.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// path names a namespace to programs that this process starts.
func path(ns *kernel.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", unix.Getpid(), ns.FD()) }

func (h *Host) underlay() string { return fmt.Sprintf("192.168.0.%d", h.index+1) }
func (h *Host) subnet() string   { return fmt.Sprintf("10.255.%d.0", h.index+1) }
func (h *Host) mac() string      { return fmt.Sprintf("ee:ee:0a:ff:%02x:00", h.index+1) }
func (h *Host) other() *Host     { return h.World.Hosts[1-h.index] }

// Address is that of the container with number n.
func (h *Host) Address(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 255, byte(h.index + 1), byte(n)})
}

// Device is the host's end of the container with address n.
func (h *Host) Device(n int) string { return fmt.Sprintf("s-010255%03d%03d", h.index+1, n) }

// wire joins the hosts: an underlay, and the VTEPs as overlay makes them.
func (w *World) wire() {
	a, b := w.Hosts[0], w.Hosts[1]
	a.Shell(a.NS, "ip link add under type veth peer name under netns "+path(b.NS))
	for _, h := range w.Hosts {
		o := h.other()
		h.Shell(h.NS, strings.Join([]string{
			"ip addr add " + h.underlay() + "/24 dev under", "ip link set under up",
			"ip link add " + VTEP + " address " + h.mac() + " mtu 1450 type vxlan id 1 local " + h.underlay() + " dstport 4789 nolearning gbp",
			"ip addr add " + h.subnet() + "/16 dev " + VTEP, "ip link set " + VTEP + " up",
			"ip route add " + o.subnet() + "/24 via " + o.subnet() + " dev " + VTEP + " src " + h.subnet(),
			"ip neigh add " + o.subnet() + " lladdr " + o.mac() + " dev " + VTEP + " nud permanent",
			"bridge fdb add " + o.mac() + " dev " + VTEP + " dst " + o.underlay() + " self permanent",
		}, "\n"))
	}
}

// attach makes containers 1 to n.
func (h *Host) attach(n int) {
	var s strings.Builder
	for i := 1; i <= n; i++ {
		d, a := h.Device(i), h.Address(i)
		fmt.Fprintf(&s, "ip link add %s address aa:aa:0a:ff:%02x:%02x mtu 1450 type veth peer name c%d address ee:ee:0a:ff:%02x:%02x mtu 1450 netns %s\n",
			d, h.index+1, i, i, h.index+1, i, path(h.Box))
		fmt.Fprintf(&s, "ip link set %s up\nip route add %v/32 dev %s\nip neigh add %v lladdr ee:ee:0a:ff:%02x:%02x dev %s nud permanent\n", d, a, d, a, h.index+1, i, d)
	}
	h.Shell(h.NS, s.String())
	s.Reset()
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&s, "ip link set c%d up\n", i)
	}
	h.Shell(h.Box, s.String())
	h.settle()
	h.open(n)
}

// settle waits until every device sends: the kernel drops what is to be sent by a veth until its work queue has noticed that the other end is up,
// which takes a while when much else makes devices.
func (h *Host) settle() {
	h.World.t.Helper()
	for _, ns := range []*kernel.NS{h.NS, h.Box} {
		h.Shell(ns, `for i in $(seq 500); do
			ip -o link show type veth | grep -qv " state UP " || break
			sleep 0.01
		done
		ip link set lo up # waits for the work that says so to be done`)
	}
}
