package overlay_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestContainersAreNotHeard: the kernel keeps from the fabric what is about containers that come and go. It says how many notifications
// it has for whom that are not read (/proc/net/netlink).
func TestContainersAreNotHeard(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	h.set(example())
	h.f.Forget()
	h.set(example()) // reads what there is
	before := h.unread()
	h.sh(`for i in 1 2 3 4 5 6 7 8 9; do
		ip link add s-01025503000$i index $((16777216+i)) type bridge
		ip addr add 169.254.0.1 peer 10.255.30.$i/32 dev s-01025503000$i scope link
		ip link set s-01025503000$i up
		ip neigh add 10.255.30.$i lladdr ee:ee:0a:ff:1e:02 dev s-01025503000$i nud permanent
		ip link del s-01025503000$i; done`)
	if after := h.unread(); after != before {
		t.Errorf("containers came and went: %s, before %s", after, before)
	}
	h.sh("ip link add other0 type bridge")
	if after := h.unread(); after == before {
		t.Errorf("another device came: %s, want more unread", after)
	}
}

// unread returns how much there is to be read of notifications by whoever listens to several groups of rtnetlink.
func (h *host) unread() string {
	h.t.Helper()
	total := 0
	for line := range strings.Lines(h.sh("cat /proc/net/netlink")) {
		var at, rest string
		var proto, pid, groups, used int
		if n, _ := fmt.Sscanf(line, "%s %d %d %x %d %s", &at, &proto, &pid, &groups, &used, &rest); n == 6 && proto == 0 && groups != 0 {
			total += used
		}
	}
	return fmt.Sprint(total)
}

// TestLowerDeviceNumberedAsAContainers: then everything is heard.
func TestLowerDeviceNumberedAsAContainers(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	h.sh("ip link add lower9 index 16777299 type veth peer name peer9; ip link set lower9 up; ip link set peer9 up; ip addr add 10.0.16.15/24 dev lower9; ip addr flush dev eth0")
	h.keep(example())
	whole := func() string { return h.toDo(example()) }
	testkit.Within(t, 10*time.Second, whole)
	if link := h.sh("ip -d link show silk-vtep"); !strings.Contains(link, "dev lower9") {
		t.Fatalf("the VTEP is not on the other device: %s", link)
	}
	h.sh("ip link set lower9 mtu 1300")
	testkit.Within(t, patience, whole)
	if link := h.sh("ip link show silk-vtep"); !strings.Contains(link, "mtu 1250") {
		t.Errorf("the MTU was not followed: %s", link)
	}
}
