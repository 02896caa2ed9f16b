package kernel_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// logged makes a namespace whose rules log what is sent to 127.0.0.1 by udp, to port 9.
func logged(t *testing.T) *kernel.NS {
	t.Helper()
	tool, err := exec.LookPath("nft")
	testkit.Require(t, "nft", err)
	ns := netns.New(t)
	if err := ns.Do(func() error {
		if err := exec.Command("ip", "link", "set", "lo", "up").Run(); err != nil {
			return err
		}
		cmd := exec.Command(tool, "-f", "-")
		cmd.Stdin = strings.NewReader(`table inet t {
			chain c { type filter hook output priority 0;
				ct state new udp dport 9 mark set 0x20007 log prefix "silk ok c2c " group 4700 snaplen 96
				ct state established accept
			}
		}`)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Logf("%s", out)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return ns
}

// send sends n datagrams to 127.0.0.1:9, where nobody answers.
func send(t *testing.T, ns *kernel.NS, n int) {
	t.Helper()
	if err := ns.Do(func() error {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer c.Close()
		for range n {
			if _, err := c.WriteTo([]byte("hello"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestPacketLog(t *testing.T) {
	ns := logged(t)
	l, err := kernel.OpenPacketLog(ns, 4700)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := kernel.OpenPacketLog(ns, 4700); !errors.Is(err, fault.Conflict) {
		t.Errorf("a second listener: %v", err)
	}
	send(t, ns, 1)
	var got []kernel.LoggedPacket
	if err := l.Read(func(p kernel.LoggedPacket) { p.Data = bytes.Clone(p.Data); got = append(got, p) }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Prefix != "silk ok c2c " || got[0].Mark != 0x20007 || got[0].Out != 1 || len(got[0].Data) != 20+8+5 || !bytes.HasSuffix(got[0].Data, []byte("hello")) {
		t.Errorf("logged: %+v", got)
	}
}

// TestPacketLogIsNeverWaitedFor: who does not read delays nobody, and learns how much it has missed.
func TestPacketLogIsNeverWaitedFor(t *testing.T) {
	ns := logged(t)
	l, err := kernel.OpenPacketLog(ns, 4700)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const many = 300_000 // of some 200 bytes each: twice what there is room for
	send(t, ns, many)
	send(t, ns, 1)
	got := 0
	testkit.Within(t, 20*time.Second, func() string {
		if err := l.Read(func(kernel.LoggedPacket) { got++ }); err != nil {
			t.Fatal(err)
		}
		if uint64(got)+l.Lost() < many {
			send(t, ns, 1) // what comes after a gap tells of it
			return "not all are accounted for"
		}
		return ""
	})
	if l.Lost() == 0 || got == 0 {
		t.Errorf("%d read, %d lost", got, l.Lost())
	}
	t.Logf("%d read, %d lost", got, l.Lost())
}

func TestFlowEnds(t *testing.T) {
	tool, err := exec.LookPath("conntrack")
	testkit.Require(t, "conntrack", err)
	ns := logged(t)
	var timeouts kernel.FlowTimeouts
	if err := ns.Do(func() error {
		timeouts = kernel.ReadFlowTimeouts()
		return errors.Join(kernel.SetSysctl("net/netfilter/nf_conntrack_acct", "1"), kernel.SetSysctl("net/netfilter/nf_conntrack_timestamp", "1"))
	}); err != nil {
		t.Fatal(err)
	}
	if timeouts.TCP[7] == 0 || timeouts.UDP == 0 || timeouts.UDPStream == 0 || timeouts.ICMP == 0 || timeouts.Other == 0 {
		t.Errorf("timeouts: %+v", timeouts)
	}
	f, err := kernel.OpenFlowEnds(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := time.Now().Add(-time.Second)
	exchange(t, ns)
	if err := ns.Do(func() error { return exec.Command(tool, "-D", "-p", "tcp").Run() }); err != nil {
		t.Fatal(err)
	}
	var ends []kernel.FlowEnd
	if err := f.Read(func(e kernel.FlowEnd) { ends = append(ends, e) }); err != nil {
		t.Fatal(err)
	}
	if len(ends) != 1 {
		t.Fatalf("ends: %+v", ends)
	}
	e := ends[0]
	if e.Protocol != 6 || e.Server != netip.MustParseAddrPort("127.0.0.1:7777") || e.From.Addr() != netip.MustParseAddr("127.0.0.1") || e.TCPState != 7 ||
		e.Sent.Bytes < 1000 || e.Heard.Bytes > 900 || e.Heard.Packets == 0 || e.Begun.Before(before) || e.Ended.After(time.Now().Add(time.Second)) || e.Left == 0 {
		t.Errorf("end: %+v", e)
	}
	if last := timeouts.LastPacket(e); last.Before(e.Begun) || last.After(e.Begun.Add(30*time.Second)) {
		t.Errorf("last packet at %v, begun %v", last, e.Begun)
	}
	f.Close()
	if err := f.Read(func(kernel.FlowEnd) {}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
}

// exchange makes a connection from 127.0.0.1 to port 7777, sends 1,000 bytes and ends it.
func exchange(t *testing.T, ns *kernel.NS) {
	t.Helper()
	var l net.Listener
	var c net.Conn
	err := ns.Do(func() (err error) {
		if l, err = net.Listen("tcp4", "127.0.0.1:7777"); err == nil {
			c, err = net.Dial("tcp4", "127.0.0.1:7777")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Write(make([]byte, 1000))
	c.Close()
	buf, n := make([]byte, 2000), 0
	for {
		m, err := s.Read(buf)
		if n += m; err != nil {
			break
		}
	}
	s.Close()
	if n != 1000 {
		t.Fatalf("%d bytes arrived", n)
	}
}
