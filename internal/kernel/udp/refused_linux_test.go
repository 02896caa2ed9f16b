package udp_test

import (
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// inside returns a namespace whose loopback interface is up.
func inside(t *testing.T) *kernel.NS {
	t.Helper()
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	t.Cleanup(func() { ns.Close() })
	run(t, ns, "ip", "link", "set", "lo", "up")
	return ns
}

func run(t *testing.T, ns *kernel.NS, name string, args ...string) {
	t.Helper()
	if err := ns.Do(func() error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Logf("%s %v: %s", name, args, out)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestARuleThatRefusesOneAnswer (EPERM) is no reason for others to get none.
func TestARuleThatRefusesOneAnswer(t *testing.T) {
	ns := inside(t)
	var server *net.UDPConn
	clients := make([]*net.UDPConn, 5)
	if err := ns.Do(func() error {
		server = listen(t, "0.0.0.0:0")
		for i := range clients {
			clients[i] = client(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), local(server).Port()))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	run(t, ns, "nft", "table inet t { chain c { type filter hook output priority 0; udp dport { "+
		strconv.Itoa(int(local(clients[0]).Port()))+", "+strconv.Itoa(int(local(clients[3]).Port()))+" } drop; }; }")
	for _, c := range clients {
		write(t, c, "question")
	}
	b := newBatch(t, server, 8)
	unsent := 0
	for left := len(clients); left > 0; {
		n, err := b.Read()
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			b.Answer(i, []byte("answer"))
		}
		unsent += b.Send()
		left -= n
	}
	if unsent != 2 {
		t.Errorf("%d answers were not sent, want 2", unsent)
	}
	for _, i := range []int{1, 2, 4} {
		if got := read(t, clients[i]); got != "answer" {
			t.Errorf("client %d got %q", i, got)
		}
	}
}

// TestBothFamiliesAtOneSocket, as a supervisor may hand one over: answers leave from the address that was asked.
func TestBothFamiliesAtOneSocket(t *testing.T) {
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv6unspecified})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	b := newBatch(t, server, 8)
	for _, to := range []string{"127.0.0.1", "127.9.8.7", "::1"} {
		c := client(t, netip.AddrPortFrom(netip.MustParseAddr(to), local(server).Port()))
		write(t, c, "to "+to)
		take(t, b, 1, func(i int, text string) {
			if got, want := b.From(i).Unmap(), local(c).Addr(); got != want {
				t.Errorf("a question is from %v, want %v", got, want)
			}
			b.Answer(i, []byte("answer "+text))
		})
		if got, want := read(t, c), "answer to "+to; got != want {
			t.Errorf("answer %q, want %q", got, want)
		}
	}
}
