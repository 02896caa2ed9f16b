package nft

import (
	"net/netip"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

// seeds are requests of our own, which the kernel's answers resemble.
func seeds() [][]byte {
	rs := firewall.Ruleset{Sources: []firewall.Source{{Address: netip.MustParseAddr("10.255.30.2"), Device: "s-010255030002", Tag: 7}}}
	f := frame{network: netip.MustParsePrefix("10.255.0.0/16"), vtep: "silk-vtep", connMask: tagMask}
	w := (&builder{}).wish(f, &rs, nil)
	var out [][]byte
	e := encoder{table: Name, flags: tableOwner | tablePersist}
	for _, c := range plan(w, &state{}, true) {
		e.b.Reset()
		e.change(c)
		out = append(out, append([]byte(nil), e.b.Bytes()[unix.NLMSG_HDRLEN:]...))
	}
	return out
}

// FuzzParse: nothing that the kernel, or whoever speaks in its place, says makes a parser fail badly.
func FuzzParse(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s, "allow-0007")
	}
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		canonical(b)
		parseChain(b)
		parseSet(b)
		parseCounter(b)
		for _, n := range []string{name, setSources, setDestinations, "allow-0007", "ranges-0007-0", "ports-x-0", "messages-l-x-0", "others-x-0", setOutside, "rates-1-1"} {
			x := set{name: n}
			if parseElements(b, &x) && kindOf(n) == nil {
				t.Errorf("elements of a set %q that is none of ours", n)
			}
			for _, e := range x.elems {
				_ = elementText(n, e)
			}
		}
		x, _ := parseForeignChain(b)
		parseForeignRule(b, []*foreignChain{&x})
		concerns(kernel.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(len(b)), Body: b}, 1)
	})
}

// FuzzAllowKey: the kernel's keys and ours are the same thing.
func FuzzAllowKey(f *testing.F) {
	f.Add(uint16(7), uint8(6), uint16(80), uint16(90))
	f.Fuzz(func(t *testing.T, tag uint16, proto uint8, first, last uint16) {
		a := firewall.Allow{Source: identity.Tag(tag), Protocol: policy.Protocol(proto), Ports: policy.Ports{First: first, Last: last}}
		for _, ranges := range []bool{false, true} {
			k, end := allowKey(a, first, ranges), allowKey(a, last, ranges)
			if got, ok := parseAllow(k[:], end[:], ranges); !ok || got != a {
				t.Errorf("%+v came back as %+v, %v", a, got, ok)
			}
		}
	})
}

// TestCanonicalTellsRulesApart: every rule that we have differs from every other in the form that is compared, but for those of the same text.
func TestCanonicalTellsRulesApart(t *testing.T) {
	seen := map[string]string{}
	chains := frame{network: netip.MustParsePrefix("10.255.0.0/16"), vtep: "silk-vtep", connMask: 0xffff0000, router: 7}.chains()
	for _, l := range []firewall.Limit{{Rate: 1, Burst: 1}, {Rate: 1, Burst: 2}, {Rate: 2, Burst: 2}, {Rate: 100, Burst: 1000, Log: true}, {Rate: 3, Burst: 3, Dry: true}} {
		chains = append(chains, frame{limit: l, log: logs{egress: true, group: 1, denied: 2, udp: 3}}.egress()...)
	}
	one, other := firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}), firewall.NewDeny([]netip.Prefix{netip.MustParsePrefix("11.0.0.0/8")})
	made := map[string][]string{one.ID(): {"ports-a-0", "ports-l-a-0", "messages-a-0", "others-a-0"}, other.ID(): {"ports-b-0", "messages-l-b-0", "others-l-b-0"}}
	chains = append(chains, reach(&firewall.Reach{ID: "x", Deny: one, Lists: []*firewall.List{other, one}}, made), reach(&firewall.Reach{ID: "y", Deny: other, Open: true}, made))
	for _, c := range append(chains, from(7, true), from(0x700, true), known(7), known(8), away("silk-vtep", 7), away("silk-vtep", 0x700), to(0xffff0000, 7, "allow-0007", rangesRule{"ranges-0007-0", 1}), to(0xffff0000, 8, "allow-0008", rangesRule{"shards-0008-4", 4})) {
		for _, r := range c.rules {
			if text, ok := seen[r.canon]; ok && text != r.text {
				t.Errorf("%q and %q are the same to a comparison", text, r.text)
			}
			seen[r.canon] = r.text
		}
	}
	if len(seen) < 40 {
		t.Errorf("%d rules", len(seen))
	}
}

// TestDifference: what is more and what is less lead from one list to the other.
func TestDifference(t *testing.T) {
	number := func(a, b int) int { return a - b }
	for _, x := range []struct{ want, have, more, less []int }{
		{[]int{1, 2, 3}, []int{1, 2, 3}, nil, nil},
		{[]int{1, 2, 3}, nil, []int{1, 2, 3}, nil},
		{nil, []int{1}, nil, []int{1}},
		{[]int{1, 3, 5, 9}, []int{1, 2, 5, 6, 9}, []int{3}, []int{2, 6}},
		{[]int{1, 1}, []int{1}, []int{1}, nil},
	} {
		more, less := difference(x.want, x.have, number)
		if !equal(more, x.more) || !equal(less, x.less) {
			t.Errorf("%v from %v: more %v, less %v", x.want, x.have, more, less)
		}
	}
}

func equal(a, b []int) bool {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

// TestWhatIsListedTwiceIsThereOnce: the kernel may do so while a hash table grows.
func TestWhatIsListedTwiceIsThereOnce(t *testing.T) {
	rs := firewall.Ruleset{
		Sources:      []firewall.Source{{Address: netip.MustParseAddr("10.255.30.2"), Device: "s-010255030002", Tag: 7}},
		Destinations: []firewall.Destination{{Address: netip.MustParseAddr("10.255.30.2"), Group: 7}},
		Groups:       []firewall.Group{{Tag: 7, Allowed: []firewall.Allow{{Source: 1, Protocol: policy.TCP, Ports: policy.Ports{First: 1, Last: 1}}}}},
	}
	w := (&builder{}).wish(frame{network: netip.MustParsePrefix("10.255.0.0/16"), vtep: "silk-vtep", connMask: tagMask}, &rs, nil)
	s := stateOf(w, true)
	for name, x := range s.sets {
		twice := set{name: name, allow: append(slices.Clone(x.allow), x.allow...), elems: append(slices.Clone(x.elems), x.elems...)}
		twice.arrange()
		s.sets[name] = &twice
	}
	for _, c := range plan(w, s, true) {
		t.Errorf("there is to do: %v", c)
	}
}
