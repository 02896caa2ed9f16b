package nft_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/policy"
)

// host is a network namespace that stands for a machine.
type host struct {
	t  testing.TB
	ns *kernel.NS
}

func newHost(t testing.TB) *host {
	t.Helper()
	return &host{t, netns.New(t)}
}

// try runs shell commands on the host.
func (h *host) try(script string) (string, error) { return netns.Try(h.t, h.ns, script) }

func (h *host) sh(script string) string {
	h.t.Helper()
	return netns.Shell(h.t, h.ns, script)
}

// open opens the host's table; unowned so that others can be at it.
func (h *host) open(o nft.Options) *nft.Table {
	h.t.Helper()
	t, err := nft.Open(h.ns, o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { t.Close() })
	return t
}

func set(t testing.TB, table *nft.Table, rs firewall.Ruleset) nft.Changes {
	t.Helper()
	c, err := table.Set(context.Background(), rs)
	if err != nil {
		t.Fatalf("set: %v (%+v)", err, c)
	}
	return c
}

// holds fails the test unless the kernel has exactly what rs asks for.
func holds(t testing.TB, table *nft.Table, rs firewall.Ruleset) {
	t.Helper()
	lines, err := table.Plan(context.Background(), rs)
	if err != nil {
		t.Fatal(err)
	}
	if len(lines) > 0 {
		t.Fatalf("there is still to do:\n%s", strings.Join(lines, "\n"))
	}
}

func compile(t testing.TB, in firewall.Input) firewall.Ruleset {
	t.Helper()
	rs, problems := firewall.Compile(in)
	for _, p := range problems {
		t.Fatalf("problem: %v", p)
	}
	return rs
}

// rule is a policy between groups called by their tags: group 7 has tag 0007.
func rule(source, destination identity.Tag, proto policy.Protocol, first, last uint16) policy.Rule {
	return policy.Rule{
		Policy:    policy.Policy{Source: group(source), Destination: group(destination), Protocol: proto, Ports: policy.Ports{First: first, Last: last}},
		SourceTag: source, DestinationTag: destination,
	}
}

func group(tag identity.Tag) identity.Group {
	if tag == 0 {
		return ""
	}
	return identity.Group(fmt.Sprintf("group-%d", tag))
}

func endpoint(last byte, tag identity.Tag) firewall.Endpoint {
	return firewall.Endpoint{Device: fmt.Sprintf("s-010255030%03d", last), Address: netip.AddrFrom4([4]byte{10, 255, 30, last}), Group: group(tag)}
}

// example is a host with two applications, one of which has two instances.
func example() firewall.Input {
	return firewall.Input{
		Network: netip.MustParsePrefix("10.255.0.0/16"), VTEP: "silk-vtep",
		Endpoints: []firewall.Endpoint{endpoint(2, 1), endpoint(3, 2), endpoint(4, 2), endpoint(5, 0)},
		Rules: []policy.Rule{
			rule(1, 2, policy.TCP, 8080, 8080), rule(1, 2, policy.UDP, 53, 53), rule(3, 2, policy.TCP, 8000, 8100),
			rule(2, 2, policy.TCP, 7000, 7000), rule(2, 9, policy.TCP, 443, 443), rule(3, 1, policy.TCP, 9000, 9001),
		},
		Services: []firewall.Service{{Protocol: policy.TCP, Address: netip.MustParseAddr("10.0.16.15"), Port: 1443}},
		DNS:      []netip.Addr{netip.MustParseAddr("169.254.0.2"), netip.MustParseAddr("8.8.8.8")},
	}
}
