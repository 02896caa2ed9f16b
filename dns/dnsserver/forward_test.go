package dnsserver_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
)

// resolver is another's DNS server, which answers as the test says.
type resolver struct {
	address netip.AddrPort
	asked   atomic.Int64
	ports   sync.Map // from which it was asked
}

// resolve runs a resolver until the test ends. A nil answer is none.
func resolve(t *testing.T, answer func(network string, m *dns.Msg) *dns.Msg) *resolver {
	t.Helper()
	r := &resolver{}
	handler := func(network string) dns.HandlerFunc {
		return func(w dns.ResponseWriter, m *dns.Msg) {
			r.asked.Add(1)
			r.ports.Store(w.RemoteAddr().String(), m.Id)
			if resp := answer(network, m); resp != nil {
				w.WriteMsg(resp)
			}
		}
	}
	sockets, err := dnsserver.Listen(t.Context(), []netip.AddrPort{loopback})
	if err != nil {
		t.Fatal(err)
	}
	r.address = sockets[0].Address()
	for _, s := range []*dns.Server{{PacketConn: sockets[0].Packets, Handler: handler("udp")}, {Listener: sockets[0].Streams, Handler: handler("tcp")}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		down := make(chan struct{})
		go func() { defer close(down); s.ActivateAndServe() }()
		<-up
		t.Cleanup(func() { s.Shutdown(); <-down })
	}
	return r
}

// with answers with so many addresses.
func with(n int) func(string, *dns.Msg) *dns.Msg {
	return func(network string, m *dns.Msg) *dns.Msg {
		resp := new(dns.Msg).SetReply(m)
		resp.RecursionAvailable = true
		if o := m.IsEdns0(); o != nil {
			resp.SetEdns0(4096, o.Do())
		}
		resp.Compress = true
		for i := range n {
			h := dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}
			resp.Answer = append(resp.Answer, &dns.A{Hdr: h, A: net.IPv4(192, 0, 2, byte(i))})
		}
		size := dns.MinMsgSize
		if o := m.IsEdns0(); o != nil {
			size = int(o.UDPSize())
		}
		if network == "udp" {
			resp.Truncate(size)
		}
		return resp
	}
}

func failing(code int) func(string, *dns.Msg) *dns.Msg {
	return func(_ string, m *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(m, code) }
}

func silent(string, *dns.Msg) *dns.Msg { return nil }

func to(rs ...*resolver) []netip.AddrPort {
	var all []netip.AddrPort
	for _, r := range rs {
		all = append(all, r.address)
	}
	return all
}

// TestForward: names of others go to the resolver, ours never do.
func TestForward(t *testing.T) {
	r := resolve(t, with(3))
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 1), Forward: to(r)})
	for _, network := range []string{"udp", "tcp"} {
		resp := ask(t, network, s.Addresses()[0], "exAmple.COM", dns.TypeA, recursive, edns(4096))
		if len(resp.Answer) != 3 || resp.Question[0].Name != "exAmple.COM." || !resp.RecursionAvailable || resp.Authoritative || resp.IsEdns0() == nil {
			t.Errorf("by %s: %v", network, resp)
		}
		if resp := ask(t, network, s.Addresses()[0], `a\.b.example.com`, dns.TypeA, recursive); len(resp.Answer) != 3 || resp.IsEdns0() != nil {
			t.Errorf("a dot in a label, by %s: %v", network, resp)
		}
	}
	before := r.asked.Load()
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA); resp.Rcode != dns.RcodeRefused {
		t.Errorf("without RD: %v", resp)
	}
	if resp := ask(t, "udp", s.Addresses()[0], "nobody.apps.internal", dns.TypeA, recursive); resp.Rcode != dns.RcodeNameError {
		t.Errorf("of ours: %v", resp)
	}
	if resp := ask(t, "tcp", s.Addresses()[0], "example.com", dns.TypeAXFR, recursive); resp.Rcode != dns.RcodeRefused {
		t.Errorf("a transfer: %v", resp)
	}
	if n := r.asked.Load(); n != before {
		t.Errorf("the resolver was asked %d times more", n-before)
	}
}

