package lease_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
	"github.com/google/go-cmp/cmp"
)

var epochStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// hosts returns the leases of hosts from to to-1, sorted.
func hosts(from, to int) []lease.Lease {
	var out []lease.Lease
	for i := from; i < to; i++ {
		out = append(out, of(fmt.Sprintf("10.0.0.%d", i), fmt.Sprintf("10.255.%d.0/24", i)))
	}
	return out
}

func full(epoch string, counter uint64, ls []lease.Lease) lease.Update {
	ls = slices.Clone(ls)
	lease.Sort(ls)
	return lease.Update{Revision: lease.Revision{Epoch: epoch, Counter: counter}, Full: true, Set: ls, Count: len(ls), Sum: lease.Digest(ls)}
}

// keeps fails the test unless p keeps exactly want at now.
func keeps(t *testing.T, p *lease.Peers, now time.Time, want []lease.Lease) {
	t.Helper()
	if diff := cmp.Diff(texts(want), texts(p.Keep(now))); diff != "" {
		t.Errorf("leases kept (-want +got):\n%s", diff)
	}
}

func texts(ls []lease.Lease) []string {
	out := []string{}
	for _, l := range ls {
		out = append(out, l.String())
	}
	return out
}

func update(t *testing.T, p *lease.Peers, u lease.Update, now time.Time) {
	t.Helper()
	if err := p.Update(u, now); err != nil {
		t.Fatal(err)
	}
}

func TestPeersDropAtOnceWithinAnEpoch(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 1, hosts(1, 5)), now)
	rest := hosts(2, 5)
	update(t, p, lease.Update{Revision: lease.Revision{Epoch: "a", Counter: 2}, Gone: []netip.Prefix{hosts(1, 2)[0].Subnet}, Count: 3, Sum: lease.Digest(rest)}, now)
	keeps(t, p, now, rest)
}

func TestPeersHoldRemovalsOnANewEpoch(t *testing.T) {
	for _, c := range []struct{ interval, hold time.Duration }{{30 * time.Second, 10 * time.Minute}, {5 * time.Minute, 15 * time.Minute}} {
		p, now := lease.NewPeers(c.interval), epochStart
		update(t, p, full("a", 9, hosts(1, 4)), now)
		// The restored database knows host 1 with another lease, host 3 not, host 5 in addition; host 7 has host 2's subnet.
		taken := of("10.0.0.7", "10.255.2.0/24")
		list := []lease.Lease{of("10.0.0.1", "10.255.9.0/24"), taken, hosts(5, 6)[0]}
		update(t, p, full("b", 1, list), now)
		held := append(slices.Clone(list), hosts(1, 2)[0], hosts(3, 4)[0])
		lease.Sort(held)
		keeps(t, p, now.Add(c.hold-time.Second), held)
		if p.Held() != 2 {
			t.Errorf("%d held, want 2", p.Held())
		}
		lease.Sort(list)
		keeps(t, p, now.Add(c.hold), list)
	}
}

func TestPeersHoldWhenTheCounterWentBack(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 9, hosts(1, 4)), now)
	update(t, p, full("a", 3, hosts(1, 2)), now)
	keeps(t, p, now.Add(9*time.Minute), hosts(1, 4))
	keeps(t, p, now.Add(10*time.Minute), hosts(1, 2))
}

func TestPeersYieldToWhoeverHoldsAPartOfTheirSubnet(t *testing.T) {
	for _, other := range []string{"10.255.2.128/25", "10.255.2.0/25", "10.255.2.7/32", "10.255.2.0/23", "10.255.0.0/17"} {
		p, now := lease.NewPeers(30*time.Second), epochStart
		update(t, p, full("a", 1, hosts(2, 3)), now)
		list := []lease.Lease{of("10.0.0.9", other)}
		update(t, p, full("b", 1, list), now)
		keeps(t, p, now, list)
	}
}

func TestPeersWithoutRevisionsGoAfterThreeLists(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	p.List(hosts(1, 4), true, now)
	p.List(hosts(1, 3), true, now)
	p.List(hosts(1, 3), true, now)
	p.List(hosts(1, 4), true, now) // back: counting starts again
	p.List(hosts(1, 3), true, now)
	p.List(hosts(1, 2), false, now) // incomplete: does not count
	p.List(nil, true, now)          // empty: does not count
	p.List(hosts(1, 3), true, now)
	keeps(t, p, now.Add(time.Hour), hosts(1, 4))
	p.List(hosts(1, 3), true, now)
	keeps(t, p, now, hosts(1, 3))
}

