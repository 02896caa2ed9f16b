package kernel_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestFind makes connections by hand: plain, sent on to another address and port, from a translated source, and one that goes the other way.
func TestFind(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	ns := netns.New(t)
	table, err := kernel.DialConntrack(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	for _, args := range []string{
		"-p tcp -s 10.255.30.2 -d 10.255.30.3 -r 10.255.30.3 -q 10.255.30.2 --sport 1001 --dport 443 --reply-port-src 443 --reply-port-dst 1001 --state ESTABLISHED -u ASSURED -m 7",
		"-p tcp -s 10.255.30.2 -d 10.0.16.15 -r 10.255.30.4 -q 10.255.30.2 --sport 1002 --dport 61001 --reply-port-src 8080 --reply-port-dst 1002 --state ESTABLISHED -u ASSURED -m 0x50008",
		"-p udp -s 10.255.30.6 -d 10.255.30.3 -r 10.255.30.3 -q 169.254.0.1 --sport 1003 --dport 53 --reply-port-src 53 --reply-port-dst 2003 -m 9",
		"-p tcp -s 10.255.30.3 -d 10.255.30.2 -r 10.255.30.2 -q 10.255.30.3 --sport 444 --dport 1001 --reply-port-src 1001 --reply-port-dst 444 --state ESTABLISHED -u ASSURED -m 10",
	} {
		if err := ns.Do(func() error { return exec.Command(tool, strings.Fields("-I -t 600 "+args)...).Run() }); err != nil {
			t.Fatalf("conntrack %s: %v", args, err)
		}
	}
	var each sync.WaitGroup
	for _, tt := range []struct {
		protocol uint8
		from, to string
		want     uint32 // mark; 0: not found
	}{
		{6, "10.255.30.2:1001", "10.255.30.3:443", 7},
		{6, "10.255.30.2:1002", "10.255.30.4:8080", 0x50008},
		{6, "10.255.30.2:1002", "10.0.16.15:61001", 0}, // as who began it sees it
		{17, "169.254.0.1:2003", "10.255.30.3:53", 9},
		{17, "10.255.30.6:1003", "10.255.30.3:53", 0},
		{6, "10.255.30.3:444", "10.255.30.2:1001", 10},
		{6, "10.255.30.2:1001", "10.255.30.3:444", 0}, // the other one began it
		{17, "10.255.30.2:1001", "10.255.30.3:443", 0},
		{6, "10.255.30.2:1001", "10.255.30.3:445", 0},
		{6, "[::1]:1001", "[::1]:443", 0},
	} {
		each.Go(func() {
			for range 50 {
				f, found, err := table.Find(tt.protocol, netip.MustParseAddrPort(tt.from), netip.MustParseAddrPort(tt.to))
				if err != nil || found != (tt.want != 0) || f.Mark != tt.want {
					t.Errorf("%d %s to %s: %+v, %v, %v, want mark %#x", tt.protocol, tt.from, tt.to, f, found, err, tt.want)
					return
				}
			}
		})
	}
	each.Wait()
	var none *kernel.Conntrack
	if _, found, err := none.Find(6, netip.MustParseAddrPort("10.255.30.2:1001"), netip.MustParseAddrPort("10.255.30.3:443")); found || err != nil {
		t.Errorf("an empty table: %v, %v", found, err)
	}
}
