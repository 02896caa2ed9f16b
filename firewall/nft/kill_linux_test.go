package nft_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

// writerMode makes this program the writer that TestKilledAtRandomInstants kills.
const writerMode = "SILK_TEST_NFT_WRITER"

func TestMain(m *testing.M) {
	if os.Getenv(writerMode) != "" {
		if err := write(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// killed are the rulesets that the writer goes to and fro between: in all but the first container 1 of host 0 may send container 2, and 198.51.100.1, udp 80 and 90 to 99.
// Some are large enough for several transactions.
func killed() []firewall.Ruleset {
	out := []firewall.Ruleset{{Network: firewalltest.Network, VTEP: firewalltest.VTEP}}
	for i := range 4 {
		in := firewall.Input{Network: firewalltest.Network, VTEP: firewalltest.VTEP, Rules: []policy.Rule{
			rule(1, 2, policy.UDP, 80, 80), rule(1, 2, policy.UDP, 90, 99),
		}}
		for n := range byte(3) {
			in.Endpoints = append(in.Endpoints, firewall.Endpoint{
				Device: fmt.Sprintf("s-010255001%03d", n+1), Address: netip.AddrFrom4([4]byte{10, 255, 1, n + 1}), Group: group(identity.Tag((n + 1) % 3))})
		}
		reach := []secgroup.Rule{to(secgroup.UDP, "198.51.100.1", "198.51.100.1", 80, 80, 90, 99)}
		for j := range i * 2000 {
			a := fmt.Sprintf("20.0.%d.%d", j/256, j%256)
			reach = append(reach, to(secgroup.UDP, a, a, uint16(1+j), uint16(1+j)))
		}
		l, _ := firewall.NewList(reach)
		in.Endpoints[0].Egress = &firewall.Egress{Lists: []*firewall.List{l}}
		for j := range i * 6000 {
			tag := identity.Tag(3 + j%9000)
			in.Rules = append(in.Rules, rule(tag, identity.Tag(1+j%2), policy.TCP, uint16(1000+j/9000*10), uint16(1000+j/9000*10+j%9%2*5)))
		}
		rs, _ := firewall.Compile(in)
		out = append(out, rs)
	}
	return out
}

// write changes the table of its namespace until it is killed.
func write() error {
	all := killed()
	for {
		table, err := nft.Open(nil, nft.Options{Unowned: rand.IntN(4) == 0})
		if err != nil {
			return err
		}
		fmt.Println("open")
		for range 1 + rand.IntN(20) {
			if _, err := table.Set(context.Background(), all[rand.IntN(len(all))]); err != nil {
				return err
			}
		}
		if err := table.Close(); err != nil {
			return err
		}
	}
}

// TestKilledAtRandomInstants kills a writer again and again while it changes the table, and packets come without pause: what is allowed is, what
// is not is not, and the next writer leaves the table as it should be.
func TestKilledAtRandomInstants(t *testing.T) {
	f := newFleet(t, nft.Options{Unowned: true})
	f.tables[0].Close()
	h, all := f.w.Hosts[0], killed()
	o := firewalltest.NewOutside(h)
	sent, arrived, outside := 0, map[uint16]int{}, map[uint16]int{}
	out := func(port uint16) {
		if err := h.SendIP(h.Device(1), firewalltest.Opening(h.Address(1), packetTo(secgroup.UDP, "198.51.100.1", port), uint32(sent))); err != nil {
			t.Fatal(err)
		}
	}
	hear := func() {
		o.Hear(func(b []byte) { outside[binary.BigEndian.Uint16(b[22:])]++ })
		if err := h.Hear(func(p firewalltest.Packet) { arrived[p.Port]++ }); err != nil {
			t.Fatal(err)
		}
	}
	for i := range rounds(20) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), writerMode+"=1")
		says, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.NS.Do(cmd.Start); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(says)
		if line, err := lines.ReadString('\n'); line != "open\n" {
			t.Fatalf("the writer says %q, %v", line, err)
		}
		end := time.After(rand.N(80 * time.Millisecond))
		for running := true; running; sent++ {
			select {
			case <-end:
				running = false
			default:
			}
			if err := h.Send(f.packet(1, 0, 2, policy.UDP, 81), false); err != nil {
				t.Fatal(err)
			}
			out(81)
		}
		cmd.Process.Kill()
		if rest, _ := io.ReadAll(lines); strings.Trim(string(rest), "open\n") != "" {
			t.Fatalf("the writer says %s", rest)
		}
		cmd.Wait()
		hear()
		table, err := nft.Open(h.NS, nft.Options{})
		if err != nil {
			t.Fatal(err)
		}
		rs := all[1+rand.IntN(len(all)-1)]
		set(t, table, rs)
		holds(t, table, rs)
		if err := h.Send(f.packet(1, 0, 2, policy.UDP, 95), false); err != nil {
			t.Fatal(err)
		}
		out(95)
		testkit.Within(t, 2*time.Second, func() string {
			if hear(); arrived[95] <= i || outside[95] <= i {
				return "what is allowed does not arrive"
			}
			return ""
		})
		if left := h.Shell(h.NS, "nft list tables"); strings.Contains(left, "standin") {
			t.Fatalf("left: %s", left)
		}
		if err := table.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if outside[81] > 0 {
		t.Errorf("%d of %d packets that no list allows passed to the outside", outside[81], sent)
	}
	if arrived[81] > 0 {
		t.Errorf("%d of %d packets that no policy allows passed", arrived[81], sent)
	}
	t.Logf("%d packets", sent)
}
