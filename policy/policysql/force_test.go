package policysql_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/revision"
)

// cell is a host that asks once whenever it is told to, and reports what it was told last.
type cell struct {
	ask policy.Ask
}

func newCell(host string, groups ...identity.Group) *cell {
	slices.Sort(groups)
	return &cell{policy.Ask{Host: host, Groups: groups}}
}

// report tells a store what the cell has.
func (c *cell) report(t testing.TB, s *policysql.Store) {
	t.Helper()
	if _, err := s.WatchFor(t.Context(), c.ask, 0); err != nil {
		t.Fatal(err)
	}
}

// learn brings the cell up to date, and does not say so yet.
func (c *cell) learn(t testing.TB, s *policysql.Store) {
	t.Helper()
	u, err := s.WatchFor(t.Context(), c.ask, 0)
	if err != nil {
		t.Fatal(err)
	}
	c.ask.Since, c.ask.InForce = u.Revision, u.Revision
}

func force(t testing.TB, s *policysql.Store, r revision.Revision, groups []identity.Group, timeout time.Duration) policysql.InForce {
	t.Helper()
	f, err := s.Force(t.Context(), r, groups, timeout)
	if err != nil {
		t.Fatal(err)
	}
	if f.Reporting+f.Unknown != f.Known {
		t.Errorf("%+v: reporting and unknown are not all", f)
	}
	return f
}

const brief = 50 * time.Millisecond // a wait that is to be in vain

func TestForceOfOneStore(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.SQLite)))
	at := create(t, s, policytest.Of(t, "a b tcp 1"))
	if f := force(t, s, at, nil, time.Minute); !f.InForce || f.Known != 0 {
		t.Errorf("without hosts: %+v", f)
	}
	one, two := newCell("h1", "a"), newCell("h2", "x", "y")
	for _, c := range []*cell{one, two} {
		c.learn(t, s)
		if f := force(t, s, at, nil, brief); f.InForce || !slices.Equal(f.Lagging, []string{c.ask.Host}) || f.Behind != 1 {
			t.Errorf("%s has not said that it has anything: %+v", c.ask.Host, f)
		}
		c.report(t, s)
	}
	if f := force(t, s, at, nil, time.Minute); !f.InForce || f.Known != 2 || f.Reporting != 2 {
		t.Errorf("with two hosts that have everything: %+v", f)
	}
	at = create(t, s, policytest.Of(t, "b a tcp 1"))
	f := force(t, s, at, nil, brief)
	if f.InForce || !slices.Equal(f.Lagging, []string{"h1"}) || f.Known != 2 || f.Reporting != 2 {
		t.Errorf("with a host that lags: %+v, want h1 lagging only, since h2 is not concerned", f)
	}
	if f := force(t, s, at, []identity.Group{"x"}, brief); !f.InForce {
		t.Errorf("of groups that the lagging host does not have: %+v", f)
	}
	// The wait ends as soon as the host reports.
	done := make(chan policysql.InForce, 1)
	go func() {
		f, err := s.Force(t.Context(), at, []identity.Group{"a", "b"}, time.Minute)
		if err != nil {
			t.Error(err)
		}
		done <- f
	}()
	one.learn(t, s)
	select {
	case f := <-done:
		t.Errorf("in force before the host said so: %+v", f)
	default:
	}
	one.report(t, s)
	if f := <-done; !f.InForce {
		t.Errorf("after the report: %+v", f)
	}
	s.DeployedPoll(time.Now())
	if f := force(t, s, at, nil, time.Minute); f.InForce || !f.OldAgents || f.Behind != 0 {
		t.Errorf("with an agent of the deployed kind: %+v, want an answer at once that says so", f)
	}
}

