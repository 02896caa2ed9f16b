package dnsserver_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
)

var domains = []registration.Name{"apps.internal"}

// many returns a table with a name that has n addresses.
func many(t *testing.T, n int) *registration.Table {
	table := registration.NewTable()
	for i := range n {
		tell(t, table, fmt.Sprintf("many.apps.internal 10.255.%d.%d port=8080", i/256, i%256))
	}
	return table
}

// TestTruncation: an answer by udp is as long as the client, and the server, take; it has whole records, and TC says that there are more.
// By tcp all are there.
func TestTruncation(t *testing.T) {
	const n = 4000
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, n)})
	to := s.Addresses()[0]
	fit := func(size int) int { return (size - 12 - len("many.apps.internal") - 2 - 4) / 16 }
	for _, c := range []struct {
		opts []func(*dns.Msg)
		want int
	}{
		{nil, fit(512)}, {[]func(*dns.Msg){edns(100)}, fit(512 - 11)}, {[]func(*dns.Msg){edns(800)}, fit(800 - 11)},
		{[]func(*dns.Msg){edns(1232)}, fit(1232 - 11)}, {[]func(*dns.Msg){edns(65535)}, fit(1232 - 11)},
	} {
		if resp := ask(t, "udp", to, "many.apps.internal", dns.TypeA, c.opts...); len(resp.Answer) != c.want || !resp.Truncated {
			t.Errorf("%d addresses, truncated %v: want %d and truncated", len(resp.Answer), resp.Truncated, c.want)
		}
	}
	resp := ask(t, "tcp", to, "many.apps.internal", dns.TypeA)
	if all := records(resp.Answer); len(slices.Compact(all)) != n || resp.Truncated {
		t.Errorf("by tcp %d different addresses, truncated %v: want %d", len(slices.Compact(all)), resp.Truncated, n)
	}
	if resp := ask(t, "udp", to, "many.apps.internal", dns.TypeSRV); !resp.Truncated || len(resp.Answer) == 0 || len(resp.Extra) > 0 {
		t.Errorf("SRV by udp: %d answers, %d additional, truncated %v", len(resp.Answer), len(resp.Extra), resp.Truncated)
	}
	if resp := ask(t, "tcp", to, "many.apps.internal", dns.TypeSRV); !resp.Truncated || len(resp.Answer) < 1000 {
		t.Errorf("SRV by tcp: %d answers, truncated %v: want what 64 KiB hold", len(resp.Answer), resp.Truncated)
	}
}

// TestAnswersAreShuffled: each order of three addresses is as likely as the others.
func TestAnswersAreShuffled(t *testing.T) {
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 3)})
	c, err := dns.Dial("udp", s.Addresses()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 6000
	seen := map[string]int{}
	for range n {
		if err := c.WriteMsg(new(dns.Msg).SetQuestion("many.apps.internal.", dns.TypeA)); err != nil {
			t.Fatal(err)
		}
		resp, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		var order []string
		for _, rr := range resp.Answer {
			order = append(order, rr.(*dns.A).A.String())
		}
		seen[strings.Join(order, " ")]++
	}
	chi := 0.0
	for _, k := range seen {
		chi += (float64(k) - n/6) * (float64(k) - n/6) / (n / 6)
	}
	if len(seen) != 6 || chi > 30 { // with 5 degrees of freedom above 30 once in 60,000 runs
		t.Errorf("%v: want 6 orders of about %d each (chi square %.1f)", seen, n/6, chi)
	}
}

// TestTTL: what is answered may be kept as long as is configured, and so may that there is nothing.
func TestTTL(t *testing.T) {
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 1), TTL: 7 * time.Second})
	resp := ask(t, "udp", s.Addresses()[0], "many.apps.internal", dns.TypeA)
	if ttl := resp.Answer[0].Header().Ttl; ttl != 7 {
		t.Errorf("TTL %d, want 7", ttl)
	}
	resp = ask(t, "udp", s.Addresses()[0], "none.apps.internal", dns.TypeA)
	if soa := resp.Ns[0].(*dns.SOA); soa.Hdr.Ttl != 7 || soa.Minttl != 7 {
		t.Errorf("SOA with TTL %d and minimum %d, want 7", soa.Hdr.Ttl, soa.Minttl)
	}
}

