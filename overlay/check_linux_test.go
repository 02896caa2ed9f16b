package overlay_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/overlay"
)

func TestCheckHost(t *testing.T) {
	resolver := netip.MustParseAddr("10.0.16.2")
	for name, c := range map[string]struct {
		script   string
		change   func(*overlay.Config)
		resolver netip.Addr
		kind     fault.Kind // Internal: no error
		words    string
		warning  string
	}{
		"nothing":                    {},
		"route equal to the overlay": {script: "ip route add 10.255.0.0/16 dev wire", kind: fault.Conflict, words: "10.255.0.0/16"},
		"route inside":               {script: "ip route add 10.255.7.0/24 via 10.0.16.1", kind: fault.Conflict, words: "10.255.7.0/24 via 10.0.16.1"},
		"route in another table":     {script: "ip route add 10.255.7.0/24 via 10.0.16.1 table 77", kind: fault.Conflict, words: "10.255.7.0/24"},
		"bridge of another":          {script: "ip addr add 10.255.9.1/24 dev wire", kind: fault.Conflict, words: "wire"},
		"address of another":         {script: "ip addr add 10.255.9.1/32 dev lo", kind: fault.Conflict, words: "10.255.9.1/32"},
		"blackhole":                  {script: "ip route add blackhole 10.255.9.0/24", kind: fault.Conflict, words: "10.255.9.0/24"},
		"multipath":                  {script: "ip route add 10.255.9.0/24 nexthop via 10.0.16.1 nexthop via 10.0.16.2", kind: fault.Conflict, words: "10.255.9.0/24"},
		"ours elsewhere":             {script: "ip route add blackhole 10.255.30.0/24 proto 83"},
		"local containers":           {script: "ip link add s-010255030002 type veth peer name c0; ip link set s-010255030002 up; ip route add 10.255.30.2/32 dev s-010255030002"},
		"container of another subnet": {script: "ip link add s-010255031002 type veth peer name c0; ip link set s-010255031002 up; ip route add 10.255.31.2/32 dev s-010255031002",
			kind: fault.Conflict, words: "s-010255031002"},
		"containers before any lease": {script: "ip link add s-010255031002 type veth peer name c0; ip link set s-010255031002 up; ip route add 10.255.31.2/32 dev s-010255031002",
			change: func(c *overlay.Config) { c.Local.Subnet = netip.Prefix{} }},
		"containing route":    {script: "ip route add 10.0.0.0/8 via 10.0.16.1", warning: "10.0.0.0/8"},
		"default route":       {script: "ip route add default via 10.0.16.1; ip route add default via 10.0.16.1 table 77"},
		"underlay inside":     {change: func(c *overlay.Config) { c.Network = netip.MustParsePrefix("10.0.0.0/8") }, kind: fault.Invalid, words: "underlay address 10.0.16.15"},
		"resolver inside":     {resolver: netip.MustParseAddr("10.255.1.1"), kind: fault.Invalid, words: "resolver 10.255.1.1"},
		"rule on our mark":    {script: "ip rule add fwmark 0x10 lookup 77", kind: fault.Conflict, words: "fwmark 0x10"},
		"rule on part of it":  {script: "ip rule add fwmark 0x200/0xf00 lookup 77", kind: fault.Conflict, words: "0x200/0xf00"},
		"rule on other marks": {script: "ip rule add fwmark 0x80000/0xff0000 lookup 52"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "10.0.16.15")
			h.sh("true; " + c.script)
			cfg := example()
			if c.change != nil {
				c.change(&cfg)
			}
			if !c.resolver.IsValid() {
				c.resolver = resolver
			}
			warnings, err := h.f.CheckHost(context.Background(), cfg, []netip.Addr{c.resolver})
			if (err != nil) != (c.kind != fault.Internal) || fault.Of(err) != c.kind || err != nil && !strings.Contains(err.Error(), c.words) {
				t.Errorf("check: %v, want a fault of kind %v that names %q", err, c.kind, c.words)
			}
			if got := strings.Join(warnings, "\n"); (got == "") != (c.warning == "") || !strings.Contains(got, c.warning) {
				t.Errorf("warnings %q, want one that names %q", warnings, c.warning)
			}
		})
	}
}

func TestCheckHostAcceptsItsOwnOverlay(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	h.set(example())
	warnings, err := h.f.CheckHost(context.Background(), example(), nil)
	if err != nil || len(warnings) > 0 {
		t.Errorf("check of a host with an overlay: %v, %q", err, warnings)
	}
}