func TestForceRefusesAnotherEpoch(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.SQLite)))
	if f, err := s.Force(t.Context(), revision.Revision{Epoch: "another", Counter: 1}, nil, time.Minute); !errors.Is(err, fault.Conflict) {
		t.Errorf("force of another epoch: %+v, %v", f, err)
	}
	at := create(t, s, policytest.Of(t, "a b tcp 1"))
	c := newCell("h1", "a")
	c.learn(t, s)
	c.report(t, s)
	if _, err := s.RenewEpoch(t.Context()); err != nil {
		t.Fatal(err)
	}
	policytest.Eventually(t, "the epoch is another", func() bool { return snapshot(t, s).Revision.Epoch != at.Epoch })
	if f := force(t, s, snapshot(t, s).Revision, nil, brief); f.InForce {
		t.Errorf("what was in force in another epoch counts: %+v", f)
	}
	c.learn(t, s)
	c.report(t, s)
	if f := force(t, s, snapshot(t, s).Revision, nil, time.Minute); !f.InForce {
		t.Errorf("after the host took over the new epoch: %+v", f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Force(ctx, snapshot(t, s).Revision, nil, time.Minute); err == nil {
		t.Error("force with a cancelled context succeeded")
	}
}

// TestForceAcrossStores has hosts report to two stores, move between them, and one of the stores end.
func TestForceAcrossStores(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		one, other := open(t, cfg), open(t, cfg)
		create(t, one, policytest.Of(t, "a b tcp 1"))
		var cells []*cell
		for i := range 6 {
			c := newCell(fmt.Sprintf("h%d", i), "a")
			s := []*policysql.Store{one, other}[i%2]
			policytest.Eventually(t, "the host has everything", func() bool {
				c.learn(t, s)
				return c.ask.Since == snapshot(t, one).Revision
			})
			c.report(t, s)
			cells = append(cells, c)
		}
		want := func(what string, r revision.Revision, check func(f policysql.InForce) bool) {
			t.Helper()
			for _, s := range []*policysql.Store{one, other} {
				var f policysql.InForce
				defer func() {
					if t.Failed() {
						t.Logf("%s: %+v", what, f)
					}
				}()
				policytest.Eventually(t, what, func() bool {
					f = force(t, s, r, nil, brief)
					return check(f)
				})
			}
		}
		at := snapshot(t, one).Revision
		want("all six have it", at, func(f policysql.InForce) bool { return f.InForce && f.Known == 6 && f.Unknown == 0 })
		at = create(t, other, policytest.Of(t, "c a tcp 1"))
		lags := func(names ...string) func(f policysql.InForce) bool {
			return func(f policysql.InForce) bool { return !f.InForce && slices.Equal(f.Lagging, names) && f.Known == 6 }
		}
		want("all six lag", at, func(f policysql.InForce) bool { return !f.InForce && f.Behind == 6 && f.Known == 6 })
		for _, c := range cells[2:] {
			c.learn(t, other)
			c.report(t, other) // h2 and h4 have moved
		}
		want("two lag", at, lags("h0", "h1"))
		cells[0].learn(t, other)
		cells[0].report(t, other) // moves
		cells[1].learn(t, one)
		cells[1].report(t, one) // moves the other way
		start := time.Now()
		want("all six have it", at, func(f policysql.InForce) bool { return f.InForce && f.Known == 6 })
		t.Logf("moved hosts counted after %v", time.Since(start))
		other.DeployedPoll(time.Now())
		want("an old agent polled somewhere", at, func(f policysql.InForce) bool { return f.OldAgents && !f.InForce && f.Behind == 0 })
	})
}

// TestForceAfterAStoreEnds has the hosts of a store that ended lag until they report to another, or until their leases end.
func TestForceAfterAStoreEnds(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		cfg.Lease = 4 * time.Second
		one := open(t, cfg)
		other, stop := start(t, cfg)
		at := create(t, other, policytest.Of(t, "a b tcp 1"))
		moves, stays := newCell("moves", "a"), newCell("stays", "b")
		for _, c := range []*cell{moves, stays} {
			c.learn(t, other)
			c.report(t, other)
		}
		if f := force(t, other, at, nil, time.Minute); !f.InForce || f.Known != 2 {
			t.Fatalf("at first: %+v", f)
		}
		stop()
		at = create(t, one, policytest.Of(t, "b a tcp 1"))
		if f := force(t, one, at, nil, brief); f.InForce || f.Behind != 2 || !slices.Equal(f.Lagging, []string{"moves", "stays"}) {
			t.Errorf("hosts of a store that has ended: %+v, want both lagging", f)
		}
		moves.learn(t, one)
		moves.report(t, one)
		if f := force(t, one, at, nil, brief); f.InForce || !slices.Equal(f.Lagging, []string{"stays"}) || f.Known != 2 {
			t.Errorf("after one has moved: %+v, want the other lagging", f)
		}
		beat := make(chan struct{})
		go func() { // moves goes on reporting
			defer close(beat)
			for i := 0; i < 20; i++ {
				one.WatchFor(t.Context(), moves.ask, 300*time.Millisecond)
			}
		}()
		if f := force(t, one, at, nil, 30*time.Second); !f.InForce || f.Unknown != 1 || f.Known != 2 || f.Reporting != 1 {
			t.Errorf("after the lease of the other has ended: %+v, want it unknown", f)
		}
		<-beat
	})
}

