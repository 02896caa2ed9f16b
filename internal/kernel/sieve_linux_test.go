package kernel_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

// TestSieveKeepsBackWhatIsAboutTransientDevices and nothing else.
func TestSieveKeepsBackWhatIsAboutTransientDevices(t *testing.T) {
	ip, err := exec.LookPath("ip")
	testkit.Require(t, "tools", err)
	ns := netns.New(t)
	l, err := kernel.Listen(ns, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_NEIGH)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	heard := func(script string) (n int) {
		t.Helper()
		if err := ns.Do(func() error {
			cmd := exec.Command("sh", "-ec", script)
			cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "IP=" + ip}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s: %s", script, out)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := l.Poll(func(kernel.Message) { n++ }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if heard("$IP link set lo up; $IP link add t0 index 16777221 type bridge; $IP link set t0 up; $IP link add k0 type veth peer name k1; $IP link set k0 up; $IP link set k1 up") == 0 {
		t.Fatal("nothing was heard without a sieve")
	}
	testkit.Within(t, 10*time.Second, func() string { // the kernel takes up to a second to find and tell that both ends are up
		var out []byte
		err := ns.Do(func() (err error) {
			out, err = exec.Command(ip, "-br", "link", "show", "type", "veth").CombinedOutput()
			return err
		})
		if err != nil || strings.Count(string(out), " UP ") != 2 {
			return fmt.Sprintf("devices %s, %v", out, err)
		}
		return ""
	})
	heard("true") // what was told of that
	if err := l.Sieve(83); err != nil {
		t.Fatal(err)
	}
	for _, script := range []string{
		"$IP link set t0 mtu 1400",
		"$IP link add t1 index 16777216 type bridge; $IP link del t1",
		"$IP link add t1 index 33554431 type bridge; $IP link del t1",
		"$IP addr add 169.254.0.1 peer 10.1.1.2 dev t0 scope link; $IP addr del 169.254.0.1 peer 10.1.1.2 dev t0 scope link",
		"$IP neigh add 10.1.1.2 lladdr 02:00:00:00:00:01 dev t0 nud permanent; $IP neigh del 10.1.1.2 dev t0",
		"$IP route add 10.9.0.0/16 dev t0; $IP route del 10.9.0.0/16 dev t0",
	} {
		if n := heard(script); n != 0 {
			t.Errorf("%s: %d notifications, want none", script, n)
		}
	}
	loud := []string{
		"$IP link set k0 mtu 1400",
		"$IP link add t1 index 16777215 type bridge; $IP link del t1",
		"$IP link add t1 index 33554432 type bridge; $IP link del t1",
		"$IP addr add 10.3.3.3/32 dev t0",
		"$IP addr add 169.254.0.1 peer 10.1.1.2 dev k0 scope link",
		"$IP neigh add 10.1.1.9 lladdr 02:00:00:00:00:01 dev k0 nud permanent",
		"$IP route add 10.6.0.0/16 dev k0",
		"$IP route add 10.8.0.0/16 dev t0 proto 83",
		"$IP route add 10.7.0.0/16 nexthop dev t0 nexthop dev k0",
		"$IP route add blackhole 10.5.0.0/16",
	}
	for _, script := range loud {
		if heard(script) == 0 {
			t.Errorf("%s: not heard", script)
		}
	}
	if err := l.Unsieve(); err != nil {
		t.Fatal(err)
	}
	if heard("$IP link set t0 mtu 1410") == 0 {
		t.Error("not heard without the sieve")
	}
}