func TestPeersHoldTheRemovalOfMany(t *testing.T) {
	for _, c := range []struct {
		name      string
		had, left int
		held      bool
	}{{"a quarter of 12", 12, 9, false}, {"a third of 12", 12, 8, true}, {"most of 8", 8, 1, false}, {"three of 9", 9, 6, true}} {
		now := epochStart
		lists, watch := lease.NewPeers(30*time.Second), lease.NewPeers(30*time.Second)
		lists.List(hosts(1, 1+c.had), true, now)
		for range 3 {
			lists.List(hosts(1, 1+c.left), true, now)
		}
		update(t, watch, full("a", 1, hosts(1, 1+c.had)), now)
		update(t, watch, full("a", 2, hosts(1, 1+c.left)), now)
		for kind, p := range map[string]*lease.Peers{"list": lists, "watch": watch} {
			t.Run(c.name+"/"+kind, func(t *testing.T) {
				now := now
				if c.held {
					keeps(t, p, now.Add(10*time.Minute-time.Second), hosts(1, 1+c.had))
					now = now.Add(10 * time.Minute)
				}
				keeps(t, p, now, hosts(1, 1+c.left))
			})
		}
	}
}

func TestPeersNeverGoBecauseOfAnEmptyList(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 1, hosts(1, 4)), now)
	update(t, p, full("a", 2, nil), now)
	update(t, p, full("b", 1, nil), now)
	for range 5 {
		p.List(nil, true, now)
	}
	keeps(t, p, now.Add(1000*time.Hour), hosts(1, 4))
	update(t, p, full("b", 2, hosts(1, 2)), now)
	keeps(t, p, now.Add(time.Hour), hosts(1, 2))
}

func TestPeersAskForAFullListAfterABadOne(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 1, hosts(1, 4)), now)
	bad := full("a", 2, hosts(1, 3))
	bad.Set = bad.Set[:1]
	if err := p.Update(bad, now); !errors.Is(err, fault.Invalid) || !p.Revision().IsZero() {
		t.Errorf("a cut list: %v, revision %v", err, p.Revision())
	}
	keeps(t, p, now.Add(time.Hour), hosts(1, 4))
	other := lease.Update{Revision: lease.Revision{Epoch: "c", Counter: 1}, Set: hosts(7, 8), Count: 4, Sum: "x"}
	if err := p.Update(other, now); !errors.Is(err, fault.Invalid) {
		t.Errorf("changes to a list of another epoch: %v, want an Invalid fault", err)
	}
}

func TestPeersSurviveAClockThatWentBack(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 1, hosts(1, 4)), now)
	update(t, p, full("b", 1, hosts(1, 2)), now)
	back := now.Add(-1000 * time.Hour)
	keeps(t, p, back, hosts(1, 4))
	keeps(t, p, back.Add(10*time.Minute), hosts(1, 2))
}

func TestPeersKeepPathsThatWereThereBefore(t *testing.T) {
	p, now := lease.NewPeers(30*time.Second), epochStart
	update(t, p, full("a", 1, hosts(1, 3)), now)
	p.Adopt(append(hosts(2, 5), of("10.0.0.9", "10.255.1.0/25"), lease.Lease{}), now)
	keeps(t, p, now.Add(9*time.Minute), hosts(1, 5))
	keeps(t, p, now.Add(10*time.Minute), hosts(1, 3))

	fresh := lease.NewPeers(30 * time.Second)
	fresh.Adopt(hosts(1, 4), now)
	keeps(t, fresh, now.Add(1000*time.Hour), hosts(1, 4))
	now = now.Add(1000 * time.Hour)
	update(t, fresh, full("a", 1, hosts(1, 2)), now)
	keeps(t, fresh, now.Add(9*time.Minute), hosts(1, 4))
	keeps(t, fresh, now.Add(10*time.Minute), hosts(1, 2))
}

// stored sends p's state through JSON.
func stored(t testing.TB, p *lease.Peers) *lease.Peers {
	b, err := json.Marshal(p.State())
	if err != nil {
		t.Fatal(err)
	}
	var s lease.PeersState
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return s.Restore(30 * time.Second)
}

