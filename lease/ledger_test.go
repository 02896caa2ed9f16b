package lease

import (
	"net/netip"
	"testing"
)

func smallPool(t *testing.T) Pool {
	t.Helper()
	p, err := NewPool(netip.MustParsePrefix("10.255.0.0/20"), 24)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestFreedSubnetsDoNotPileUp gives one subnet to a host and takes it back for as long as a controller may run.
func TestFreedSubnetsDoNotPileUp(t *testing.T) {
	g := NewLedger(smallPool(t))
	l := Lease{Underlay: netip.MustParseAddr("10.0.0.5"), Subnet: netip.MustParsePrefix("10.255.3.0/24")}
	other := Entry{Lease: Lease{Underlay: netip.MustParseAddr("10.0.0.6"), Subnet: netip.MustParsePrefix("10.255.4.0/24")}, State: Free, FreedAt: 7}
	g.Set(other)
	for n := range int64(100_000) {
		g.Set(Entry{Lease: l, State: Active})
		g.Set(Entry{Lease: l, State: Free, FreedAt: 10 + n})
	}
	if n := len(g.freed[Block]); n > 3000 {
		t.Errorf("%d items are kept for two free subnets", n)
	}
	if p, ok := g.oldestFreed(Block); !ok || p != other.Subnet {
		t.Errorf("the longest free is %v, want %v", p, other.Subnet)
	}
}

func TestReused(t *testing.T) {
	g := NewLedger(smallPool(t))
	l := func(subnet string) Entry { return Entry{Lease: Lease{Subnet: netip.MustParsePrefix(subnet)}} }
	set := func(subnets ...string) bool {
		g.Begin()
		for _, s := range subnets {
			g.Set(l(s))
		}
		reused := g.Reused()
		g.Commit(1)
		return reused
	}
	if set("10.255.3.0/24", "10.255.4.0/24") {
		t.Error("subnets that were never used count as reused")
	}
	if !set("10.255.5.0/24", "10.255.4.0/24") {
		t.Error("a subnet that was used does not count as reused")
	}
}