// TestNamesThatLookAlikeAreAskedApart: a dot within a label, and the byte that stands for it in our own table.
func TestNamesThatLookAlikeAreAskedApart(t *testing.T) {
	both := make(chan struct{})
	var asked atomic.Int64
	r := resolve(t, func(_ string, m *dns.Msg) *dns.Msg {
		if asked.Add(1) == 2 {
			close(both)
		}
		select {
		case <-both:
		case <-time.After(2 * time.Second):
		}
		resp := new(dns.Msg).SetReply(m)
		resp.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{fmt.Sprint(strings.Contains(m.Question[0].Name, "255"))}}}
		return resp
	})
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(r), ForwardTimeout: 10 * time.Second})
	var wg sync.WaitGroup
	for _, name := range []string{`a\.b.example.com.`, `a\255b.Example.com.`} {
		wg.Go(func() {
			resp := ask(t, "udp", s.Addresses()[0], name, dns.TypeTXT, recursive)
			if len(resp.Answer) != 1 || resp.Answer[0].(*dns.TXT).Txt[0] != fmt.Sprint(strings.Contains(name, "255")) {
				t.Errorf("%s: %v", name, resp.Answer)
			}
		})
	}
	wg.Wait()
}

// TestForwardedOptions: the resolver is told what concerns it, and none of what is between the client and us.
func TestForwardedOptions(t *testing.T) {
	got := make(chan *dns.Msg, 1)
	r := resolve(t, func(n string, m *dns.Msg) *dns.Msg { got <- m; return with(1)(n, m) })
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(r)})
	resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive, func(m *dns.Msg) {
		m.CheckingDisabled = true
		m.SetEdns0(4096, true)
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"})
	})
	m := <-got
	o := m.IsEdns0()
	if !m.CheckingDisabled || !m.RecursionDesired || o == nil || !o.Do() || len(o.Option) > 0 || o.UDPSize() != 1232 {
		t.Errorf("the resolver was asked %v", m)
	}
	if o := resp.IsEdns0(); o == nil || !o.Do() {
		t.Errorf("the client was told %v", resp)
	}
}

// TestForwardedTruncation: what the resolver cuts short is asked for by tcp, and cut again for the client only if it takes no more.
func TestForwardedTruncation(t *testing.T) {
	r := resolve(t, with(100))
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(r)})
	for _, c := range []struct {
		network string
		opts    []func(*dns.Msg)
		answers int
		tc      bool
	}{{"udp", nil, 0, true}, {"udp", []func(*dns.Msg){edns(1232)}, 0, true}, {"tcp", nil, 100, false}, {"tcp", []func(*dns.Msg){edns(512)}, 100, false}} {
		resp := ask(t, c.network, s.Addresses()[0], "example.com", dns.TypeA, append(c.opts, recursive)...)
		if len(resp.Answer) != c.answers || resp.Truncated != c.tc || resp.Rcode != dns.RcodeSuccess {
			t.Errorf("by %s: %d answers, truncated %v: want %d, %v", c.network, len(resp.Answer), resp.Truncated, c.answers, c.tc)
		}
	}
	// One that cuts everything short by udp.
	mean := resolve(t, func(n string, m *dns.Msg) *dns.Msg {
		resp := with(10)(n, m)
		if n == "udp" {
			resp.Truncated, resp.Answer = true, nil
		}
		return resp
	})
	s = start(t, dnsserver.Config{Domains: domains, Forward: to(mean)})
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); len(resp.Answer) != 10 || resp.Truncated {
		t.Errorf("%d answers, truncated %v: want all 10", len(resp.Answer), resp.Truncated)
	}
}