// TestPeersRandomWalk feeds random lists to Peers and to a copy that is stored and restored before each, and checks what must
// always hold: the list is kept whole, nothing kept overlaps it, nothing goes before its time, all goes in the end.
func TestPeersRandomWalk(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 1))
		p, now := lease.NewPeers(30*time.Second), epochStart
		twin := lease.NewPeers(30 * time.Second)
		epoch, counter := "e0", uint64(0)
		missingSince := map[netip.Prefix]time.Time{} // first list, of a new epoch or without revision, without it
		var list []lease.Lease
		for step := range 60 {
			now = now.Add(time.Duration(r.IntN(300)) * time.Second)
			before := p.Keep(now)
			next := mutate(r, list)
			op := r.IntN(10)
			newEpoch := op == 0
			if newEpoch {
				epoch = fmt.Sprintf("e%d", step+1)
			}
			counter++
			twin = stored(t, twin)
			for _, x := range []*lease.Peers{p, twin} {
				switch {
				case op < 7:
					update(t, x, full(epoch, counter, next), now)
				case op < 9:
					x.List(next, true, now)
				default:
					x.List(next, false, now)
				}
			}
			got := p.Keep(now)
			if diff := cmp.Diff(texts(got), texts(twin.Keep(now))); diff != "" {
				t.Fatalf("seed %d step %d: restored Peers differ (-kept +restored):\n%s", seed, step, diff)
			}
			check(t, fmt.Sprintf("seed %d step %d op %d", seed, step, op), before, next, got, newEpoch || op >= 7, missingSince, now)
			if len(next) > 0 && op < 9 {
				list = next
			}
		}
		counter++
		update(t, p, full("end", counter, hosts(1, 3)), now)
		keeps(t, p, now.Add(10*time.Minute), hosts(1, 3))
	}
}

// check compares what is kept before and after a list. careful says that the list may not remove at once.
func check(t *testing.T, at string, before, next, got []lease.Lease, careful bool, since map[netip.Prefix]time.Time, now time.Time) {
	t.Helper()
	for _, l := range next {
		delete(since, l.Subnet)
		if !slices.Contains(got, l) {
			t.Fatalf("%s: listed %v is not kept", at, l)
		}
	}
	for _, l := range got {
		for _, n := range next {
			if l != n && l.Subnet.Overlaps(n.Subnet) {
				t.Fatalf("%s: %v is kept beside %v", at, l, n)
			}
		}
	}
	for _, l := range before {
		if slices.Contains(got, l) || slices.ContainsFunc(next, func(n lease.Lease) bool { return n.Subnet.Overlaps(l.Subnet) }) {
			continue
		}
		first, ok := since[l.Subnet]
		if careful && !ok || len(next) == 0 {
			t.Fatalf("%s: %v went with the first list without it, at %v (since %v)", at, l, now, first)
		}
	}
	for _, l := range got {
		if _, ok := since[l.Subnet]; !ok && !slices.Contains(next, l) {
			since[l.Subnet] = now
		}
	}
}

// mutate returns a list of hosts near the one given; now and then an empty one.
func mutate(r *rand.Rand, list []lease.Lease) []lease.Lease {
	if r.IntN(12) == 0 {
		return nil
	}
	out := slices.DeleteFunc(slices.Clone(list), func(lease.Lease) bool { return r.IntN(6) == 0 })
	for range r.IntN(5) {
		s := fmt.Sprintf("10.255.%d.0/24", 1+r.IntN(25))
		l := of(fmt.Sprintf("10.0.0.%d", 1+r.IntN(40)), s)
		if !slices.ContainsFunc(out, func(o lease.Lease) bool { return o.Subnet == l.Subnet }) {
			out = append(out, l)
		}
	}
	if len(out) == 0 {
		out = hosts(30, 31)
	}
	lease.Sort(out)
	return out
}

func FuzzPeersState(f *testing.F) {
	p := lease.NewPeers(time.Second)
	p.List(hosts(1, 4), true, epochStart)
	p.List(hosts(1, 2), true, epochStart)
	b, _ := json.Marshal(p.State())
	f.Add(b)
	f.Add([]byte(`{"leases":[{"Underlay":"10.0.0.1","Subnet":"10.255.1.9/24","MAC":"ee:ee:0a:ff:01:00"}],"absent":[{"lists":-5}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s lease.PeersState
		if json.Unmarshal(b, &s) != nil {
			return
		}
		p := s.Restore(time.Second)
		for _, l := range p.Keep(epochStart) {
			if l.Subnet != l.Subnet.Masked() || !l.Underlay.IsValid() {
				t.Fatalf("restored %v", l)
			}
		}
		if diff := cmp.Diff(texts(p.Keep(epochStart)), texts(stored(t, p).Keep(epochStart))); diff != "" {
			t.Fatal(diff)
		}
	})
}
