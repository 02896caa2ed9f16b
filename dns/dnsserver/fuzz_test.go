package dnsserver

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/registration"
)

// answering returns a worker of a server that does not run.
func answering(t testing.TB) *worker {
	table := registration.NewTable()
	for i := range 300 {
		a := netip.AddrFrom4([4]byte{10, 255, byte(i >> 8), byte(i)})
		table.Register(registration.Registration{Name: "many.apps.internal", Address: a, Index: i, Port: 80})
	}
	for _, n := range []registration.Name{"api.apps.internal", "*.web.apps.internal", "x.y.z.apps.internal"} {
		table.Register(registration.Registration{Name: n, Address: netip.MustParseAddr("10.255.9.1"), Index: 0, Port: 8080})
		table.Register(registration.Registration{Name: n, Address: netip.MustParseAddr("fd00::1"), Index: 1, Port: 8080})
	}
	s, err := New(Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}, Table: table, Domains: []registration.Name{"apps.internal"},
		Reverse: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("fd00::/8")},
		Forward: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")},
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return &worker{s: s}
}

// FuzzMessage: whatever comes, the answer is to that, is no longer than the client takes, can be read by others, and there is none to
// what is an answer itself.
func FuzzMessage(f *testing.F) {
	for _, name := range []string{
		"api.apps.internal.", "many.apps.internal.", "0.many.apps.internal.", "_http._tcp.many.apps.internal.", "10-255-0-1.many.apps.internal.",
		"q.web.apps.internal.", "y.z.apps.internal.", ".", "1.0.255.10.in-addr.arpa.", "f.ip6.arpa.", "example.com.",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
	} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypeANY, dns.TypeSOA, dns.TypeNS, dns.TypePTR, dns.TypeAXFR} {
			m := new(dns.Msg).SetQuestion(name, typ)
			if typ%2 == 0 {
				m.SetEdns0(4096, true)
			}
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, typ%3 == 0)
		}
	}
	f.Add([]byte("\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"), false)
	f.Add([]byte("\x00\x01\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"), true)
	w := answering(f)
	f.Fuzz(func(t *testing.T, b []byte, stream bool) {
		in := bytes.Clone(b)
		resp, v := w.answer(b, stream)
		if !bytes.Equal(in, b) {
			t.Fatal("the question was changed")
		}
		response := len(b) < headerSize || binary.BigEndian.Uint16(b[2:])&flagQR != 0
		if (v == drop) != response {
			t.Fatalf("verdict %d, and it is an answer or too short: %v", v, response)
		}
		switch v {
		case send:
			check(t, w, b, resp, stream)
		case onward:
			q := w.q
			ask := w.s.onward.message(&q)
			if !wellFormed(ask) || !bytes.Equal(ask[headerSize:headerSize+len(q.question)], b[headerSize:headerSize+len(q.question)]) {
				t.Fatalf("a resolver would be asked %x", ask)
			}
			check(t, w, b, w.fail(servFail, stream), stream)
		}
	})
}

func check(t *testing.T, w *worker, b, resp []byte, stream bool) {
	limit := maxTCP
	if !stream {
		limit = min(max(w.q.udp, 512), 1232)
	}
	if len(resp) < headerSize || len(resp) > limit || !bytes.Equal(resp[:2], b[:2]) || resp[2]&0x80 == 0 || !wellFormed(resp) {
		t.Fatalf("limit %d: %x is answered with %d bytes, %x", limit, b, len(resp), resp)
	}
	if n := len(w.q.question); n > 0 && !bytes.Equal(resp[headerSize:headerSize+n], b[headerSize:headerSize+n]) {
		t.Fatalf("%x is answered with another question: %x", b, resp)
	}
	m := new(dns.Msg)
	if err := m.Unpack(resp); err != nil {
		t.Fatalf("%x is answered with %x: %v", b, resp, err)
	}
	if o := m.IsEdns0(); (o != nil) != w.q.edns {
		t.Fatalf("EDNS0 in the question: %v, in the answer: %v", w.q.edns, o)
	}
}

// FuzzUpstream: what a resolver sends is passed on only if it can be read to its end and is to the question.
func FuzzUpstream(f *testing.F) {
	m := new(dns.Msg).SetQuestion("example.com.", dns.TypeA)
	resp := new(dns.Msg).SetReply(m)
	resp.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "example.com.", Rrtype: dns.TypeA, Class: 1}, A: []byte{1, 2, 3, 4}}}
	ask, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	b, err := resp.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add(ask)
	question := ask[headerSize:]
	f.Fuzz(func(t *testing.T, b []byte) {
		taken := matches(b, ask, question) && wellFormed(b)
		if !taken {
			return
		}
		same := bytes.EqualFold(b[headerSize:headerSize+len(question)], question)
		if !bytes.Equal(b[:2], ask[:2]) || b[2]&0x80 == 0 || binary.BigEndian.Uint16(b[4:]) != 1 || !same {
			t.Fatalf("%x was taken for an answer to %x", b, ask)
		}
	})
}

// BenchmarkAnswer is what an answer takes but for the sockets.
func BenchmarkAnswer(b *testing.B) {
	w := answering(b)
	q, err := new(dns.Msg).SetQuestion("api.apps.internal.", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, v := w.answer(q, false); v != send {
			b.Fatal("no answer")
		}
	}
}
