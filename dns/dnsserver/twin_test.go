package dnsserver_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/registration"
)

// twin answers from a list, by going through it again and again, as the documents say: the code and the sorted data of the answer.
type twin struct{ all []registration.Registration }

// of returns what is registered for exactly this name.
func (w twin) of(name string) (list []registration.Registration) {
	for _, r := range w.all {
		if string(r.Name) == name {
			list = append(list, r)
		}
	}
	return list
}

// above reports whether something is registered below the name.
func (w twin) above(name string) bool {
	return slices.ContainsFunc(w.all, func(r registration.Registration) bool { return strings.HasSuffix(string(r.Name), "."+name) })
}

// stands returns the registrations that a name stands for.
func (w twin) stands(name string) []registration.Registration {
	if list := w.of(name); len(list) > 0 {
		return list
	}
	first, rest, _ := strings.Cut(name, ".")
	var one []registration.Registration
	for _, r := range w.of(rest) {
		if strconv.Itoa(r.Index) == first {
			one = append(one, r)
		}
	}
	if len(one) > 0 {
		return one
	}
	if w.above(name) {
		return nil
	}
	for rest != "" {
		if len(w.of(rest)) > 0 || w.above(rest) {
			return w.of("*." + rest)
		}
		_, rest, _ = strings.Cut(rest, ".")
	}
	return nil
}

// addressed returns the registration that a name made of an address stands for.
func (w twin) addressed(name string) []registration.Registration {
	first, rest, _ := strings.Cut(name, ".")
	for _, r := range w.stands(rest) {
		if r.Address.Is4() && strings.ReplaceAll(r.Address.String(), ".", "-") == first && strings.HasSuffix(rest, "apps.internal") {
			return []registration.Registration{r}
		}
	}
	return nil
}

// answer answers for a name in apps.internal.
func (w twin) answer(name string, typ uint16) (code string, data []string) {
	list, service := w.stands(name), false
	exact := len(w.of(name)) > 0
	labels := strings.Split(name, ".")
	behind := func(n int) string { // what follows so many labels, if that has addresses and is still in the domain
		if rest := strings.Join(labels[n:], "."); strings.HasSuffix(rest, "apps.internal") && len(w.stands(rest)) > 0 {
			return rest
		}
		return ""
	}
	switch {
	case exact:
	case len(labels) > 2 && labels[0][0] == '_' && labels[1] == "_tcp" && behind(2) != "":
		list, service = w.stands(behind(2)), true
	case labels[0] == "_tcp" && labels[1] != "_tcp" && behind(1) != "":
		return "NOERROR", nil
	case len(w.addressed(name)) > 0:
		list = w.addressed(name)
	}
	if len(list) == 0 && !w.above(name) && name != "apps.internal" {
		return "NXDOMAIN", nil
	}
	for _, r := range list {
		switch {
		case service && typ != dns.TypeSRV:
		case typ == dns.TypeA && r.Address.Is4(), typ == dns.TypeAAAA && r.Address.Is6():
			data = append(data, r.Address.String())
		case typ == dns.TypeSRV && r.Port > 0:
			data = append(data, fmt.Sprintf("%d %s", r.Port, r.Address))
		}
	}
	slices.Sort(data)
	return "NOERROR", data
}

// TestTwin: random tables, random questions; the server and its twin agree, and every SRV target resolves to the address that it is given
// with.
func TestTwin(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	labels := []string{"a", "b", "0", "1", "01", "_x", "_tcp", "10-255-0-1", "10-255-0-2", "x"}
	pick := func() string {
		var parts []string
		for range rnd.IntN(4) {
			parts = append(parts, labels[rnd.IntN(len(labels))])
		}
		return strings.Join(append(parts, "apps.internal"), ".")
	}
	answered := 0
	for round := range 40 {
		table, w := registration.NewTable(), twin{}
		s := start(t, dnsserver.Config{Domains: domains, Table: table})
		for range rnd.IntN(12) {
			name := pick()
			if rnd.IntN(4) == 0 {
				name = "*." + name
			}
			r := registration.Registration{Name: registration.Name(name), Index: rnd.IntN(4) - 1, Port: uint16(rnd.IntN(3))}
			r.Address = netip.AddrFrom4([4]byte{10, 255, 0, byte(rnd.IntN(4))})
			if rnd.IntN(5) == 0 {
				r.Address = netip.MustParseAddr("fd00::1")
			}
			if _, err := table.Add(r); err != nil {
				t.Fatal(err)
			}
			w.all = append(slices.DeleteFunc(w.all, func(o registration.Registration) bool { return o.Name == r.Name && o.Address == r.Address }), r)
		}
		for range 150 {
			name, typ := pick(), []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypeTXT}[rnd.IntN(4)]
			wantCode, want := w.answer(name, typ)
			resp := ask(t, "udp", s.Addresses()[0], name, typ, edns(1232))
			var got []string
			for _, rr := range resp.Answer {
				got = append(got, data(t, s, rr))
			}
			if slices.ContainsFunc(got, func(d string) bool { return strings.HasSuffix(d, " ?") }) {
				got, want = ports(got), ports(want)
			}
			slices.Sort(got)
			answered += len(got)
			if diff := cmp.Diff(want, got); diff != "" || dns.RcodeToString[resp.Rcode] != wantCode || (len(got) == 0) != (len(resp.Ns) == 1) {
				t.Fatalf("seed %d, round %d: %s %s: %v, want %s %v in\n%v", seed, round, name, dns.TypeToString[typ], resp, wantCode, want, w.all)
			}
		}
	}
	if answered < 100 {
		t.Errorf("only %d records were compared", answered)
	}
}

// data returns what the twin says of a record; an SRV record's target is looked up.
func data(t *testing.T, s *dnsserver.Server, rr dns.RR) string {
	t.Helper()
	switch rr := rr.(type) {
	case *dns.A:
		return rr.A.String()
	case *dns.AAAA:
		return rr.AAAA.String()
	case *dns.SRV:
		v4, v6 := ask(t, "udp", s.Addresses()[0], rr.Target, dns.TypeA), ask(t, "udp", s.Addresses()[0], rr.Target, dns.TypeAAAA)
		switch all := append(v4.Answer, v6.Answer...); len(all) {
		case 0:
		case 1:
			return fmt.Sprintf("%d %s", rr.Port, data(t, s, all[0]))
		default: // no name has this address alone
			return fmt.Sprintf("%d ?", rr.Port)
		}
	}
	return rr.String()
}

// ports leaves the addresses out.
func ports(data []string) (all []string) {
	for _, d := range data {
		port, _, _ := strings.Cut(d, " ")
		all = append(all, port)
	}
	slices.Sort(all)
	return all
}
