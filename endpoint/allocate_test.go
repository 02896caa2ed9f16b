package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

func nobody(netip.Addr) (string, error) { return "", nil }

// held returns the names of records that have these addresses, and of what is no record but looks like one.
func held(addrs ...string) listing {
	list := listing{".lock", ".tmp-10.255.30.8", "10.255.30.8", "silk@10.255.30.8@eth0@10.255.30.80", "silk@c@eth0@210.255.30.8", "a+b@10.255.30.8"}
	for i, a := range addrs {
		list = append(list, Key{"silk", fmt.Sprintf("c%d", i), "eth0"}.file([]netip.Prefix{netip.PrefixFrom(netip.MustParseAddr(a), 32)}))
	}
	return list
}

func TestChoose(t *testing.T) {
	for _, tt := range []struct {
		subnet, requested, last string
		taken                   listing
		routed                  string
		want                    string
		kind                    fault.Kind
	}{
		{subnet: "10.255.30.0/24", want: "10.255.30.2"},
		{subnet: "10.255.30.0/24", last: "10.255.30.2", want: "10.255.30.3"},
		{subnet: "10.255.30.0/24", last: "10.255.30.254", want: "10.255.30.1"},
		{subnet: "10.255.30.0/24", last: "10.255.99.7", want: "10.255.30.2"},
		{subnet: "10.255.30.0/24", last: "10.255.30.255", want: "10.255.30.2"},
		{subnet: "10.255.30.0/24", last: "10.255.30.5", taken: held("10.255.30.6", "10.255.30.7"), want: "10.255.30.8"},
		{subnet: "10.255.30.0/24", last: "10.255.30.5", taken: held("10.255.30.6"), routed: "10.255.30.7", want: "10.255.30.8"},
		{subnet: "10.255.30.0/24", requested: "10.255.30.9", want: "10.255.30.9"},
		{subnet: "10.255.30.0/24", requested: "10.255.30.1", want: "10.255.30.1"},
		{subnet: "10.255.30.0/24", requested: "10.255.30.9", taken: held("10.255.30.9"), kind: fault.Conflict},
		{subnet: "10.255.30.0/24", requested: "10.255.30.9", routed: "10.255.30.9", kind: fault.Conflict},
		{subnet: "10.255.30.0/24", requested: "10.255.30.0", kind: fault.Invalid},
		{subnet: "10.255.30.0/24", requested: "10.255.30.255", kind: fault.Invalid},
		{subnet: "10.255.30.0/24", requested: "10.255.31.1", kind: fault.Invalid},
		{subnet: "10.255.30.4/30", want: "10.255.30.6"},
		{subnet: "10.255.30.4/30", taken: held("10.255.30.6"), want: "10.255.30.5"},
		{subnet: "10.255.30.4/30", taken: held("10.255.30.6", "10.255.30.5"), kind: fault.Exhausted},
		{subnet: "10.255.30.4/31", kind: fault.Exhausted},
		{subnet: "10.255.0.12/32", kind: fault.Exhausted},
		{subnet: "0.0.0.0/0", want: "0.0.0.2"},
		{subnet: "fd00::/64", kind: fault.Invalid},
	} {
		c := choice{subnet: netip.MustParsePrefix(tt.subnet), taken: tt.taken}
		c.requested, _ = netip.ParseAddr(tt.requested)
		c.last, _ = netip.ParseAddr(tt.last)
		got, err := c.choose(func(a netip.Addr) (string, error) {
			if a.String() == tt.routed {
				return "device x", nil
			}
			return "", nil
		})
		switch {
		case tt.want != "" && (err != nil || got.String() != tt.want):
			t.Errorf("%+v: %v %v, want %s", tt, got, err, tt.want)
		case tt.want == "" && !errors.Is(err, tt.kind):
			t.Errorf("%+v: %v %v, want %v", tt, got, err, tt.kind)
		}
	}
}

func TestChooseGivesEveryAddressOnceAndFreedOnesLast(t *testing.T) {
	c := choice{subnet: netip.MustParsePrefix("10.255.30.0/24")}
	take := func() netip.Addr {
		t.Helper()
		a, err := c.choose(nobody)
		if err != nil {
			t.Fatal(err)
		}
		c.last = a
		c.taken = append(c.taken, Key{"silk", a.String(), "eth0"}.file([]netip.Prefix{netip.PrefixFrom(a, 32)}))
		return a
	}
	for range 100 {
		take()
	}
	gone, _ := parseName(c.taken[50])
	freed := gone.addresses[0]
	c.taken = slices.Delete(c.taken, 50, 51)
	for i := range 154 {
		if a := take(); a == freed {
			t.Fatalf("the freed address was the %dth to be given, others were free", i)
		}
	}
	if a := take(); a != freed {
		t.Errorf("the last address given is %v, want the freed %v", a, freed)
	}
	_, err := c.choose(nobody)
	for _, want := range []string{"10.255.30.0/24", "all 254 are taken", "254 endpoints of network silk", "10.255.30.1/eth0", "and 238 more"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("full: %v, want it to say %q", err, want)
		}
	}
}

