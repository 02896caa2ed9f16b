package overlay_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/overlay"
	"golang.org/x/sys/unix"
)

// TestUnderlayCannotClaimOverlaySource sends plain packets with a source in the overlay over the underlay: whoever is not
// allowed to send VXLAN could otherwise do without it.
func TestUnderlayCannotClaimOverlaySource(t *testing.T) {
	hosts := segment(t, 3)
	victim, stranger := hosts[1], hosts[2]
	victim.set(member(2, 2))
	victim.sh(`sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0
		nft add table inet t; nft 'add chain inet t after { type filter hook prerouting priority -200; }'; nft add rule inet t after iifname eth0 ip daddr 10.255.2.7 counter comment after`)
	stranger.sh("ip addr add 10.255.1.7/32 dev lo; ip route add 10.255.2.0/24 via 10.0.16.2")
	stranger.send("10.0.16.3:0", "10.255.2.7:9", []byte("x"))
	testkit.Within(t, 3*time.Second, func() string { // other sources are not the guard's business
		if n := victim.count("t", `"after"`); n != 1 {
			return fmt.Sprintf("%d packets with an underlay source arrived", n)
		}
		return ""
	})
	stranger.send("10.255.1.7:0", "10.255.2.7:9", []byte("x"))
	stranger.send("10.0.16.3:0", "10.255.2.7:9", []byte("x"))
	testkit.Within(t, 3*time.Second, func() string {
		if n := victim.count("t", `"after"`); n < 2 {
			return fmt.Sprintf("%d packets arrived", n)
		}
		return ""
	})
	if n := victim.count("t", `"after"`); n != 2 {
		t.Error("a packet that claims an overlay source got in without VXLAN")
	}
}

// TestScanLeavesNoNeighbourThatWaits sends to overlay addresses that nobody leased, as a container may by the thousand. An
// entry of the neighbour table that waits for an answer cannot be taken for another use, and the table is the whole machine's.
func TestScanLeavesNoNeighbourThatWaits(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	h.send(":0", "10.255.77.1:9", []byte("x")) // nobody has it, and nobody will answer
	out := h.sh("ip neigh show nud all dev silk-vtep to 10.255.77.1")
	if strings.Contains(out, "INCOMPLETE") {
		t.Errorf("the kernel asks for it: %s", out)
	}
	h.sh("sysctl -qw net.ipv4.neigh.silk-vtep.mcast_solicit=3")
	h.f.Forget()
	h.set(example())
	h.holds(example())
	if out := h.sh("cat /proc/sys/net/ipv4/neigh/silk-vtep/mcast_solicit"); out != "0\n" {
		t.Errorf("it was not repaired: %s", out)
	}
}

// TestNoPortOpensWithoutItsGuard has another program own the table: the guard cannot be written.
func TestNoPortOpensWithoutItsGuard(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	owner, err := kernel.DialNetfilter(h.ns)
	if err != nil {
		t.Fatal(err)
	}
	release := sync.OnceFunc(func() { owner.Close() })
	defer release()
	var b kernel.Batch
	b.Add(kernel.NFTables(unix.NFT_MSG_NEWTABLE), unix.NLM_F_CREATE, kernel.NFGen(unix.NFPROTO_INET))
	b.String(unix.NFTA_TABLE_NAME, overlay.Table)
	b.Attr(unix.NFTA_TABLE_FLAGS, []byte{0, 0, 0, 2}) // NFT_TABLE_F_OWNER, 5.12
	if err := owner.Transact(&b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.f.Set(context.Background(), example()); err == nil {
		t.Error("Set did not say that the guard is missing")
	}
	if out, err := h.try("ip link show silk-vtep up | grep ."); err == nil {
		t.Errorf("the VXLAN port is open to everybody: %s", out)
	}
	release() // its table goes with it
	h.set(example())
	h.holds(example())
}

// TestDeviceInAnotherNamespaceIsNamed moves the VTEP away: it keeps the VNI of the host that it was made on.
func TestDeviceInAnotherNamespaceIsNamed(t *testing.T) {
	h, other := newHost(t, "10.0.16.15"), &host{t: t, ns: netns.New(t)}
	h.set(example())
	h.sh(fmt.Sprintf("ip link set silk-vtep netns /proc/%d/fd/%d", pid(), other.ns.FD()))
	_, err := h.f.Set(context.Background(), example())
	if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("got %v", err)
	}
	other.sh("ip link del silk-vtep")
	h.set(example())
	h.holds(example())
}

