package dnsserver_test

import (
	"context"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
)

var loopback = netip.MustParseAddrPort("127.0.0.1:0")

// start runs a server on a free port of the loopback interface, unless the configuration says where, until the test ends. What it leaves
// behind then is an error.
func start(t *testing.T, cfg dnsserver.Config) *dnsserver.Server {
	t.Helper()
	if len(cfg.Listen)+len(cfg.Sockets) == 0 {
		cfg.Listen = []netip.AddrPort{loopback}
	}
	if cfg.Table == nil {
		cfg.Table = registration.NewTable()
	}
	before := runtime.NumGoroutine()
	s, err := dnsserver.New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run returned %v, want nil", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Run has not ended 20 s after its context")
		}
		testkit.Until(t, 5*time.Second, "goroutines are left", func() bool { return runtime.NumGoroutine() <= before })
	})
	select {
	case <-s.Ready():
	case err := <-ended:
		t.Fatalf("Run: %v", err)
	}
	return s
}

// ask sends a message and returns the answer. opts change the message.
func ask(t testing.TB, network string, to netip.AddrPort, name string, typ uint16, opts ...func(*dns.Msg)) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	m.RecursionDesired = false
	for _, o := range opts {
		o(m)
	}
	resp, err := exchange(network, to, m)
	if err != nil {
		t.Fatalf("%s %s: %v", name, dns.TypeToString[typ], err)
	}
	return resp
}

func exchange(network string, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	c := dns.Client{Net: network, UDPSize: 4096, Timeout: 10 * time.Second}
	resp, _, err := c.Exchange(m, to.String())
	return resp, err
}

func recursive(m *dns.Msg) { m.RecursionDesired = true }

func edns(size uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.SetEdns0(size, false) } }

// answered returns the records of a section as texts without TTL and class, sorted.
func records(rrs []dns.RR) []string {
	var all []string
	for _, rr := range rrs {
		if rr.Header().Rrtype == dns.TypeOPT {
			continue
		}
		all = append(all, strings.Join(strings.Fields(rr.String()), " "))
	}
	slices.Sort(all)
	return all
}

// told returns a table with registrations, each "NAME ADDRESS [port=P] [index=I]".
func told(t testing.TB, lines ...string) *registration.Table {
	t.Helper()
	table := registration.NewTable()
	tell(t, table, lines...)
	return table
}