// TestFailover: one resolver answers for another that is away, fails or refuses; the one that is away is remembered, and asked again later.
func TestFailover(t *testing.T) {
	const timeout = 100 * time.Millisecond
	var well atomic.Bool
	sick := resolve(t, func(n string, m *dns.Msg) *dns.Msg {
		if well.Load() {
			return with(2)(n, m)
		}
		return nil
	})
	sound := resolve(t, with(1))
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(sick, sound), ForwardTimeout: timeout})
	get := func() *dns.Msg { return ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive) }
	for range 2 {
		if resp := get(); len(resp.Answer) != 1 {
			t.Fatalf("%v", resp)
		}
	}
	n := sick.asked.Load()
	for range 20 {
		get()
	}
	if more := sick.asked.Load() - n; n != 2 || more > 2 {
		t.Errorf("the resolver that is away was asked %d and %d times, want 2 and hardly more", n, more)
	}
	well.Store(true)
	testkit.Until(t, 20*time.Second, "the resolver that is well again is not asked", func() bool { return len(get().Answer) == 2 })

	for _, code := range []int{dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented} {
		s := start(t, dnsserver.Config{Domains: domains, Forward: to(resolve(t, failing(code)), sound)})
		if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); len(resp.Answer) != 1 {
			t.Errorf("beside one with %s: %v", dns.RcodeToString[code], resp)
		}
	}
}

// TestNobodyAnswers: SERVFAIL in the time that is promised, at once from a port that is closed; and what a resolver fails with when it is
// the only one.
func TestNobodyAnswers(t *testing.T) {
	const timeout = 100 * time.Millisecond
	none := resolve(t, silent)
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(none), ForwardTimeout: timeout})
	begin := time.Now()
	resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive)
	if resp.Rcode != dns.RcodeServerFailure || time.Since(begin) < 3*timeout*9/10 {
		t.Errorf("after %v: %v", time.Since(begin), resp)
	}
	port, err := testkit.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	nobody := []netip.AddrPort{netip.AddrPortFrom(loopback.Addr(), uint16(port))}
	s = start(t, dnsserver.Config{Domains: domains, Forward: nobody, ForwardTimeout: time.Minute})
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); resp.Rcode != dns.RcodeServerFailure {
		t.Errorf("a closed port: %v", resp)
	}
	s = start(t, dnsserver.Config{Domains: domains, Forward: to(resolve(t, failing(dns.RcodeNotImplemented)))})
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); resp.Rcode != dns.RcodeNotImplemented {
		t.Errorf("the only one fails: %v", resp)
	}
}

// TestForgedAnswers: with another number, another question, or a question where an answer is expected, they are passed over, and the true
// one is waited for.
func TestForgedAnswers(t *testing.T) {
	var pc net.PacketConn
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			m := new(dns.Msg)
			if m.Unpack(b[:n]) != nil {
				return
			}
			for i, forge := range []func(*dns.Msg){
				func(m *dns.Msg) { m.Id++ }, func(m *dns.Msg) { m.Question[0].Name = "example.org." }, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
				func(m *dns.Msg) { m.Response = false }, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, func(m *dns.Msg) { m.Question = nil }, func(m *dns.Msg) {},
			} {
				resp := with(i+1)("udp", m.Copy())
				forge(resp)
				out, err := resp.Pack()
				if err != nil {
					return
				}
				pc.WriteTo(out[:5], from)
				pc.WriteTo(out, from)
			}
		}
	}()
	s := start(t, dnsserver.Config{Domains: domains, Forward: []netip.AddrPort{netip.MustParseAddrPort(pc.LocalAddr().String())}})
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); len(resp.Answer) != 7 {
		t.Errorf("%v: want the last answer of 7", resp)
	}
}

