package overlay

import (
	"net/netip"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
)

// TestDevicesHaveTheNamesOfEndpoints: the set would be of no use otherwise.
func TestDevicesHaveTheNamesOfEndpoints(t *testing.T) {
	for _, text := range []string{"10.255.30.2", "0.0.0.0", "255.255.255.255", "10.0.99.100"} {
		a := netip.MustParseAddr(text)
		if got, want := deviceOf(a), endpoint.Device(a); got != want {
			t.Errorf("%v: %q, the device is called %q", a, got, want)
		}
	}
}

func TestPairsOfASubnet(t *testing.T) {
	for subnet, want := range map[string]struct {
		n           int
		first, last string
	}{
		"10.255.30.0/24":  {255, `"s-010255030001" . 10.255.30.1`, `"s-010255030255" . 10.255.30.255`},
		"10.255.30.64/30": {3, `"s-010255030065" . 10.255.30.65`, `"s-010255030067" . 10.255.30.67`},
		"10.255.4.0/22":   {1023, `"s-010255004001" . 10.255.4.1`, `"s-010255007255" . 10.255.7.255`},
		"10.255.8.0/21":   {}, // too many for one message
		"10.255.30.7/32":  {}, // the VTEP's own
	} {
		got := pairs(netip.MustParsePrefix(subnet))
		if len(got) != want.n {
			t.Errorf("%s: %d pairs, want %d", subnet, len(got), want.n)
		} else if want.n > 0 && (got[0].String() != want.first || got[want.n-1].String() != want.last) {
			t.Errorf("%s: from %v to %v", subnet, got[0], got[want.n-1])
		}
		if !samePairs(append(slices.Clone(got), got...), got) { // the kernel may list one twice
			t.Errorf("%s: the pairs are not sorted", subnet)
		}
		if samePairs(append(slices.Clone(got), pairOf(netip.MustParseAddr("10.255.9.9"))), got) {
			t.Errorf("%s: one more is the same", subnet)
		}
	}
}
