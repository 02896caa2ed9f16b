package kernel_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestFlushConntrackDeletesOnlyTheAddress makes entries by hand: as client, as server, as target of a port map, of others.
func TestFlushConntrackDeletesOnlyTheAddress(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	ns := netns.New(t)
	run := func(args ...string) string {
		t.Helper()
		var out []byte
		if err := ns.Do(func() error {
			var err error
			out, err = exec.Command(tool, args...).CombinedOutput()
			return err
		}); err != nil {
			t.Fatalf("conntrack %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	entry := func(src, dst, rsrc, rdst, port string) {
		run("-I", "-p", "udp", "-s", src, "-d", dst, "-r", rsrc, "-q", rdst, "--sport", port, "--dport", "53", "--reply-port-src", "53", "--reply-port-dst", port, "-t", "600")
	}
	const ours, peer, host, far = "10.255.30.2", "10.255.30.3", "10.0.16.5", "192.0.2.1"
	flush := func() {
		t.Helper()
		if err := ns.Do(func() error { return kernel.FlushConntrack(netip.MustParseAddr(ours)) }); err != nil {
			t.Fatal(err)
		}
	}
	flush()
	entry(ours, far, far, host, "1001")   // masqueraded client
	entry(peer, ours, ours, peer, "1002") // server
	entry(far, host, ours, far, "1003")   // behind a port map
	entry(peer, far, far, host, "1004")
	entry(far, peer, peer, far, "1005")
	flush()
	got := run("-L", "-p", "udp")
	for port, want := range map[string]bool{"1001": false, "1002": false, "1003": false, "1004": true, "1005": true} {
		if is := strings.Contains(got, "sport="+port); is != want {
			t.Errorf("entry with port %s is there: %v, want %v\n%s", port, is, want, got)
		}
	}
}
