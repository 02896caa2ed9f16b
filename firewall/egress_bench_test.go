package firewall_test

import (
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

// BenchmarkNewList is about a list of 1,000 rules, as a container may have it.
func BenchmarkNewList(b *testing.B) {
	var rules []secgroup.Rule
	for i := range 1000 {
		first := netip.AddrFrom4([4]byte{20, byte(i >> 6), byte(i << 2), 3})
		last := netip.AddrFrom4([4]byte{20, byte(i >> 6), byte(i<<2) + byte(i%4), 250})
		rules = append(rules, secgroup.Rule{Protocol: []secgroup.Protocol{secgroup.TCP, secgroup.UDP}[i%2], Destinations: []secgroup.Range{{First: first, Last: last}},
			Ports: []policy.Ports{{First: uint16(i), Last: uint16(i + i%3)}}})
	}
	for b.Loop() {
		firewall.NewList(rules)
	}
}
