package lease

import (
	"math"
	"net/netip"
	"testing"
)

// TestRenewalWritesWhenTheRowIsFromTheFuture is what a clock leaves behind that was ahead and has been put right.
func TestRenewalWritesWhenTheRowIsFromTheFuture(t *testing.T) {
	terms := Terms{Now: 1_000_000, Expiration: 1000, Fresh: 10}
	l := Lease{Underlay: netip.MustParseAddr("10.0.0.5"), Subnet: netip.MustParsePrefix("10.255.3.0/24")}
	l.MAC = MACOf(l.Subnet)
	for _, c := range []struct {
		renewed int64
		expired bool
		touch   bool
	}{
		{terms.Now, false, false}, {terms.Now + 1, false, false}, {terms.Now - 9, false, false}, {terms.Now - 10, false, true},
		{terms.Now + 3600, false, true}, {math.MaxInt64, false, true}, {terms.Now - 1000, true, false}, {math.MinInt64, true, false},
	} {
		row := Row{ID: 1, Lease: l, RenewedAt: c.renewed}
		if got := terms.Expired(row); got != c.expired {
			t.Errorf("renewed at %d: expired %v, want %v", c.renewed, got, c.expired)
		}
		if _, touch, settled := terms.Settle(smallPool(t), Request{Op: Renew, Lease: l}, &row); settled == c.expired || touch != c.touch {
			t.Errorf("renewed at %d: settled %v, touch %v, want touch %v", c.renewed, settled, touch, c.touch)
		}
	}
}

// TestNobodyIsGivenALeaseThatIsRefusedAfterwards asks for addresses that no host can have.
func TestNobodyIsGivenALeaseThatIsRefusedAfterwards(t *testing.T) {
	for _, a := range []string{"0.0.0.0", "224.0.0.5", "255.255.255.255", "::", "ff02::1", "::ffff:10.0.0.5", "fd00::1"} {
		host := netip.MustParseAddr(a)
		d := Decide(NewLedger(smallPool(t)), Terms{Now: 100, Expiration: 10}, nil, nil, []Request{{Op: Acquire, Lease: Lease{Underlay: host}}})
		if d.Verdicts[0].Err == nil {
			t.Errorf("host %s got %v", a, d.Verdicts[0].Lease)
		}
	}
}