// TestPipelining: questions sent at once on one connection are all answered, in order.
func TestPipelining(t *testing.T) {
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 2)})
	c, err := net.Dial("tcp", s.Addresses()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 500
	var all []byte
	for i := range n {
		m := new(dns.Msg).SetQuestion("many.apps.internal.", dns.TypeA)
		m.Id = uint16(i)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		all = append(binary.BigEndian.AppendUint16(all, uint16(len(b))), b...)
	}
	if _, err := c.Write(all); err != nil {
		t.Fatal(err)
	}
	dc := dns.Conn{Conn: c}
	for i := range n {
		resp, err := dc.ReadMsg()
		if err != nil || resp.Id != uint16(i) || len(resp.Answer) != 2 {
			t.Fatalf("answer %d: %v, %v", i, resp, err)
		}
	}
}

// closed waits until the server closes a connection and returns how long that took.
func closed(t *testing.T, c net.Conn) time.Duration {
	t.Helper()
	begin := time.Now()
	c.SetReadDeadline(begin.Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Fatal("the connection is still open")
	}
	return time.Since(begin)
}

// TestSlowClients: who sends nothing, or a question byte by byte, or takes no answers, is let go, and nobody waits for that.
func TestSlowClients(t *testing.T) {
	const idle = 500 * time.Millisecond
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 4000), IdleTimeout: idle, WriteTimeout: idle})
	to := s.Addresses()[0].String()
	silent, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	drip, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer drip.Close()
	deaf, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	q, _ := new(dns.Msg).SetQuestion("many.apps.internal.", dns.TypeA).Pack()
	q = append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
	gone := make(chan struct{})
	go func() { // until the server closes, which it does while it cannot write
		defer close(gone)
		for {
			if _, err := deaf.Write(q); err != nil {
				return
			}
		}
	}()
	begin := time.Now()
	tick := time.NewTicker(idle / 10)
	defer tick.Stop()
	for _, b := range q {
		<-tick.C
		if _, err := drip.Write([]byte{b}); err != nil {
			break
		}
		ask(t, "tcp", s.Addresses()[0], "many.apps.internal", dns.TypeAAAA)
	}
	if closed(t, drip); time.Since(begin) > 10*idle {
		t.Errorf("a dripping client was let go after %v", time.Since(begin))
	}
	closed(t, silent)
	select {
	case <-gone:
	case <-time.After(20 * time.Second):
		t.Error("a client that takes no answers is still there")
	}
}

// TestConnectionLimits: one address has its share of connections, all together theirs; what is too much is closed at once, and there is
// room again when others close.
func TestConnectionLimits(t *testing.T) {
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 1), Connections: 5, PerSource: 3})
	dial := func(from string) *dns.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from + ":0"))}
		c, err := d.Dial("tcp", s.Addresses()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return &dns.Conn{Conn: c}
	}
	serves := func(c *dns.Conn) bool {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if c.WriteMsg(new(dns.Msg).SetQuestion("many.apps.internal.", dns.TypeA)) != nil {
			return false
		}
		_, err := c.ReadMsg()
		return err == nil
	}
	var open []*dns.Conn
	for i, want := range []bool{true, true, true, false} {
		c := dial("127.0.0.2")
		if got := serves(c); got != want {
			t.Errorf("connection %d of an address is served: %v, want %v", i+1, got, want)
		}
		open = append(open, c)
	}
	for i, want := range []bool{true, true, false} {
		if got := serves(dial("127.0.0.3")); got != want {
			t.Errorf("connection %d of all is served: %v, want %v", i+4, got, want)
		}
	}
	open[0].Close()
	testkit.Until(t, 10*time.Second, "no room after one closed", func() bool { return serves(dial("127.0.0.2")) })
}