// TestLaterChangesDoNotHoldUp has hosts that report to one store lag with a change that came after the one that is waited for at the other: under a steady
// stream of changes some host always does.
func TestLaterChangesDoNotHoldUp(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		one, other := open(t, config(db)), open(t, config(db))
		create(t, one, policytest.Of(t, "x y tcp 1"))
		for _, s := range []*policysql.Store{one, other} {
			policytest.Eventually(t, "both know the first policy", func() bool { return len(rules(t, s)) == 1 })
		}
		busy, hub := newCell("busy", "x"), newCell("hub", "a", "x")
		for _, c := range []*cell{busy, hub} {
			c.learn(t, other)
			c.report(t, other)
		}
		at := create(t, one, policytest.Of(t, "a b tcp 1"))
		for n := range 10 {
			create(t, one, policytest.Of(t, fmt.Sprintf("x y tcp %d", 2+n)))
		}
		policytest.Eventually(t, "only the host lags that the change is for", func() bool {
			f := force(t, one, at, []identity.Group{"a", "b"}, brief)
			return !f.InForce && slices.Equal(f.Lagging, []string{"hub"}) && f.Known == 2
		})
		last := create(t, one, policytest.Of(t, "x y tcp 1000"))
		hub.learn(t, other)
		hub.report(t, other)
		if f := force(t, one, at, []identity.Group{"a", "b"}, 10*time.Second); !f.InForce {
			t.Errorf("the change itself is in force: %+v", f)
		}
		if f := force(t, one, last, []identity.Group{"x"}, brief); f.InForce {
			t.Errorf("a later one is not: %+v", f)
		}
	})
}

// TestSilentHostIsUnknown lets the lease of a host end that reports to a store which goes on.
func TestSilentHostIsUnknown(t *testing.T) {
	cfg := config(testkit.Database(t, sqldb.SQLite))
	cfg.Lease = 500 * time.Millisecond
	s := open(t, cfg)
	c := newCell("h1", "a")
	c.learn(t, s)
	c.report(t, s)
	at := create(t, s, policytest.Of(t, "a b tcp 1"))
	if f := force(t, s, at, nil, time.Minute); !f.InForce || f.Known != 1 || f.Unknown != 1 {
		t.Errorf("%+v, want one unknown host", f)
	}
	c.learn(t, s)
	if f := force(t, s, at, nil, brief); f.InForce || f.Unknown != 0 || f.Behind != 1 {
		t.Errorf("after it came back: %+v, want it lagging", f)
	}
}

// TestManyLaggingHosts has more than are named.
func TestManyLaggingHosts(t *testing.T) {
	db := testkit.Database(t, sqldb.Postgres)
	one, other := open(t, config(db)), open(t, config(db))
	for i := range 250 {
		newCell(fmt.Sprintf("h%03d", i), "a").learn(t, one)
	}
	at := create(t, one, policytest.Of(t, "a b tcp 1"))
	for _, s := range []*policysql.Store{one, other} {
		policytest.Eventually(t, "250 hosts lag, of which 100 are named", func() bool {
			f := force(t, s, at, nil, brief)
			return !f.InForce && f.Behind == 250 && len(f.Lagging) == 100 && f.Known == 250
		})
	}
}
