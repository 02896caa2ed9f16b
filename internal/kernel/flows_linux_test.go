package kernel_test

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestFlows makes connections by hand: plain ones, and one that was sent on to another address and port.
func TestFlows(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	ns := netns.New(t)
	run := func(args string) string {
		t.Helper()
		var out []byte
		if err := ns.Do(func() (err error) {
			out, err = exec.Command(tool, strings.Fields(args)...).CombinedOutput()
			return err
		}); err != nil {
			t.Fatalf("conntrack %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("-I -p udp -s 10.255.30.2 -d 10.255.30.3 -r 10.255.30.3 -q 10.255.30.2 --sport 1001 --dport 53 --reply-port-src 53 --reply-port-dst 1001 -t 600 -m 7")
	run("-I -p tcp -s 10.255.30.2 -d 10.0.16.15 -r 10.255.30.4 -q 10.255.30.2 --sport 1002 --dport 61001 --reply-port-src 8080 --reply-port-dst 1002 -t 600 --state ESTABLISHED -u ASSURED -m 0x50007")
	run("-I -p udp -s 10.255.30.5 -d 10.255.30.3 -r 10.255.30.3 -q 10.255.30.5 --sport 1003 --dport 53 --reply-port-src 53 --reply-port-dst 1003 -t 600 -m 8")
	run("-I -p udp -s 10.255.30.6 -d 10.255.30.3 -r 10.255.30.3 -q 10.255.30.6 --sport 1004 --dport 53 --reply-port-src 53 --reply-port-dst 1004 -t 600")
	var table *kernel.Conntrack
	if err := ns.Do(func() (err error) { table, err = kernel.OpenConntrack(); return err }); err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	any := func(kernel.Flow) bool { return true }
	list := func(mark, mask uint32) []kernel.Flow {
		t.Helper()
		flows, err := table.Flows(mark, mask, any, 1000)
		if err != nil {
			t.Fatal(err)
		}
		return flows
	}
	if one, err := table.Flows(0, 0, any, 1); len(one) != 1 || err != nil {
		t.Errorf("at most one: %+v, %v", one, err)
	}
	if all := list(0, 0); len(all) != 3 {
		t.Errorf("%d connections have marks: %+v", len(all), all)
	}
	seven := list(7, 0xffff)
	if len(seven) != 2 {
		t.Fatalf("%d connections are marked 7: %+v", len(seven), seven)
	}
	for _, f := range seven {
		want := kernel.Flow{Mark: 7, Protocol: 17, From: netip.MustParseAddrPort("10.255.30.2:1001"), Server: netip.MustParseAddrPort("10.255.30.3:53")}
		if f.Protocol == 6 {
			want = kernel.Flow{Mark: 0x50007, Protocol: 6, From: netip.MustParseAddrPort("10.255.30.2:1002"), Server: netip.MustParseAddrPort("10.255.30.4:8080")}
		}
		if f.Mark != want.Mark || f.Protocol != want.Protocol || f.From != want.From || f.Server != want.Server {
			t.Errorf("%+v, expected %+v", f, want)
		}
	}
	kernel.Settle()
	for range 2 { // what is gone already is no error
		if err := table.Forget(seven); err != nil {
			t.Fatal(err)
		}
	}
	if got := run("-L"); strings.Contains(got, "sport=1001") || strings.Contains(got, "sport=1002") || !strings.Contains(got, "sport=1003") || !strings.Contains(got, "sport=1004") {
		t.Errorf("left:\n%s", got)
	}
	var none *kernel.Conntrack
	if _, err := none.Flows(0, 0, any, 1); errors.Join(err, none.Forget(seven)) != nil {
		t.Errorf("an empty table: %v", err)
	}
}
