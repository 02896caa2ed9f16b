package flow_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"github.com/google/go-cmp/cmp"
)

var (
	noon = time.Date(2026, 11, 21, 12, 0, 0, 5000, time.UTC)
	site = flow.Site{IP: "10.0.16.15", GUID: "cell-1"}
	book = &flow.Book{
		Parties: map[netip.Addr]*flow.Party{
			netip.MustParseAddr("10.255.30.2"): {Container: "c-api", Group: "api", App: "api", Space: "s1", Org: "o1"},
			netip.MustParseAddr("10.255.30.3"): {Container: "c-\"odd", Group: "odd\n"},
		},
		Groups: map[identity.Tag]identity.Group{1: "web"},
		Allowed: func(from identity.Tag, to netip.Addr, proto policy.Protocol, port uint16) (policy.Ports, bool) {
			return policy.Ports{First: 8080, Last: 8090}, from == 1 && proto == policy.TCP && port >= 8080 && port <= 8090
		},
	}
)

func packet(proto uint8, from, to string) flow.Packet {
	return flow.Packet{Protocol: proto, Source: netip.MustParseAddrPort(from), Destination: netip.MustParseAddrPort(to)}
}

// run gives a Log what happens and returns the lines that it makes of it.
func run(t *testing.T, f flow.Format, begun bool, o flow.Options, happens ...any) string {
	t.Helper()
	l := flow.New(o)
	l.Know(book)
	var b []byte
	emit := func(r *flow.Record) {
		if f.Writes(r, begun) {
			b = f.Append(b, site, r)
		}
	}
	for _, h := range happens {
		switch h := h.(type) {
		case flow.Logged:
			l.Packet(h, emit)
		case flow.End:
			l.End(h, emit)
		}
	}
	for line := range strings.Lines(string(b)) {
		if !json.Valid([]byte(line)) {
			t.Errorf("not JSON: %s", line)
		}
	}
	return string(b)
}

