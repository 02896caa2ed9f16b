package nft_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// walk sets states one after the other, by a table that now and then is closed and opened again as if its program were restarted. What it returns is closed when
// that is over, at the latest with the test.
func walk(t *testing.T, table *nft.Table, ns *kernel.NS, states <-chan firewall.Ruleset) (done <-chan struct{}) {
	over := make(chan struct{})
	t.Cleanup(func() { <-over })
	go func() {
		defer close(over)
		for rs := range states {
			if _, err := table.Set(t.Context(), rs); err != nil {
				t.Error(err)
				return
			}
			if rand.IntN(10) == 0 {
				table.Close()
				var err error
				if table, err = nft.Open(ns, nft.Options{}); err != nil {
					t.Error(err)
					return
				}
			}
		}
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	}()
	return over
}

// TestNoMomentOpenOrCut sends without pause while everything that does not concern the packets changes, and the writer of the table with it: what is allowed
// always arrives, and nothing else ever does.
func TestNoMomentOpenOrCut(t *testing.T) {
	f := newFleet(t, nft.Options{})
	always := []policy.Rule{rule(1, 2, policy.UDP, 80, 80), rule(1, 2, policy.UDP, 90, 99)}
	f.set(always...)
	h := f.w.Hosts[0]
	steps := 300
	if testing.Short() {
		steps = 60
	}
	states := make(chan firewall.Ruleset, steps)
	for range steps {
		in := f.in[0]
		in.Rules = always[:len(always):len(always)]
		for range rand.IntN(40) {
			first := uint16(100 + rand.IntN(60000))
			in.Rules = append(in.Rules, rule(identity.Tag(1+rand.IntN(9)), identity.Tag(1+rand.IntN(9)), policy.TCP, first, first+uint16(rand.IntN(2)*rand.IntN(4000))))
		}
		if rand.IntN(4) == 0 {
			in.Rules = append(in.Rules, rule(50, 2, policy.UDP, 1, 65535), rule(2, 50, policy.UDP, 1, 65535))
		}
		if rand.IntN(3) == 0 {
			in.Router, in.Services = 0x99, []firewall.Service{{Protocol: policy.TCP, Address: h.Address(9), Port: 9}}
		}
		states <- compile(t, in)
	}
	close(states)
	done := walk(t, f.tables[0], h.NS, states)
	good, bad, arrived := map[firewalltest.Packet]bool{}, map[firewalltest.Packet]bool{}, map[firewalltest.Packet]bool{}
	hear := func() {
		if err := h.Hear(func(p firewalltest.Packet) { p.Device = ""; arrived[p] = true }); err != nil {
			t.Fatal(err)
		}
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		for _, x := range []struct {
			from int
			port uint16
			to   map[firewalltest.Packet]bool
		}{{1, 80, good}, {1, 95, good}, {1, 81, bad}, {1, 100, bad}, {3, 80, bad}, {4, 80, bad}} {
			p := f.packet(x.from, 0, 2, policy.UDP, x.port)
			if f.port > 60000 {
				f.port = 20000
			}
			if err := h.Send(p, false); err != nil {
				t.Fatal(err)
			}
			p.Device = ""
			x.to[p] = true
		}
		hear()
	}
	testkit.Within(t, 2*time.Second, func() string {
		hear()
		for p := range good {
			if !arrived[p] {
				return p.Source.String() + " was cut off for a moment"
			}
		}
		return ""
	})
	for p := range arrived {
		if bad[p] && !good[p] {
			t.Errorf("%+v passed", p)
		}
	}
	t.Logf("%d allowed packets, %d others", len(good), len(bad))
}
