package kernel

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"
)

// TestFlushListed is what kernels before 6.11 get.
func TestFlushListed(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	if err != nil {
		t.Skip(err) // TestFlushConntrackDeletesOnlyTheAddress says whether that is deserved
	}
	ns, err := NewNS()
	if err != nil {
		t.Skip(err) // likewise
	}
	defer ns.Close()
	if err := ns.Do(func() error {
		for _, e := range []string{"10.255.30.2 192.0.2.1 1001", "10.255.30.3 10.255.30.2 1002", "10.255.30.3 192.0.2.1 1003"} {
			f := strings.Fields(e)
			if out, err := exec.Command(tool, "-I", "-p", "udp", "-s", f[0], "-d", f[1], "-r", f[1], "-q", f[0], "--sport", f[2], "--dport", "53", "--reply-port-src", "53", "--reply-port-dst", f[2], "-t", "600").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		table, err := OpenConntrack()
		if err != nil {
			return err
		}
		defer table.Close()
		ours := netip.MustParseAddr("10.255.30.2")
		for _, tuple := range []uint16{ctaTupleOrig, ctaTupleReply} {
			if err := table.c.flushListed(ours, tuple, func(a netip.Addr) bool { return a == ours }); err != nil {
				t.Error(err)
			}
		}
		out, err := exec.Command(tool, "-L").Output()
		if got := string(out); strings.Contains(got, "sport=1001") || strings.Contains(got, "sport=1002") || !strings.Contains(got, "sport=1003") {
			t.Errorf("left:\n%s", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
