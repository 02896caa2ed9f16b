package nft_test

import (
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// TestRebuildingLetsNothingThrough sends what no policy allows as fast as it can while the whole table is deleted and made again, as it is when
// others have changed what cannot be mended, or when a table gets an owner.
func TestRebuildingLetsNothingThrough(t *testing.T) {
	f := newFleet(t, nft.Options{Unowned: true})
	f.set(rule(1, 2, policy.UDP, 80, 80))
	rs := compile(t, f.in[0])
	f.tables[0].Close()
	h := f.w.Hosts[0]
	stop := make(chan struct{})
	var wg sync.WaitGroup
	sent := 0
	wg.Go(func() {
		p := f.packet(1, 0, 2, policy.UDP, 81)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := h.Send(p, false); err == nil {
				sent++
			}
		}
	})
	rounds := 200
	if testing.Short() {
		rounds = 50
	}
	for i := range rounds {
		table, err := nft.Open(h.NS, nft.Options{Unowned: i%2 == 1})
		if err != nil {
			t.Fatal(err)
		}
		set(t, table, rs)
		table.Close()
	}
	close(stop)
	wg.Wait()
	open := 0
	allowed := f.packet(1, 0, 2, policy.UDP, 80)
	if err := h.Send(allowed, false); err != nil {
		t.Fatal(err)
	}
	testkit.Within(t, 5*time.Second, func() string {
		wrong := "what is allowed did not arrive"
		h.Hear(func(p firewalltest.Packet) {
			switch p.Port {
			case 80:
				wrong = ""
			case 81:
				open++
			}
		})
		return wrong
	})
	t.Logf("%d packets sent during %d rebuilds", sent, rounds)
	if open > 0 {
		t.Errorf("%d packets that no policy allows passed", open)
	}
}