// TestFragmentsCannotInjectVXLAN sends, from a container, packets to the VXLAN port that leave it in fragments, of which only
// the first tells the port.
func TestFragmentsCannotInjectVXLAN(t *testing.T) {
	hosts := segment(t, 2)
	for i, h := range hosts {
		h.set(member(i+1, 2))
	}
	home := hosts[0]
	home.countArrivals()
	container := &host{t: t, ns: netns.New(t)}
	home.sh(fmt.Sprintf(`ip link add s-010255001007 type veth peer name c0; ip link set s-010255001007 up; ip addr add 169.254.0.1 peer 10.255.1.7/32 dev s-010255001007
		ip link set c0 netns /proc/%d/fd/%d`, pid(), container.ns.FD()))
	container.sh("ip link set c0 up mtu 600; ip addr add 10.255.1.7 peer 169.254.0.1/32 dev c0; ip route add default via 169.254.0.1")
	packet := append(encapsulated(member(1, 2).Local.MAC, 5, "10.255.2.7", "10.255.1.0"), make([]byte, 1500)...)
	for i, to := range []string{"10.0.16.1:4789", "169.254.0.1:4789"} {
		container.send("10.255.1.7:0", to, packet)
		testkit.Within(t, 3*time.Second, func() string {
			if n := home.count("silk", `"s-*"`); n != i+1 {
				return fmt.Sprintf("to %s: %d first fragments dropped, want %d", to, n, i+1)
			}
			return ""
		})
	}
	container.send("10.255.1.7:0", "169.254.0.1:9", packet) // what followed the first ones has arrived when this has
	testkit.Within(t, 3*time.Second, func() string {
		if out := home.sh("grep ^Udp: /proc/net/snmp | tail -1"); strings.Fields(out)[2] == "0" { // NoPorts
			return "the packet to another port did not arrive whole"
		}
		return ""
	})
	if n := home.count("t", `"before"`); n != 0 {
		t.Errorf("%d packets were injected", n)
	}
}

// TestContainersCannotClaimAnothersSource sends packets with the address of another container, on a host whose administrator
// set the reverse path filter of all devices to loose.
func TestContainersCannotClaimAnothersSource(t *testing.T) {
	home := segment(t, 1)[0]
	home.set(member(1, 1))
	home.sh(`sysctl -qw net.ipv4.conf.all.rp_filter=2
		nft add table inet t; nft 'add chain inet t after { type filter hook prerouting priority -200; }'; nft add rule inet t after udp dport 9 counter comment after`)
	containers := make([]*host, 3)
	for i, device := range []string{"s-010255001007", "s-010255001008", "s-another"} { // the last is not known by its name
		c := &host{t: t, ns: netns.New(t)}
		containers[i] = c
		a := fmt.Sprintf("10.255.1.%d", 7+i)
		home.sh(fmt.Sprintf(`ip link add %s type veth peer name c0; ip link set %s up; ip addr add 169.254.0.1 peer %s/32 dev %s
			sysctl -qw net.ipv4.conf.%s.rp_filter=1; ip link set c0 netns /proc/%d/fd/%d`, device, device, a, device, device, pid(), c.ns.FD()))
		c.sh(fmt.Sprintf("ip link set lo up; ip link set c0 up; ip addr add %s peer 169.254.0.1/32 dev c0; ip route add default via 169.254.0.1", a))
	}
	for i, x := range []struct{ from, theirs, own int }{{0, 8, 7}, {0, 9, 7}, {0, 77, 7}, {2, 8, 9}, {2, 77, 9}} {
		c := containers[x.from]
		c.sh(fmt.Sprintf("ip addr replace 10.255.1.%d/32 dev lo", x.theirs))
		c.send(fmt.Sprintf("10.255.1.%d:0", x.theirs), "169.254.0.1:9", []byte("x"))
		c.send(fmt.Sprintf("10.255.1.%d:0", x.own), "169.254.0.1:9", []byte("x")) // what came before it has arrived when this has
		testkit.Within(t, 3*time.Second, func() string {
			if n := home.count("t", `"after"`); n <= i {
				return fmt.Sprintf("container %d's own source was not let through", x.from)
			}
			return ""
		})
		if n := home.count("t", `"after"`); n != i+1 {
			t.Fatalf("container %d sent with the source 10.255.1.%d", x.from, x.theirs)
		}
	}
}