// TestQuestionsAreHardToForge: each goes out from another port with another number.
func TestQuestionsAreHardToForge(t *testing.T) {
	r := resolve(t, with(1))
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(r)})
	const n = 60
	for range n {
		ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive)
	}
	ports, ids := 0, map[uint16]bool{}
	r.ports.Range(func(_, id any) bool { ports++; ids[id.(uint16)] = true; return true })
	if ports < n*9/10 || len(ids) < n*9/10 {
		t.Errorf("%d ports and %d numbers in %d questions", ports, len(ids), n)
	}
}

// TestForwardsAreBounded: what is too much fails at once, and what is the same is asked once.
func TestForwardsAreBounded(t *testing.T) {
	release := make(chan struct{})
	r := resolve(t, func(n string, m *dns.Msg) *dns.Msg { <-release; return with(1)(n, m) })
	s := start(t, dnsserver.Config{Domains: domains, Forward: to(r), ForwardMax: 40, ForwardTimeout: 10 * time.Second}) // of which a client may have 10
	c, err := dns.Dial("udp", s.Addresses()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	const n = 15
	for i := range n {
		m := new(dns.Msg).SetQuestion([]string{"example.com.", "EXAMPLE.com."}[i%2], dns.TypeA)
		m.Id = uint16(i)
		if err := c.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	for range n - 10 {
		if resp, err := c.ReadMsg(); err != nil || resp.Rcode != dns.RcodeServerFailure {
			t.Fatalf("%v, %v: want SERVFAIL", resp, err)
		}
	}
	close(release)
	seen := map[uint16]bool{}
	for range 10 {
		resp, err := c.ReadMsg()
		if err != nil || len(resp.Answer) != 1 || resp.Question[0].Name != []string{"example.com.", "EXAMPLE.com."}[resp.Id%2] {
			t.Fatalf("%v, %v: want an answer", resp, err)
		}
		seen[resp.Id] = true
	}
	if asked := r.asked.Load(); len(seen) != 10 || asked != 1 {
		t.Errorf("%d different answers and %d questions to the resolver, want 10 and 1", len(seen), asked)
	}
}

// TestALoopThroughAnother: a resolver that asks us in turn does not get us to ask for ever.
func TestALoopThroughAnother(t *testing.T) {
	var s *dnsserver.Server
	up := make(chan struct{})
	r := resolve(t, func(_ string, m *dns.Msg) *dns.Msg {
		<-up
		q := m.Copy()
		q.Id = dns.Id()
		resp, _, err := (&dns.Client{Timeout: time.Second}).Exchange(q, s.Addresses()[0].String())
		if err != nil {
			return nil
		}
		resp.Id = m.Id
		return resp
	})
	s = start(t, dnsserver.Config{Domains: domains, Forward: to(r), ForwardTimeout: 200 * time.Millisecond})
	close(up)
	if resp := ask(t, "udp", s.Addresses()[0], "example.com", dns.TypeA, recursive); resp.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v", resp)
	}
	if n := r.asked.Load(); n > 3 {
		t.Errorf("the resolver was asked %d times, want 3 at most", n)
	}
}

// TestRunEndsWhileResolversAreAsked: and leaves nothing, which start's cleanup looks at.
func TestRunEndsWhileResolversAreAsked(t *testing.T) {
	asked := make(chan struct{}, 100)
	r := resolve(t, func(string, *dns.Msg) *dns.Msg { asked <- struct{}{}; return nil })
	s, err := dnsserver.New(dnsserver.Config{
		Listen: []netip.AddrPort{loopback}, Domains: domains, Table: registration.NewTable(), Forward: to(r), ForwardTimeout: time.Minute,
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	<-s.Ready()
	for _, network := range []string{"udp", "tcp"} {
		c, err := dns.Dial(network, s.Addresses()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.WriteMsg(new(dns.Msg).SetQuestion(network+".example.com.", dns.TypeA)); err != nil {
			t.Fatal(err)
		}
		<-asked
	}
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Run waits for a resolver")
	}
}
