package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
)

// world is two hosts with containers a1 and a2 on one, b1 on the other, as reference measurements of container networks have them: hosts joined by a veth
// of MTU 1500, containers with a /32 behind a veth of their own, between the hosts VXLAN with a route, a neighbour and a
// forwarding entry. All of it is in one kernel, so a packet between the hosts costs what it costs both of them.
type world struct {
	hosts      [2]*kernel.NS
	containers map[string]*kernel.NS
}

var (
	overlayNet = netip.MustParsePrefix("10.255.0.0/16")
	addresses  = map[string]netip.Addr{"a1": netip.MustParseAddr("10.255.1.1"), "a2": netip.MustParseAddr("10.255.1.2"), "b1": netip.MustParseAddr("10.255.2.1"),
		outside: netip.MustParseAddr("203.0.113.2")}
)

const vtep = "silk-vtep"

// leases are those of the hosts, in order.
var leases = []lease.Lease{leaseOf(1), leaseOf(2)}

func leaseOf(host byte) lease.Lease {
	subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, host, 0}), 24)
	return lease.Lease{Underlay: netip.AddrFrom4([4]byte{192, 168, 0, host}), Subnet: subnet, MAC: lease.MACOf(subnet)}
}

func hostOf(container string) int { return int(container[0] - 'a') }

func deviceOf(container string) string {
	a := addresses[container].As4()
	return fmt.Sprintf("s-%03d%03d%03d%03d", a[0], a[1], a[2], a[3])
}

func endpointOf(container string) firewall.Endpoint {
	return firewall.Endpoint{Device: deviceOf(container), Address: addresses[container], Group: groupOf(tags[container])}
}

func newWorld(ctx context.Context) (w *world, err error) {
	w = &world{containers: map[string]*kernel.NS{}}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	quiet := "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 net.ipv4.tcp_max_tw_buckets=0 " +
		"net.ipv4.ip_local_port_range='1024 65000'\nip link set lo up\n"
	for i := range w.hosts {
		if w.hosts[i], err = kernel.NewNS(); err != nil {
			return w, err
		}
		if err := shell(w.hosts[i], quiet+"sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0\n"); err != nil {
			return w, err
		}
	}
	if err := w.wire(ctx); err != nil {
		return w, err
	}
	for name := range addresses {
		if w.containers[name], err = kernel.NewNS(); err != nil {
			return w, err
		}
		attach := w.attach
		if name == outside {
			attach = func(string) error { return w.leadOut() }
		}
		if err := errors.Join(shell(w.containers[name], quiet), attach(name)); err != nil {
			return w, err
		}
	}
	return w, nil
}

func (w *world) close() {
	for _, ns := range w.hosts {
		if ns != nil {
			ns.Close()
		}
	}
	for _, ns := range w.containers {
		ns.Close()
	}
}

func path(ns *kernel.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

// wire joins the hosts and makes the VTEP, the paths and the guard of each as the daemon does.
func (w *world) wire(ctx context.Context) error {
	if err := shell(w.hosts[0], "ip link add under mtu 1500 type veth peer name under netns "+path(w.hosts[1])); err != nil {
		return err
	}
	for i, ns := range w.hosts {
		if err := shell(ns, fmt.Sprintf("ip addr add %v/24 dev under; ip link set under up", leases[i].Underlay)); err != nil {
			return err
		}
		if err := weave(ctx, ns, leases[i]); err != nil {
			return err
		}
	}
	return nil
}

// weave makes the overlay of a host.
func weave(ctx context.Context, ns *kernel.NS, local lease.Lease) error {
	f, err := overlay.Open(ns)
	if err != nil {
		return err
	}
	defer f.Close() // what was set stays
	_, err = f.Set(ctx, overlay.Config{Device: vtep, VNI: 1, Port: 4789, Underlay: local.Underlay, Network: overlayNet, Local: local, Peers: leases})
	return err
}

func (w *world) attach(name string) error {
	device, a := deviceOf(name), addresses[name]
	b := a.As4()
	host, inner := fmt.Sprintf("aa:aa:0a:ff:%02x:%02x", b[2], b[3]), fmt.Sprintf("ee:ee:0a:ff:%02x:%02x", b[2], b[3])
	err := shell(w.hosts[hostOf(name)], fmt.Sprintf(`ip link add %[1]s address %[2]s mtu 1450 type veth peer name eth0 address %[3]s mtu 1450 netns %[4]s
		ip addr add 169.254.0.1/32 dev %[1]s
		ip link set %[1]s up
		ip route add %[5]v/32 dev %[1]s
		ip neigh add %[5]v lladdr %[3]s dev %[1]s nud permanent`, device, host, inner, path(w.containers[name]), a))
	if err != nil {
		return err
	}
	return shell(w.containers[name], fmt.Sprintf(`ip addr add %[1]v/32 dev eth0
		ip link set eth0 up
		ip route add 169.254.0.1 dev eth0 scope link
		ip route add default via 169.254.0.1 dev eth0
		ip neigh add 169.254.0.1 lladdr %[2]s dev eth0 nud permanent`, a, host))
}

func shell(ns *kernel.NS, script string) error {
	return ns.Do(func() error {
		cmd := exec.Command("sh", "-e")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// forget empties the table of connections of both hosts.
func (w *world) forget() error {
	for _, ns := range w.hosts {
		if err := ns.Do(func() error {
			c, err := kernel.OpenConntrack()
			if err != nil || c == nil {
				return err
			}
			defer c.Close()
			return c.FlushAll(func(netip.Addr) bool { return true })
		}); err != nil {
			return err
		}
	}
	return nil
}