func TestFullNamesForeignHolders(t *testing.T) {
	c := choice{subnet: netip.MustParsePrefix("10.255.30.0/29"), taken: held("10.255.30.1", "10.255.30.2", "10.9.9.9")}
	_, err := c.choose(func(a netip.Addr) (string, error) { return "device " + Device(a), nil })
	for _, want := range []string{"all 6 are taken", "2 endpoints of network silk", "4 routed by the kernel without a record", "10.255.30.3 by device s-010255030003", "10.255.30.1 by c0/eth0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want it to say %q", err, want)
		}
	}
}

func TestChooseAsksNoMoreWhenTheKernelFails(t *testing.T) {
	broken := errors.New("broken")
	c := choice{subnet: netip.MustParsePrefix("10.255.30.0/24")}
	if _, err := c.choose(func(netip.Addr) (string, error) { return "", broken }); !errors.Is(err, broken) {
		t.Errorf("%v, want the kernel's error", err)
	}
}

func TestNames(t *testing.T) {
	k := Key{"silk", "c-1", "a@b"}
	file := k.file([]netip.Prefix{netip.MustParsePrefix("10.255.30.2/32"), netip.MustParsePrefix("fd00::2/128")})
	if want := "silk@c-1@a@b@10.255.30.2+fd00::2"; file != want {
		t.Errorf("file %q, want %q", file, want)
	}
	e, ok := parseName(file)
	if !ok || e.key != k || len(e.addresses) != 2 {
		t.Errorf("parsed %+v %v", e, ok)
	}
	for _, a := range e.addresses {
		if got, ok := (listing{"silk@c-2@eth0@10.255.30.20", file}).holder(a); !ok || got.key != k {
			t.Errorf("%v is held by %v %v, want %v", a, got.key, ok, k)
		}
	}
	if _, ok := (listing{file}).find(Key{"silk", "c-1", "a"}); ok {
		t.Error("interface a was taken for a@b")
	}
	for _, bad := range []string{"", ".lock", ".x@c@eth0@10.0.0.1", "silk", "silk@c1@eth0", "silk@c1@eth0@", "silk@c1@@10.0.0.1", "@c1@eth0@10.0.0.1", "silk@@eth0@10.0.0.1", "silk@c1@eth0@010.0.0.1", "silk@c1@eth0@10.0.0.1+", "silk@c1@eth0@fe80::1%eth0"} {
		if e, ok := parseName(bad); ok {
			t.Errorf("%q was taken for a record's: %+v", bad, e)
		}
	}
}

func TestDevice(t *testing.T) {
	a := netip.MustParseAddr("10.255.30.2")
	if d := Device(a); d != "s-010255030002" {
		t.Errorf("device %q", d)
	}
	if got, ok := AddressOf("s-010255030002"); !ok || got != a {
		t.Errorf("address %v %v", got, ok)
	}
	for _, bad := range []string{"", "s-", "eth0", "s-01025503000", "s-0102550300022", "s-010256030002", "s-01025503000x", "c-010255030002"} {
		if got, ok := AddressOf(bad); ok {
			t.Errorf("%q was taken for %v's device", bad, got)
		}
	}
}

func FuzzParseName(f *testing.F) {
	f.Add("silk@c1@eth0@10.255.30.2")
	f.Add("silk@c1@a@b@10.255.30.2+fd00::2")
	f.Add("@@@")
	f.Fuzz(func(t *testing.T, name string) {
		e, ok := parseName(name)
		if !ok {
			return
		}
		var p []netip.Prefix
		for _, a := range e.addresses {
			p = append(p, netip.PrefixFrom(a, a.BitLen()))
		}
		if got := e.key.file(p); got != name {
			t.Fatalf("%q became %q", name, got)
		}
		if got, ok := (listing{name}).find(e.key); !ok || got.key != e.key {
			t.Fatalf("%q is not found by its own key", name)
		}
		for _, a := range e.addresses {
			if got, ok := (listing{name}).holder(a); !ok || got.file != name {
				t.Fatalf("%q is not found by its address %v", name, a)
			}
		}
		recordOf(e)
	})
}

func FuzzDecode(f *testing.F) {
	r := Record{Key: Key{"silk", "c1", "eth0"}, Addresses: []netip.Prefix{netip.MustParsePrefix("10.255.30.2/32")}, Metadata: json.RawMessage(`{}`)}
	r.name()
	good, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good))
	f.Add(`{}`)
	f.Add(`{"addresses":[null]}`)
	e, _ := parseName("silk@c1@eth0@10.255.30.2")
	f.Fuzz(func(t *testing.T, content string) {
		r, err := decode(strings.NewReader(content), e)
		if err == nil && (r.Key != e.key || r.Device != "s-010255030002") {
			t.Fatalf("%q passed for the record of %v: %+v", content, e.key, r)
		}
	})
}
