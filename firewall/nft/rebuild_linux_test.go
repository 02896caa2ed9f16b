package nft_test

import (
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// floods makes container 1 of host 0 send what no policy allows to container 2 as fast as it can while change runs, and fails the test if any of it
// passes.
func (f *fleet) floods(change func()) {
	f.t.Helper()
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
	change()
	close(stop)
	wg.Wait()
	open := 0
	if err := h.Send(f.packet(1, 0, 2, policy.UDP, 80), false); err != nil {
		f.t.Fatal(err)
	}
	testkit.Within(f.t, 5*time.Second, func() string {
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
	if open > 0 {
		f.t.Errorf("%d of %d packets that no policy allows passed", open, sent)
	}
}

func rounds(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}

// TestRebuildingLetsNothingThrough is about the whole table deleted and made again, as it is when others have changed what cannot be mended, or when a
// table gets an owner.
func TestRebuildingLetsNothingThrough(t *testing.T) {
	f := newFleet(t, nft.Options{Unowned: true})
	f.set(rule(1, 2, policy.UDP, 80, 80))
	rs := compile(t, f.in[0])
	f.tables[0].Close()
	f.floods(func() {
		for i := range rounds(100) {
			table, err := nft.Open(f.w.Hosts[0].NS, nft.Options{Unowned: i%2 == 1})
			if err != nil {
				t.Fatal(err)
			}
			set(t, table, rs)
			table.Close()
		}
	})
}

// TestAFirstPolicyLetsNothingElseThrough: a packet may find an element of a change whose chain has no rules for it yet, because it began its way
// through the table before.
func TestAFirstPolicyLetsNothingElseThrough(t *testing.T) {
	f := newFleet(t, nft.Options{})
	f.set(rule(1, 2, policy.UDP, 80, 80))
	one := compile(t, f.in[0])
	f.in[0].Rules = nil
	none := compile(t, f.in[0])
	f.in[0].Rules = []policy.Rule{rule(1, 2, policy.UDP, 70, 80), rule(3, 1, policy.UDP, 1, 1)}
	ranges := compile(t, f.in[0])
	f.floods(func() {
		for i := range rounds(3000) {
			set(t, f.tables[0], []firewall.Ruleset{none, one, none, ranges}[i%4])
		}
		set(t, f.tables[0], one)
	})
}
