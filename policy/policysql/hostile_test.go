package policysql_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/revision"
)

// TestWaitingWatchersCostNothing compares the statements sent with and without 3,000 waiting watchers, all of which report.
func TestWaitingWatchersCostNothing(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.SQLite)))
	create(t, s, policytest.Of(t, "g0 hub tcp 1"))
	second := func() uint64 {
		before := s.DBCounts().Queries
		<-time.After(1500 * time.Millisecond) // the measurement
		return s.DBCounts().Queries - before
	}
	idle := second()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const n = 3000
	got := make(chan error, n)
	start := make(chan struct{})
	for i := range n {
		go func() {
			a := policy.Ask{Host: fmt.Sprintf("h%d", i), Groups: []identity.Group{identity.Group(fmt.Sprintf("g%d", i)), "hub"}}
			u, err := s.Watch(ctx, a)
			got <- err
			<-start
			a.Since, a.InForce = u.Revision, u.Revision
			if u, err = s.Watch(ctx, a); err == nil && (len(u.Set) != 1 || u.Full) {
				err = fmt.Errorf("host %d was told %+v, not the one change", i, u)
			}
			got <- err
		}()
	}
	for range n {
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
	close(start)
	policytest.Eventually(t, "all wait", func() bool { return s.Stats().Watchers == n })
	<-time.After(time.Second) // until all hosts are written down
	if busy := second(); busy > idle+4 {
		t.Errorf("%d statements with %d watchers, %d without", busy, n, idle)
	}
	begin := time.Now()
	at := create(t, s, policytest.Of(t, "x hub tcp 1"))
	for range n {
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d watchers were told after %v", n, time.Since(begin))
	if f := force(t, s, at, nil, brief); f.InForce || f.Behind != n || f.Known != n {
		t.Errorf("nobody has reported the change: %d lag of %d", f.Behind, f.Known)
	}
	if st := s.Stats(); st.Watchers != 0 || st.Hosts != n {
		t.Errorf("stats are %+v", st)
	}
}

// TestHostChangesItsGroups has one host come with other groups each time, and leaves nothing of the earlier ones.
func TestHostChangesItsGroups(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.SQLite)))
	for i := range 50 {
		newCell("h", identity.Group(fmt.Sprintf("g%d", i)), "hub", identity.Group(fmt.Sprintf("h%d", i%7))).report(t, s)
	}
	if sets, topics := s.Sizes(); sets != 1 || topics != 3 {
		t.Errorf("%d sets and %d topics are kept, want those of the last report", sets, topics)
	}
}

// TestSloppyAsk has groups out of order and twice, and a host's name that is none.
func TestSloppyAsk(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.SQLite)))
	create(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "c c tcp 1"))
	groups := []identity.Group{"c", "a", "c", "", "b"}
	u, err := s.Watch(t.Context(), policy.Ask{Host: "h", Groups: groups})
	if err != nil || u.Count != 2 || len(u.Set) != 2 || groups[0] != "c" {
		t.Errorf("%+v, %v, want both policies", u, err)
	}
	if _, err := s.Watch(t.Context(), policy.Ask{Host: strings.Repeat("h", 256)}); !errors.Is(err, fault.Invalid) {
		t.Errorf("a long name: %v, want an Invalid fault", err)
	}
}

// TestBigRequestHoldsUpNobodyForLong has small requests and reads beside a removal of 10,000 policies.
func TestBigRequestHoldsUpNobodyForLong(t *testing.T) {
	s := open(t, config(testkit.Database(t, sqldb.Postgres)))
	var ps []policy.Policy
	for i := range 10000 {
		ps = append(ps, policytest.Of(t, fmt.Sprintf("s%d d%d tcp %d", i%3000, i%500, 1+i)))
	}
	create(t, s, ps...)
	done := make(chan error, 1)
	go func() { done <- s.Delete(t.Context(), ps) }()
	slowest, reads := time.Duration(0), 0
	for removed := false; !removed; reads++ {
		start := time.Now()
		if _, err := s.Rules(t.Context(), policy.Filter{Sources: []identity.Group{"s1"}}); err != nil {
			t.Fatal(err)
		}
		slowest = max(slowest, time.Since(start))
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			removed = true
		default:
		}
	}
	t.Logf("%d reads meanwhile, the slowest took %v", reads, slowest)
	if reads < 100 {
		t.Errorf("%d reads were served meanwhile", reads)
	}
	if n := s.Stats().Policies; n != 0 {
		t.Errorf("%d policies are left", n)
	}
}

// TestStopsWhileAsked ends the store under load: every caller gets an answer.
func TestStopsWhileAsked(t *testing.T) {
	s, stop := start(t, config(testkit.Database(t, sqldb.SQLite)))
	at := snapshot(t, s).Revision
	var wg sync.WaitGroup
	first := make(chan struct{}, 64)
	for c := range 64 {
		wg.Go(func() {
			for i := 0; ; i++ {
				var err error
				switch c % 3 {
				case 0:
					err = s.Create(t.Context(), []policy.Policy{policytest.Of(t, fmt.Sprintf("a%d b tcp %d", c, 1+i%60000))})
				case 1:
					_, err = s.Watch(t.Context(), policy.Ask{Host: fmt.Sprint(c), Groups: []identity.Group{"zz"}, Since: at})
				default:
					_, err = s.Force(t.Context(), revision.Revision{Epoch: at.Epoch, Counter: 1 << 60}, nil, time.Minute)
				}
				if c%3 == 0 {
					select {
					case first <- struct{}{}:
					default:
					}
				}
				if err != nil {
					if !errors.Is(err, fault.Unavailable) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	<-first
	stop()
	wg.Wait()
	if _, err := s.List(t.Context(), policy.Filter{}); err == nil {
		policytest.Eventually(t, "reads end too", func() bool { _, err := s.List(t.Context(), policy.Filter{}); return errors.Is(err, fault.Unavailable) })
	}
}

// TestStopsWhileTheDatabaseFileIsLocked ends the store while somebody else keeps the write lock.
func TestStopsWhileTheDatabaseFileIsLocked(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	raw := connect(t, db)
	s, stop := start(t, config(db))
	create(t, s, policytest.Of(t, "a b tcp 1"))
	asked := make(chan error, 1)
	err := raw.Tx(t.Context(), func(*sqldb.Tx) error {
		go func() { asked <- s.Create(t.Context(), []policy.Policy{policytest.Of(t, "c d tcp 1")}) }()
		<-time.After(300 * time.Millisecond) // that the store waits for the lock; should it not yet, it is stopped earlier
		start := time.Now()
		stop()
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("the store ended after %v", took)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-asked; !errors.Is(err, fault.Unavailable) {
		t.Errorf("create: %v, want an Unavailable fault", err)
	}
}
