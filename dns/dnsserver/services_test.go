package dnsserver

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/registration"
)

// large returns a worker of a server whose table has a name, and a wildcard above it, with n addresses each, and a question for the name's services. With indexed
// each has an index of its own.
func large(t testing.TB, n int, indexed bool) (w *worker, question []byte) {
	table := registration.NewTable()
	for i := range n {
		r := registration.Registration{Name: "large.apps.internal", Address: netip.AddrFrom4([4]byte{10, 255, byte(i >> 8), byte(i)}), Index: -1, Port: 8080, Endpoint: "e", Group: "g"}
		if indexed {
			r.Index = i
		}
		for _, r.Name = range []registration.Name{"large.apps.internal", "*.large.apps.internal"} {
			if !table.Register(r) {
				t.Fatalf("%v was not taken", r)
			}
		}
	}
	s, err := New(Config{Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}, Table: table, Domains: []registration.Name{"apps.internal"}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	question, err = new(dns.Msg).SetQuestion("large.apps.internal.", dns.TypeSRV).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return &worker{s: s}, question
}

// TestServicesOfManyAddresses: an answer by tcp, which has some 1,600 of them, takes a few steps for each and not one for each other one as well. Steps are counted by
// what they allocate: time depends on what else the machine does (BenchmarkServices).
func TestServicesOfManyAddresses(t *testing.T) {
	for _, indexed := range []bool{false, true} {
		const n = 4096
		w, q := large(t, n, indexed)
		allocated := testing.AllocsPerRun(2, func() {
			b, v := w.answer(q, true)
			if m := new(dns.Msg); v != send || m.Unpack(b) != nil || len(m.Answer) < 1000 {
				t.Errorf("verdict %v, %d records", v, len(m.Answer))
			}
		})
		if allocated > 20*n {
			t.Errorf("indexed %v: %.0f allocations for the services of %d addresses", indexed, allocated, n)
		}
	}
}

// BenchmarkServices is an answer by tcp with the services of a name with many addresses.
func BenchmarkServices(b *testing.B) {
	for _, indexed := range []bool{false, true} {
		for _, n := range []int{256, 4096} {
			b.Run(fmt.Sprintf("addresses=%d/indexed=%v", n, indexed), func(b *testing.B) {
				w, q := large(b, n, indexed)
				b.ReportAllocs()
				for b.Loop() {
					w.answer(q, true)
				}
			})
		}
	}
}
