package registration_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
	"github.com/google/go-cmp/cmp"
)

func TestParseName(t *testing.T) {
	for in, want := range map[string]registration.Name{"a": "a", "Api.Apps.Internal.": "api.apps.internal", "0.api.apps.internal": "0.api.apps.internal", "*.apps.internal": "*.apps.internal", "_http._tcp.a": "_http._tcp.a"} {
		if got, err := registration.ParseName(in); err != nil || got != want {
			t.Errorf("ParseName(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", ".", "*", "a..b", ".a", "-a.b", "a-.b", "a b", "a\n", "é.b", "a.*.b", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a", "a/b"} {
		if got, err := registration.ParseName(in); !errors.Is(err, fault.Invalid) {
			t.Errorf("ParseName(%q) = %q, %v, want an Invalid fault", in, got, err)
		}
	}
}

func reg(name, address string, index int) registration.Registration {
	return registration.Registration{Name: registration.Name(name), Address: netip.MustParseAddr(address), Index: index}
}

func TestLookup(t *testing.T) {
	table := registration.NewTable()
	for _, r := range []registration.Registration{
		reg("api.apps.internal", "10.255.0.1", 0), reg("api.apps.internal", "10.255.0.2", 1), reg("7.api.apps.internal", "10.255.0.3", -1), reg("*.web.apps.internal", "10.255.0.4", -1),
	} {
		if !table.Register(r) || table.Register(r) {
			t.Errorf("%v: told of twice, it is expected to be new once", r)
		}
	}
	for name, want := range map[registration.Name][]string{
		"api.apps.internal": {"10.255.0.1", "10.255.0.2"}, "1.api.apps.internal": {"10.255.0.2"}, "7.api.apps.internal": {"10.255.0.3"},
		"a.web.apps.internal": {"10.255.0.4"}, "a.b.web.apps.internal": {"10.255.0.4"},
		"01.api.apps.internal": nil, "2.api.apps.internal": nil, "web.apps.internal": nil, "apps.internal": nil, "x": nil,
	} {
		list, ok := table.Lookup(name)
		var got []string
		for _, r := range list {
			got = append(got, r.Address.String())
		}
		if diff := cmp.Diff(want, got); diff != "" || ok != (want != nil) {
			t.Errorf("%s, found %v (-want +got):\n%s", name, ok, diff)
		}
	}
}

func TestPrune(t *testing.T) {
	table, now := registration.NewTable(), time.Unix(1000, 0)
	for i, name := range []string{"old", "both", "both", "new"} {
		r := reg(name, netip.AddrFrom4([4]byte{10, 255, 0, byte(i)}).String(), -1)
		r.Seen = now.Add(time.Duration(i/2) * time.Minute)
		table.Register(r)
	}
	turn := table.Turn()
	if n := table.Prune(now.Add(time.Second)); n != 2 || table.Turn() == turn {
		t.Errorf("%d registrations pruned, want 2, and the turn to change", n)
	}
	if names, all := table.Len(); names != 2 || all != 2 {
		t.Errorf("%d names and %d registrations are left, want 2 and 2", names, all)
	}
	if _, ok := table.Lookup("old"); ok {
		t.Error("a name without registrations is still there")
	}
}
