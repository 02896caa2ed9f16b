package policyagent

import (
	"context"
	"encoding/json"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/secgroup"
)

// hasty answers at once, and notes when it was asked.
type hasty struct {
	mu    sync.Mutex
	asked []time.Time
	flips bool // every answer is of another epoch than the one before
}

func (f *hasty) Watch(_ context.Context, ask secgroup.Ask) (secgroup.Update, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, time.Now())
	u := secgroup.Update{Full: ask.Since.IsZero() || f.flips, Sum: secgroup.Sum(nil)}
	u.Revision.Epoch, u.Revision.Counter = "e", 1
	if f.flips && len(f.asked)%2 == 0 {
		u.Revision.Epoch = "f"
	}
	return u, nil
}

// times returns when it was asked.
func (f *hasty) times() []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]time.Time{}, f.asked...)
}

// hears runs what hears of security groups, in a bubble of its own time, with questions about containers of a space.
func hears(t *testing.T, f *hasty, test func(t *testing.T, ask func(space string))) {
	synctest.Test(t, func(t *testing.T) {
		idle := func(context.Context) error { return nil }
		a := &agent{log: quiet, turn: make(chan struct{}), groupFeed: f, enforcement: &reconcile.Loop{Step: idle}, save: &reconcile.Loop{Step: idle}}
		a.cfg.ASGSyncing = true
		a.groups.held, a.groups.nudged = secgroup.NewHeld(watchWait), make(chan struct{}, 1)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.hearingGroups(ctx) }()
		test(t, func(space string) {
			metadata, _ := json.Marshal(map[string]string{"space_id": space})
			a.mu.Lock()
			a.askGroups(hosted{containers: []container{{metadata: metadata}}})
			a.mu.Unlock()
		})
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestAnotherQuestionIsFollowedByTheNextOneAtOnce: when a container of another space comes, and the answer about it changes nothing, a group that is
// bound right after it is not heard a second late. A server that has nothing to say is asked once a second.
func TestAnotherQuestionIsFollowedByTheNextOneAtOnce(t *testing.T) {
	f := &hasty{}
	hears(t, f, func(t *testing.T, ask func(string)) {
		ask("s1")
		reconcile.Sleep(t.Context(), 2500*time.Millisecond)
		before := len(f.times())
		if before > 5 {
			t.Errorf("%d questions in 2.5 s to a server that has nothing to say", before)
		}
		ask("s2")
		reconcile.Sleep(t.Context(), 500*time.Millisecond)
		if n := len(f.times()) - before; n != 2 {
			t.Errorf("%d questions in half a second after another question, expected that and the next one", n)
		}
	})
}

// TestServersThatContradictEachOtherAreAskedInMeasure: two databases behind one name make every answer news.
func TestServersThatContradictEachOtherAreAskedInMeasure(t *testing.T) {
	f := &hasty{flips: true}
	hears(t, f, func(t *testing.T, ask func(string)) {
		ask("s1")
		reconcile.Sleep(t.Context(), 10*time.Second)
		if n := len(f.times()); n < 10 || n > 10*int(time.Second/newsGap)+1 {
			t.Errorf("%d questions in 10 s", n)
		}
	})
}

// TestAContainerIsWhatItReachesToo: who is attached again with other metadata or rules under the same key is not the one whose rules are there.
func TestAContainerIsWhatItReachesToo(t *testing.T) {
	r := endpoint.Record{Key: endpoint.Key{Network: "silk", Container: "c1", Interface: "eth0"}, Group: "web", Device: "s-010255030002",
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.255.30.2/32")}, Metadata: json.RawMessage(`{"space_id":"s1"}`), NetOut: json.RawMessage(`[]`)}
	of := func(metadata, netOut string) container {
		return container{key: r.Key, metadata: json.RawMessage(metadata), netOut: json.RawMessage(netOut),
			endpoints: []firewall.Endpoint{{Device: r.Device, Address: r.Address(), Group: "web"}}}
	}
	it := of(`{"space_id":"s1"}`, `[]`)
	if !it.is(r) || !it.same(of(`{"space_id":"s1"}`, `[]`)) || !it.identities()[0].Is(r) {
		t.Error("it is not itself")
	}
	for _, o := range []container{of(`{"space_id":"s2"}`, `[]`), of(`{"space_id":"s1"}`, ``), of(``, `[]`)} {
		if o.is(r) || o.same(it) || o.identities()[0].Is(r) {
			t.Errorf("%s %s is taken for another", o.metadata, o.netOut)
		}
	}
}
