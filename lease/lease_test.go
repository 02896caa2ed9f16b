package lease_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

func of(underlay, subnet string) lease.Lease {
	p := netip.MustParsePrefix(subnet)
	return lease.Lease{Underlay: netip.MustParseAddr(underlay), Subnet: p, MAC: lease.MACOf(p)}
}

func TestMACOf(t *testing.T) {
	if got, want := lease.MACOf(netip.MustParsePrefix("10.255.30.0/24")).String(), "ee:ee:0a:ff:1e:00"; got != want {
		t.Errorf("MACOf = %v, want %v", got, want)
	}
}

func FuzzParseMAC(f *testing.F) {
	for _, s := range []string{"ee:ee:0a:ff:1e:00", "EE-EE-0A-FF-1E-00", "", "ee:ee:0a:ff:1e:0", "gg:ee:0a:ff:1e:00", "ee:ee-0a:ff:1e:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := lease.ParseMAC(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%q: %v is not fault.Invalid", s, err)
			}
			return
		}
		if again, err := lease.ParseMAC(m.String()); err != nil || again != m {
			t.Fatalf("%q: reading back %v gave %v, %v", s, m, again, err)
		}
	})
}

func FuzzParseRevision(f *testing.F) {
	for _, s := range []string{"", "a.1", "a-b.18446744073709551615", "a.18446744073709551616", ".1", "a.", "a.b.1", "a.+1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := lease.ParseRevision(s)
		if err != nil {
			return
		}
		if again, err := lease.ParseRevision(r.String()); err != nil || again != r {
			t.Fatalf("%q: reading back %v gave %v, %v", s, r, again, err)
		}
	})
}

func TestPool(t *testing.T) {
	p, err := lease.NewPool(netip.MustParsePrefix("10.255.0.0/16"), 24)
	if err != nil {
		t.Fatal(err)
	}
	if p.Size(lease.Block) != 255 || p.Size(lease.Single) != 255 {
		t.Errorf("sizes %d and %d, want 255 and 255", p.Size(lease.Block), p.Size(lease.Single))
	}
	for _, k := range []lease.Kind{lease.Block, lease.Single} {
		seen := map[netip.Prefix]bool{}
		for i := range p.Size(k) {
			m := p.At(k, i)
			kind, j, ok := p.Index(m)
			if !ok || kind != k || j != i || seen[m] {
				t.Fatalf("%v member %d is %v, whose index is %v %d %v", k, i, m, kind, j, ok)
			}
			seen[m] = true
		}
	}
	if got := p.At(lease.Single, 254).String(); got != "10.255.0.255/32" {
		t.Errorf("last single address is %v, want 10.255.0.255/32", got)
	}
	for _, s := range []string{"10.255.0.0/24", "10.255.0.0/32", "10.255.1.0/25", "10.254.1.0/24", "10.255.1.1/32", "10.255.1.1/24", "::/24"} {
		if p.Contains(netip.MustParsePrefix(s)) {
			t.Errorf("pool contains %v", s)
		}
	}
	whole, err := lease.NewPool(netip.MustParsePrefix("0.0.0.0/0"), 30)
	if err != nil || whole.Size(lease.Block) != 1<<30-1 {
		t.Errorf("pool of everything: %d blocks, %v", whole.Size(lease.Block), err)
	}
}

func TestPoolRefusesWhatItCannotCut(t *testing.T) {
	for _, c := range []struct {
		network string
		bits    int
	}{{"10.255.0.0/16", 16}, {"10.255.0.0/16", 31}, {"10.255.1.0/16", 24}, {"fd00::/64", 80}, {"10.255.0.0/16", 0}} {
		if _, err := lease.NewPool(netip.MustParsePrefix(c.network), c.bits); !errors.Is(err, fault.Invalid) {
			t.Errorf("NewPool(%v, %d): %v, want an Invalid fault", c.network, c.bits, err)
		}
	}
}

func TestUpdateMustAddUpToItsSeal(t *testing.T) {
	a, b, c := of("10.0.0.1", "10.255.1.0/24"), of("10.0.0.2", "10.255.2.0/24"), of("10.0.0.3", "10.255.3.0/24")
	want := []lease.Lease{b, c}
	u := lease.Update{Revision: lease.Revision{Epoch: "e", Counter: 7}, Set: []lease.Lease{c}, Gone: []netip.Prefix{a.Subnet}, Count: 2, Sum: lease.Digest(want)}
	got, err := u.Apply([]lease.Lease{a, b})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Apply = %v, %v, want %v", got, err, want)
	}
	if _, err := u.Apply([]lease.Lease{a}); !errors.Is(err, fault.Invalid) {
		t.Errorf("Apply over a wrong base: %v, want an Invalid fault", err)
	}
	if _, err := (lease.Update{Full: true, Count: 1}).Apply(nil); err == nil {
		t.Error("an empty full list sealed with 1 was believed")
	}
}

func TestValidate(t *testing.T) {
	good := of("10.0.0.1", "10.255.1.0/24")
	if err := good.Validate(); err != nil {
		t.Errorf("%v: %v", good, err)
	}
	for name, spoil := range map[string]func(*lease.Lease){
		"no underlay": func(l *lease.Lease) { l.Underlay = netip.Addr{} },
		"no subnet":   func(l *lease.Lease) { l.Subnet = netip.Prefix{} },
		"unmasked":    func(l *lease.Lease) { l.Subnet = netip.MustParsePrefix("10.255.1.1/24") },
		"other MAC":   func(l *lease.Lease) { l.MAC[5]++ },
	} {
		l := good
		spoil(&l)
		if err := l.Validate(); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v, want an Invalid fault", name, err)
		}
	}
}

// TestDigestIsOfTheText pins what clients and servers of different versions must agree on.
func TestDigestIsOfTheText(t *testing.T) {
	var ls []lease.Lease
	h := sha256.New()
	for i := range 1000 {
		l := of(fmt.Sprintf("10.0.%d.%d", i/256, i%256), fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
		if i == 500 {
			l = lease.Lease{}
		}
		ls = append(ls, l)
		fmt.Fprintf(h, "%v %v %v\n", l.Underlay, l.Subnet, l.MAC)
	}
	if got, want := lease.Digest(ls), hex.EncodeToString(h.Sum(nil)[:8]); got != want {
		t.Errorf("Digest = %v, want %v", got, want)
	}
}

func BenchmarkDigest10000(b *testing.B) {
	ls := make([]lease.Lease, 10000)
	for i := range ls {
		ls[i] = of(fmt.Sprintf("10.0.%d.%d", i/256, i%256), fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
	}
	for b.Loop() {
		lease.Digest(ls)
	}
}
