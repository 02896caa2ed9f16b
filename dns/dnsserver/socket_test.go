package dnsserver_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
)

// namespace makes a network namespace whose loopback device is up.
func namespace(t *testing.T) (*kernel.NS, *kernel.Conn) {
	t.Helper()
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	t.Cleanup(func() { ns.Close() })
	c, err := kernel.Dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var b kernel.Batch
	b.Add(syscall.RTM_NEWLINK, 0, kernel.IfInfo(1, syscall.IFF_UP, syscall.IFF_UP))
	do(t, c, &b)
	return ns, c
}

func do(t *testing.T, c *kernel.Conn, b *kernel.Batch) {
	t.Helper()
	refused, err := c.Do(b)
	for _, r := range refused {
		err = errors.Join(err, r)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// give gives the loopback device an address.
func give(t *testing.T, c *kernel.Conn, a string) {
	t.Helper()
	p := netip.MustParsePrefix(a)
	var b kernel.Batch
	b.Add(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE, kernel.IfAddr(1, p.Bits(), 0))
	if p.Addr().Is6() {
		t.Fatal("IPv4 only")
	}
	b.Attr(syscall.IFA_LOCAL, p.Addr().AsSlice())
	b.Attr(syscall.IFA_ADDRESS, p.Addr().AsSlice())
	do(t, c, &b)
}

// TestAddressThatComesLater: an address may be listened on before the host has it, as that of a device which is made later.
func TestAddressThatComesLater(t *testing.T) {
	ns, c := namespace(t)
	at := netip.MustParseAddrPort("169.254.0.2:53")
	var sockets []dnsserver.Socket
	if err := ns.Do(func() (err error) { sockets, err = dnsserver.Listen(t.Context(), []netip.AddrPort{at}); return err }); err != nil {
		t.Fatal(err)
	}
	start(t, dnsserver.Config{Sockets: sockets, Domains: domains, Table: many(t, 1)})
	give(t, c, "169.254.0.2/32")
	for _, network := range []string{"udp", "tcp"} {
		if resp := inside(t, ns, network, at, "many.apps.internal"); len(resp.Answer) != 1 {
			t.Errorf("by %s: %v", network, resp)
		}
	}
}

// inside asks from a namespace.
func inside(t *testing.T, ns *kernel.NS, network string, to netip.AddrPort, name string) (resp *dns.Msg) {
	t.Helper()
	var c net.Conn
	if err := ns.Do(func() (err error) { c, err = net.Dial(network, to.String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dc := dns.Conn{Conn: c}
	dc.SetDeadline(time.Now().Add(5 * time.Second))
	if err := dc.WriteMsg(new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	resp, err := dc.ReadMsg()
	if err != nil {
		t.Fatalf("%v by %s: %v", to, network, err)
	}
	return resp
}

// TestAnswersLeaveFromTheAddressAsked: of a host with several addresses. A client takes no answer from another one.
func TestAnswersLeaveFromTheAddressAsked(t *testing.T) {
	ns, c := namespace(t)
	give(t, c, "192.0.2.1/32")
	give(t, c, "192.0.2.2/32")
	var sockets []dnsserver.Socket
	listen := []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:53"), netip.MustParseAddrPort("[::]:53")}
	if err := ns.Do(func() (err error) { sockets, err = dnsserver.Listen(t.Context(), listen); return err }); err != nil {
		t.Fatal(err)
	}
	start(t, dnsserver.Config{Sockets: sockets, Domains: domains, Table: many(t, 1)})
	for _, a := range []string{"192.0.2.1:53", "192.0.2.2:53", "127.0.0.1:53", "127.0.0.9:53", "[::1]:53"} {
		for _, network := range []string{"udp", "tcp"} {
			if resp := inside(t, ns, network, netip.MustParseAddrPort(a), "many.apps.internal"); len(resp.Answer) != 1 {
				t.Errorf("%s by %s: %v", a, network, resp)
			}
		}
	}
}

// TestATakenAddressIsAnError: of Run, which leaves nothing open.
func TestATakenAddressIsAnError(t *testing.T) {
	first := start(t, dnsserver.Config{Domains: domains})
	cfg := dnsserver.Config{Listen: []netip.AddrPort{loopback, first.Addresses()[0]}, Domains: domains, Table: registration.NewTable()}
	s, err := dnsserver.New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(context.Background()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("Run returned %v, want EADDRINUSE", err)
	}
}

// TestABrokenSocketEndsRun: it is not for the server to go on deaf.
func TestABrokenSocketEndsRun(t *testing.T) {
	for what, breaks := range map[string]func(dnsserver.Socket) error{
		"udp closed": func(s dnsserver.Socket) error { return s.Packets.Close() },
		"tcp closed": func(s dnsserver.Socket) error { return s.Streams.Close() },
	} {
		sockets, err := dnsserver.Listen(t.Context(), []netip.AddrPort{loopback})
		if err != nil {
			t.Fatal(err)
		}
		s, err := dnsserver.New(dnsserver.Config{Sockets: sockets, Domains: domains, Table: registration.NewTable()}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { ended <- s.Run(ctx) }()
		<-s.Ready()
		if err := breaks(sockets[0]); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: Run returned nil", what)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: Run goes on without its socket", what)
		}
		cancel()
	}
}

// TestAListenerThatIsMadeToListenNoMore answers again.
func TestAListenerThatIsMadeToListenNoMore(t *testing.T) {
	port, err := testkit.FreePort() // one that the kernel has chosen it would choose anew
	if err != nil {
		t.Fatal(err)
	}
	sockets, err := dnsserver.Listen(t.Context(), []netip.AddrPort{netip.AddrPortFrom(loopback.Addr(), uint16(port))})
	if err != nil {
		t.Fatal(err)
	}
	s, err := dnsserver.New(dnsserver.Config{Sockets: sockets, Domains: domains, Table: registration.NewTable()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	<-s.Ready()
	if err := shut(sockets[0].Streams); err != nil {
		t.Fatal(err)
	}
	testkit.Until(t, 10*time.Second, "it accepts", func() bool {
		c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(sockets[0].Address()))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// shut takes a listener out of the state in which it listens.
func shut(l syscall.Conn) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = syscall.Shutdown(int(fd), syscall.SHUT_RD) })
	return errors.Join(err, failed)
}

// TestNewSaysAllThatIsWrong.
func TestNewSaysAllThatIsWrong(t *testing.T) {
	_, err := dnsserver.New(dnsserver.Config{
		Domains: []registration.Name{"Apps.internal", "*.x"}, TTL: time.Millisecond, UDPSize: 100, IdleTimeout: -1,
		Listen:  []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53"), netip.MustParseAddrPort("0.0.0.0:54"), {}},
		Reverse: []netip.Prefix{netip.MustParsePrefix("10.255.0.1/16")},
		Forward: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53"), netip.MustParseAddrPort("127.3.0.1:54"), netip.MustParseAddrPort("192.0.2.1:0")},
	}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, fault.Invalid) {
		t.Fatalf("%v, want an Invalid fault", err)
	}
	for _, want := range []string{
		"no table", "Apps.internal", "*.x", "TTL 1ms", "udp size 100", "limits", "10.255.0.1/16", "127.0.0.1:53", "127.3.0.1:54", "192.0.2.1:0",
		"invalid AddrPort",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing of %q in: %v", want, err)
		}
	}
}

// TestMetrics counts answers by how they were asked for.
func TestMetrics(t *testing.T) {
	s := start(t, dnsserver.Config{Domains: domains, Table: many(t, 1)})
	to := s.Addresses()[0]
	for range 3 {
		ask(t, "udp", to, "many.apps.internal", dns.TypeA)
	}
	ask(t, "tcp", to, "none.apps.internal", dns.TypeMX)
	ask(t, "udp", to, "elsewhere", dns.TypeAAAA)
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(s); err != nil {
		t.Fatal(err)
	}
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range all {
		if f.GetName() != "silk_dns_answers_total" {
			continue
		}
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetValue())
			}
			got[strings.Join(labels, " ")] = m.Counter.GetValue()
		}
	}
	want := map[string]float64{"NOERROR udp A": 3, "NXDOMAIN tcp other": 1, "REFUSED udp AAAA": 1}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: %v, want %v", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestDig asks as people do.
func TestDig(t *testing.T) {
	path, err := exec.LookPath("dig")
	testkit.Require(t, "tools", err)
	table := told(t, "api.apps.internal 10.255.1.5 port=8080 index=0", "api.apps.internal 10.255.1.6 port=8080 index=1")
	s := start(t, dnsserver.Config{Domains: domains, Table: table})
	to := s.Addresses()[0]
	dig := func(args ...string) string {
		t.Helper()
		args = append([]string{"@" + to.Addr().String(), "-p", strconv.Itoa(int(to.Port())), "+tries=1", "+time=5"}, args...)
		out, err := exec.Command(path, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("dig %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	for _, c := range []struct {
		args string
		want []string
	}{
		{"api.apps.internal +short", []string{"10.255.1.5\n", "10.255.1.6\n"}},
		{"API.Apps.Internal", []string{"status: NOERROR", "flags: qr aa rd ra;", "ANSWER: 2", "API.Apps.Internal.\t0\tIN\tA\t10.255.1.5", "EDNS: version: 0, flags:; udp: 1232"}},
		{"api.apps.internal AAAA", []string{"status: NOERROR", "ANSWER: 0, AUTHORITY: 1", "SOA"}},
		{"api.apps.internal SRV +tcp", []string{"0 0 8080 1.api.apps.internal.", "1.api.apps.internal.\t0\tIN\tA\t10.255.1.6"}},
		{"nobody.apps.internal", []string{"status: NXDOMAIN", "AUTHORITY: 1"}},
		{"example.com", []string{"status: REFUSED"}},
		{"api.apps.internal ANY", []string{"RFC8482"}},
		{"apps.internal AXFR", []string{"Transfer failed"}},
		{"api.apps.internal +noedns +bufsize=0", []string{"10.255.1.5"}},
		{"api.apps.internal +edns=5 +noednsneg", []string{"BADVERS"}},
	} {
		out := dig(strings.Fields(c.args)...)
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("dig %s: no %q in\n%s", c.args, w, out)
			}
		}
		out = strings.ReplaceAll(out, ";; WARNING: recursion requested but not available", "")
		if strings.Contains(out, "WARNING") || strings.Contains(out, "malformed") {
			t.Errorf("dig %s warns:\n%s", c.args, out)
		}
	}
}
