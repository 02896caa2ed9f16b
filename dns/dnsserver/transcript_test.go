package dnsserver_test

import (
	"bufio"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/registration"
)

var update = flag.Bool("update", false, "rewrite what the transcript says is answered")

func tell(t testing.TB, table *registration.Table, lines ...string) {
	t.Helper()
	for _, l := range lines {
		f := strings.Fields(l)
		r := registration.Registration{Name: registration.Name(f[0]), Address: netip.MustParseAddr(f[1]), Index: -1, Seen: time.Now()}
		for _, o := range f[2:] {
			key, v, _ := strings.Cut(o, "=")
			n, err := strconv.Atoi(v)
			if err != nil {
				t.Fatal(err)
			}
			if key == "port" {
				r.Port = uint16(n)
			} else {
				r.Index = n
			}
		}
		if _, err := table.Add(r); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTranscript asks what testdata/answers.txt asks, over real sockets, by both protocols.
func TestTranscript(t *testing.T) {
	const file = "testdata/answers.txt"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	table := registration.NewTable()
	var cold atomic.Bool
	s := start(t, dnsserver.Config{
		Table: table, Domains: []registration.Name{"apps.internal", "mesh.apps.internal", "star.internal"}, Warm: func() bool { return !cold.Load() },
		Reverse: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("10.0.16.0/20"), netip.MustParsePrefix("fd00::/12")},
	})
	var got, want strings.Builder
	asked := 0
	for in := bufio.NewScanner(strings.NewReader(string(b))); in.Scan(); {
		line := in.Text()
		if strings.HasPrefix(line, "  ") {
			fmt.Fprintln(&want, line)
			continue
		}
		fmt.Fprintln(&want, line)
		fmt.Fprintln(&got, line)
		switch word, rest, _ := strings.Cut(line, " "); word {
		case "register":
			tell(t, table, rest)
		case "cold":
			cold.Store(true)
		case "ask":
			asked++
			udp := transcribe(t, "udp", s.Addresses()[0], rest)
			if tcp := transcribe(t, "tcp", s.Addresses()[0], rest); tcp != udp {
				t.Errorf("%s: by tcp\n%s, by udp\n%s", rest, tcp, udp)
			}
			got.WriteString(udp)
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if diff := cmp.Diff(want.String(), got.String()); diff != "" || asked < 40 {
		t.Errorf("%d questions (-want +got):\n%s", asked, diff)
	}
}

// transcribe asks "NAME TYPE [OPTION...]" and returns the answer as text.
func transcribe(t *testing.T, network string, to netip.AddrPort, line string) string {
	t.Helper()
	f := strings.Fields(line)
	typ, ok := dns.StringToType[f[1]]
	if !ok {
		t.Fatalf("%s: no type", line)
	}
	resp := ask(t, network, to, f[0], typ, func(m *dns.Msg) {
		for _, o := range f[2:] {
			switch o {
			case "rd":
				m.RecursionDesired = true
			case "chaos":
				m.Question[0].Qclass = dns.ClassCHAOS
			case "anyclass":
				m.Question[0].Qclass = dns.ClassANY
			case "notify":
				m.Opcode = dns.OpcodeNotify
			case "two":
				m.Question = append(m.Question, m.Question[0])
			case "none":
				m.Question = nil
			case "edns":
				m.SetEdns0(1232, true)
			case "edns1":
				m.SetEdns0(1232, false)
				m.IsEdns0().SetVersion(1)
			case "options":
				m.SetEdns0(1232, false)
				m.IsEdns0().Option = []dns.EDNS0{
					&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")},
				}
			case "opts":
				m.SetEdns0(1232, false)
				m.Extra = append(m.Extra, m.Extra[0])
			default:
				t.Fatalf("%s: no option %s", line, o)
			}
		}
	})
	var out strings.Builder
	code := dns.RcodeToString[resp.Rcode]
	if resp.Rcode == dns.RcodeBadVers { // which is also BADSIG
		code = "BADVERS"
	}
	fmt.Fprintf(&out, "  %s", code)
	for _, fl := range []struct {
		on   bool
		name string
	}{{resp.Authoritative, "aa"}, {resp.Truncated, "tc"}, {resp.RecursionDesired, "rd"}, {resp.RecursionAvailable, "ra"}} {
		if fl.on {
			out.WriteString(" " + fl.name)
		}
	}
	if o := resp.IsEdns0(); o != nil {
		fmt.Fprintf(&out, " edns=%d version=%d do=%v options=%d", o.UDPSize(), o.Version(), o.Do(), len(o.Option))
	}
	out.WriteString("\n")
	for i, section := range [][]dns.RR{resp.Answer, resp.Ns, resp.Extra} {
		for _, r := range records(section) {
			fmt.Fprintf(&out, "    %s %s\n", [...]string{"answer", "authority", "additional"}[i], r)
		}
	}
	return out.String()
}