func TestRecords(t *testing.T) {
	accepted := flow.Logged{Time: noon, Verdict: flow.Accepted, Scope: flow.C2C, Mark: 1, Packet: packet(6, "10.255.7.9:40000", "10.255.30.2:8081")}
	end := flow.End{Time: noon.Add(122 * time.Second), Packet: accepted.Packet, Mark: 1, Start: noon, Last: noon.Add(1500 * time.Millisecond),
		Sent: flow.Traffic{Packets: 6, Bytes: 400}, Heard: flow.Traffic{Packets: 5, Bytes: 9000}}
	denied := flow.Logged{Time: noon, Scope: flow.C2C, Detail: "no-policy", Mark: 0x30002, Packet: packet(17, "10.255.7.9:40000", "10.255.30.3:53")}
	ping := flow.Logged{Time: noon, Scope: flow.Egress, Packet: packet(1, "10.255.30.2:77", "8.8.8.8:2048")}
	const api = `{"container_id":"c-api","app_guid":"api","space_guid":"s1","organization_guid":"o1","host_ip":"10.0.16.15","host_guid":"cell-1"`
	const line = `"scope":"c2c","reason":"policy web -> api tcp 8080-8090","packet":{"direction":"ingress","allowed":true,"src_ip":"10.255.7.9","dst_ip":"10.255.30.2","src_port":40000,"dst_port":8081,"protocol":"TCP","mark":"0x1","icmp_type":0,"icmp_code":0},"source":{"group":"web","tag":"0001"},"destination":` + api + `,"group":"api"},"begun":"2026-11-21T12:00:00.000005000Z"`
	ended := `{"time":"2026-11-21T12:02:02.000005000Z","event":"ended","verdict":"accepted",` + line +
		`,"ended":"2026-11-21T12:00:01.500005000Z","duration_seconds":1.500000,"sent":{"packets":6,"bytes":400},"received":{"packets":5,"bytes":9000}}` + "\n"
	begun := `{"time":"2026-11-21T12:00:00.000005000Z","event":"begun","verdict":"accepted",` + line
	next := later(accepted, 500*time.Millisecond)
	soon, last := end, end
	soon.Time, last.Time = noon.Add(400*time.Millisecond), noon.Add(600*time.Millisecond)
	soonLine := strings.Replace(ended, "12:02:02.000005000Z\",\"event", "12:00:00.400005000Z\",\"event", 1)
	lastLine := strings.Replace(ended, "12:02:02.000005000Z\",\"event", "12:00:00.600005000Z\",\"event", 1)
	lagerPacket := `"packet":{"direction":"ingress","allowed":true,"src_ip":"10.255.7.9","dst_ip":"10.255.30.2","src_port":40000,"dst_port":8081,"protocol":"TCP","mark":"0x1","icmp_type":0,"icmp_code":0}`
	for _, c := range []struct {
		name    string
		format  flow.Format
		begun   bool
		o       flow.Options
		happens []any
		want    string
	}{
		{"one line at the end", flow.Lines, false, flow.Options{}, []any{accepted, accepted, end, end}, ended},
		{"and one at the beginning", flow.Lines, true, flow.Options{}, []any{accepted, end}, begun + "}\n" + ended},
		{"not yet ended", flow.Lines, false, flow.Options{}, []any{accepted}, ""},
		{"ended unseen", flow.Lines, false, flow.Options{}, []any{end}, ""},
		{"the end came first", flow.Lines, true, flow.Options{}, []any{end, accepted, end}, begun + "}\n" + ended},
		{"begun before", flow.Lines, false, flow.Options{Since: noon.Add(time.Second)}, []any{end}, ended},
		{"too many", flow.Lines, false, flow.Options{Open: 1}, []any{flow.Logged{Time: noon, Verdict: flow.Accepted}, accepted, end}, begun + `,"end_unknown":true}` + "\n"},
		{"the next one with the same ports", flow.Lines, false, flow.Options{}, []any{accepted, next, soon, last, last}, soonLine + lastLine},
		{"denied, again, and again later", flow.Lines, false, flow.Options{}, []any{denied, denied, later(denied, time.Second), later(denied, 50*time.Second)},
			`{"time":"2026-11-21T12:00:00.000005000Z","event":"denied","verdict":"denied","scope":"c2c","reason":"no policy tag 0002 -> odd\n udp 53","packet":{"direction":"ingress","allowed":false,"src_ip":"10.255.7.9","dst_ip":"10.255.30.3","src_port":40000,"dst_port":53,"protocol":"UDP","mark":"0x30002","icmp_type":0,"icmp_code":0},"source":{"group":"","tag":"0002"},"destination":{"container_id":"c-\"odd","app_guid":"","space_guid":"","organization_guid":"","host_ip":"10.0.16.15","host_guid":"cell-1","group":"odd\n"}}` + "\n"},
		{"deployed, pretty", flow.RFC3339, false, flow.Options{}, []any{accepted, end},
			`{"timestamp":"2026-11-21T12:00:00.000005000Z","level":"info","source":"cfnetworking.iptables","message":"cfnetworking.iptables.ingress-allowed","data":{"destination":` + api + `},` + lagerPacket + "}}\n"},
		{"deployed, old, out", flow.Epoch, false, flow.Options{}, []any{ping},
			`{"timestamp":"1795262400.000005000","source":"cfnetworking.iptables","message":"cfnetworking.iptables.egress-denied","log_level":1,"data":{"packet":{"direction":"egress","allowed":false,"src_ip":"10.255.30.2","dst_ip":"8.8.8.8","src_port":0,"dst_port":0,"protocol":"ICMP","mark":"","icmp_type":8,"icmp_code":0},"source":` + api + "}}}\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(strings.Split(c.want, "\n"), strings.Split(run(t, c.format, c.begun, c.o, c.happens...), "\n")); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func later(l flow.Logged, d time.Duration) flow.Logged {
	l.Time = l.Time.Add(d)
	return l
}

func TestWhy(t *testing.T) {
	out := packet(6, "10.255.30.2:1000", "93.184.216.34:443")
	for _, c := range []struct {
		l    flow.Logged
		want string
	}{
		{flow.Logged{Scope: flow.C2C, Detail: "no-policy", Mark: 1, Packet: packet(6, "10.255.7.9:1", "10.255.30.2:80")}, "no policy web -> api tcp 80"},
		{flow.Logged{Scope: flow.C2C, Detail: "no-policy", Mark: 1, Packet: packet(1, "10.255.7.9:1", "10.255.30.2:2048")}, "no policy web -> api icmp"},
		{flow.Logged{Verdict: flow.Accepted, Scope: flow.C2C, Mark: 1, Packet: packet(6, "10.255.7.9:1", "10.255.30.2:99")}, "policy web -> api tcp 99"},
		{flow.Logged{Scope: flow.Egress, Packet: out}, "no security group allows tcp to 93.184.216.34:443"},
		{flow.Logged{Scope: flow.Rate, Packet: out}, "too many new connections to tcp to 93.184.216.34:443"},
		{flow.Logged{Verdict: flow.Accepted, Scope: flow.Egress, Detail: "public", Packet: out}, "security group public"},
		{flow.Logged{Scope: flow.Host, Detail: "host-service", Packet: out}, "no service of the host that containers may reach"},
		{flow.Logged{Scope: flow.C2C, Detail: "new-reason", Packet: out}, "new-reason"},
	} {
		l := flow.New(flow.Options{})
		l.Know(book)
		got := ""
		l.Packet(c.l, func(r *flow.Record) { got = r.Why })
		if got != c.want {
			t.Errorf("%+v: %q, want %q", c.l, got, c.want)
		}
	}
}

// TestSpoofedSourceIsNobody: a source address that is not the sender's own names nobody.
func TestSpoofedSourceIsNobody(t *testing.T) {
	l := flow.New(flow.Options{})
	l.Know(book)
	l.Packet(flow.Logged{Scope: flow.C2C, Detail: "unknown-source", Packet: packet(6, "10.255.30.2:1", "10.255.30.3:2")}, func(r *flow.Record) {
		if r.From != nil || r.FromGroup != "" {
			t.Errorf("the record blames %+v %q", r.From, r.FromGroup)
		}
	})
}

// TestMemoryIsBounded: whatever comes, a Log remembers no more than it is told.
func TestMemoryIsBounded(t *testing.T) {
	l := flow.New(flow.Options{Open: 100, Denied: 100})
	records := 0
	p := packet(17, "10.0.0.1:1", "10.0.0.2:2")
	for i := range 10_000 {
		p.Source = netip.AddrPortFrom(p.Source.Addr(), uint16(i))
		l.Packet(flow.Logged{Time: noon, Verdict: flow.Accepted, Packet: p}, func(*flow.Record) { records++ })
		l.Packet(flow.Logged{Time: noon, Packet: p}, func(*flow.Record) { records++ })
	}
	if l.Open() != 100 || records != 20_000 {
		t.Errorf("%d open, %d records", l.Open(), records)
	}
}

func TestRetain(t *testing.T) {
	l := flow.New(flow.Options{})
	l.Know(book)
	lost, kept := packet(6, "10.255.7.9:1", "10.255.30.2:8080"), packet(6, "[fd00::1]:2", "[fd00::2]:80")
	for _, p := range []flow.Packet{lost, kept} {
		l.Packet(flow.Logged{Time: noon, Verdict: flow.Accepted, Packet: p}, func(*flow.Record) {})
	}
	var got []flow.Record
	retain := func(asked time.Time) {
		l.Retain(noon.Add(time.Minute), asked, func(p flow.Packet) bool { return p == kept }, func(r *flow.Record) { got = append(got, *r) })
	}
	retain(noon)
	retain(noon.Add(time.Second))
	if len(got) > 0 {
		t.Errorf("given up too soon: %+v", got)
	}
	retain(noon.Add(time.Second))
	if len(got) != 1 || got[0].Packet != lost || !got[0].EndUnknown || l.Open() != 1 {
		t.Errorf("given up: %+v, %d open", got, l.Open())
	}
}

func TestParsePacket(t *testing.T) {
	ipv4 := func(proto byte, rest ...byte) []byte {
		return append([]byte{0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}, rest...)
	}
	fragment := ipv4(17, 1, 2, 3, 4)
	fragment[7] = 9
	long := ipv4(6, 0, 0, 0, 0, 1, 2, 3, 4)
	long[0] = 0x46
	ipv6 := append([]byte{0x60, 0, 0, 0, 0, 8, 58, 64}, make([]byte, 36)...)
	ipv6[23], ipv6[39], ipv6[40] = 1, 2, 128
	for _, c := range []struct {
		name string
		b    []byte
		want flow.Packet
		ok   bool
	}{
		{"tcp", ipv4(6, 0x1f, 0x90, 0, 80, 9, 9), packet(6, "10.0.0.1:8080", "10.0.0.2:80"), true},
		{"options", long, packet(6, "10.0.0.1:258", "10.0.0.2:772"), true},
		{"icmp", ipv4(1, 8, 0, 0xff, 0xff, 0, 7), packet(1, "10.0.0.1:7", "10.0.0.2:2048"), true},
		{"gre", ipv4(47, 1, 2, 3, 4), packet(47, "10.0.0.1:0", "10.0.0.2:0"), true},
		{"fragment", fragment, packet(17, "10.0.0.1:0", "10.0.0.2:0"), true},
		{"cut short", ipv4(6, 1, 2, 3), packet(6, "10.0.0.1:0", "10.0.0.2:0"), true},
		{"ipv6", ipv6, packet(58, "[::1]:0", "[::2]:32768"), true},
		{"no header", ipv4(6)[:19], flow.Packet{}, false},
		{"short header", append([]byte{0x44}, ipv4(6)[1:]...), flow.Packet{}, false},
		{"header beyond the end", append([]byte{0x4f}, ipv4(6)[1:]...), flow.Packet{}, false},
		{"version", append([]byte{0x55}, ipv4(6)[1:]...), flow.Packet{}, false},
		{"nothing", nil, flow.Packet{}, false},
	} {
		if got, ok := flow.ParsePacket(c.b); got != c.want || ok != c.ok {
			t.Errorf("%s: %+v, %v, want %+v", c.name, got, ok, c.want)
		}
	}
}

func FuzzParsePacket(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4})
	f.Add([]byte{0x4f, 0, 0, 40, 0, 0, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4})
	f.Add(append([]byte{0x60}, make([]byte, 60)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := flow.ParsePacket(b)
		if !ok {
			return
		}
		if !p.Source.Addr().IsValid() || !p.Destination.Addr().IsValid() {
			t.Errorf("%x: %+v", b, p)
		}
		l := flow.New(flow.Options{})
		l.Know(book)
		for _, v := range []flow.Verdict{flow.Denied, flow.Accepted} {
			l.Packet(flow.Logged{Time: noon, Verdict: v, Packet: p}, func(r *flow.Record) {
				for _, f := range []flow.Format{flow.Lines, flow.RFC3339, flow.Epoch} {
					if line := f.Append(nil, site, r); !json.Valid(line) {
						t.Errorf("%x: %s", b, line)
					}
				}
			})
		}
	})
}

func BenchmarkRecord(b *testing.B) {
	l := flow.New(flow.Options{})
	l.Know(book)
	p := packet(6, "10.255.7.9:40000", "10.255.30.2:8081")
	var line []byte
	for i := 0; b.Loop(); i++ {
		p.Source = netip.AddrPortFrom(p.Source.Addr(), uint16(i))
		l.Packet(flow.Logged{Time: noon, Verdict: flow.Accepted, Scope: flow.C2C, Mark: 1, Packet: p}, func(*flow.Record) {})
		l.End(flow.End{Time: noon, Packet: p, Mark: 1, Start: noon, Last: noon}, func(r *flow.Record) { line = flow.Lines.Append(line[:0], site, r) })
	}
}
