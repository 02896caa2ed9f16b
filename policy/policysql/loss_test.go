package policysql_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
)

var tables = []string{"silk_policies", "silk_policy_groups", "silk_policy_revision", "silk_policy_servers", "silk_policy_hosts"}

// TestTablesLost drops all tables, or one, while a store runs. It makes them anew, in a new epoch, and gives nobody a tag that hosts know as another's.
func TestTablesLost(t *testing.T) {
	for _, lost := range [][]string{append([]string{"silk_migrations"}, tables...), {"silk_policies"}, {"silk_policy_revision"}, {"silk_policy_hosts"}} {
		eachEngine(t, func(t *testing.T, db sqldb.Config) {
			s, raw := open(t, config(db)), connect(t, db)
			at := create(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "c d tcp 1"))
			had := tags(t, s)
			for _, table := range lost {
				exec(t, raw, "DROP TABLE "+table)
			}
			p := policytest.Of(t, "n m tcp 1")
			create(t, s, p)
			if lost[0] == "silk_policy_hosts" { // which is looked at only when hosts report
				c := newCell("h", "n")
				policytest.Eventually(t, "a host counts", func() bool {
					c.learn(t, s)
					c.report(t, s)
					f, err := s.Force(t.Context(), c.ask.Since, nil, brief)
					return err == nil && f.InForce && f.Known == 1
				})
				return
			}
			sn := snapshot(t, s)
			if sn.Revision.Epoch == at.Epoch {
				t.Errorf("after the loss of %v the revision is %v, was %v", lost, sn.Revision, at)
			}
			if lost[0] == "silk_policy_revision" {
				if sn.Len() != 3 {
					t.Errorf("%d policies are left, want 3", sn.Len())
				}
				return
			}
			if got := rules(t, s); len(got) != 1 || got[0].Policy != p {
				t.Errorf("policies are %v, want %v", got, p)
			}
			for _, r := range rules(t, s) {
				for _, g := range had {
					if r.SourceTag == g.Tag || r.DestinationTag == g.Tag {
						t.Errorf("%v has the tag of %v", r, g)
					}
				}
			}
			u, err := s.Watch(t.Context(), policy.Ask{Groups: []identity.Group{"a", "n"}, Since: at})
			if err != nil || !u.Full || u.Count != 1 {
				t.Errorf("a watcher from before: %+v, %v, want everything", u, err)
			}
			if lost[0] == "silk_policies" {
				return
			}
			policytest.Eventually(t, "the tags that were lost are known to rest", func() bool {
				var n int
				err := raw.QueryRow(t.Context(), "SELECT COUNT(*) FROM silk_policy_groups WHERE name IS NULL").Scan(&n)
				return err == nil && n == 4
			})
		})
	}
}

// TestFileReplaced puts an older copy, and then nothing, in the place of an SQLite file.
func TestFileReplaced(t *testing.T) {
	db := testkit.Database(t, sqldb.SQLite)
	s, stop := start(t, config(db))
	create(t, s, policytest.Of(t, "a b tcp 1"))
	stop()
	copied, err := os.ReadFile(db.Path)
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, config(db))
	at := create(t, s, policytest.Of(t, "c d tcp 1"))
	late := tags(t, s)["c"].Tag
	if err := os.WriteFile(db.Path+".old", copied, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		os.Remove(db.Path + suffix)
	}
	if err := os.Rename(db.Path+".old", db.Path); err != nil {
		t.Fatal(err)
	}
	policytest.Eventually(t, "the copy is read in a new epoch", func() bool {
		sn, err := s.Snapshot(t.Context())
		return err == nil && sn.Revision.Epoch != at.Epoch && sn.Len() == 1
	})
	create(t, s, policytest.Of(t, "n b tcp 1"))
	if tag := tags(t, s)["n"].Tag; tag == late {
		t.Errorf("tag %v was given to another group than hosts know it as", tag)
	}
}

// TestRevisionWentBack sets the counter to an earlier value, as a restored copy has it. After some patience the epoch is renewed.
func TestRevisionWentBack(t *testing.T) {
	db := testkit.Database(t, sqldb.Postgres)
	s, _ := start(t, config(db), func(s *policysql.Store) { s.Hurry(300 * time.Millisecond) })
	first := create(t, s, policytest.Of(t, "a b tcp 1"))
	at := create(t, s, policytest.Of(t, "c d tcp 1"))
	raw := connect(t, db)
	exec(t, raw, "DELETE FROM silk_policies WHERE changed > ?", int64(first.Counter))
	exec(t, raw, "DELETE FROM silk_policy_groups WHERE changed > ?", int64(first.Counter))
	exec(t, raw, "UPDATE silk_policy_revision SET counter = ?", int64(first.Counter))
	if _, err := s.CreateWithin(t.Context(), []policy.Policy{policytest.Of(t, "e f tcp 1")}, 0); err != nil && !errors.Is(err, fault.Unavailable) {
		t.Errorf("a creation meanwhile: %v, want it to succeed or an Unavailable fault", err)
	}
	policytest.Eventually(t, "the epoch is renewed", func() bool {
		sn, err := s.Snapshot(t.Context())
		return err == nil && sn.Revision.Epoch != at.Epoch
	})
	if sn := snapshot(t, s); slices.ContainsFunc(sn.Select(policy.Filter{}), func(r policy.Rule) bool { return r.Source == "c" }) {
		t.Error("what the copy lacks is listed")
	}
}

// TestForeignChangeRenewsEpoch has somebody else change the tables.
func TestForeignChangeRenewsEpoch(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, _ := start(t, config(db), func(s *policysql.Store) { s.Hurry(10 * time.Millisecond) })
		raw := connect(t, db)
		at := create(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "c d tcp 1"))
		before := s.DBCounts().Queries
		policytest.Eventually(t, "the tables are compared some times", func() bool { return s.DBCounts().Queries > before+30 })
		if got := snapshot(t, s).Revision; got != at {
			t.Fatalf("audits without cause led from %v to %v", at, got)
		}
		exec(t, raw, "DELETE FROM silk_policies WHERE source_tag = 1")
		policytest.Eventually(t, "the tables are read anew", func() bool { sn := snapshot(t, s); return sn.Revision.Epoch != at.Epoch && sn.Len() == 1 })
	})
}

// TestTagOfOrphanIsNotGiven has somebody else take the tag of a group away that has a policy, which must not become the policy of the next group.
func TestTagOfOrphanIsNotGiven(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		cfg.MaxTag, cfg.Quarantine = 5, -1
		s, stop := start(t, cfg, func(s *policysql.Store) { s.Hurry(10 * time.Millisecond) })
		raw := connect(t, db)
		at := create(t, s, policytest.Of(t, "a b tcp 1"), policytest.Of(t, "c d tcp 1"))
		before := s.DBCounts().Queries
		policytest.Eventually(t, "the tables are compared some times", func() bool { return s.DBCounts().Queries > before+30 })
		took := "UPDATE silk_policy_groups SET former = name, name = NULL, freed_at = 1 WHERE name = ?"
		if db.Type == sqldb.Postgres {
			took = "DELETE FROM silk_policy_groups WHERE name = ?" // which the other engines refuse
		}
		exec(t, raw, took, "a")
		policytest.Eventually(t, "the tables are read anew", func() bool { sn := snapshot(t, s); return sn.Revision.Epoch != at.Epoch && sn.Len() == 1 })
		for range 2 {
			if err := s.Create(t.Context(), []policy.Policy{policytest.Of(t, "c new tcp 1"), policytest.Of(t, "c newer tcp 1")}); !errors.Is(err, fault.Exhausted) {
				t.Errorf("two new groups, with one tag that nobody and nothing uses: %v, want it to be exhausted", err)
			}
			stop()
			s, stop = start(t, cfg)
		}
	})
}

// TestRenewEpoch has an operator begin a new epoch by a store that does not run. Running stores follow, and watchers get everything.
func TestRenewEpoch(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		stores := []*policysql.Store{open(t, config(db)), open(t, config(db))}
		at := create(t, stores[0], policytest.Of(t, "a b tcp 1"))
		had, stamp := tags(t, stores[0]), snapshot(t, stores[0]).Stamp
		idle, err := policysql.Open(t.Context(), config(db), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		told := make(chan policy.Update, 1)
		go func() {
			u, err := stores[1].Watch(t.Context(), policy.Ask{Groups: []identity.Group{"a"}, Since: at})
			if err != nil {
				t.Error(err)
			}
			told <- u
		}()
		r, err := idle.RenewEpoch(t.Context())
		if err != nil || r.Epoch == at.Epoch || r.Counter <= at.Counter {
			t.Fatalf("renewed from %v to %v, %v", at, r, err)
		}
		if u := <-told; !u.Full || u.Count != 1 || u.Revision != r {
			t.Errorf("a waiting watcher was told %+v, want everything at %v", u, r)
		}
		for _, s := range stores {
			policytest.Eventually(t, "the store follows", func() bool { return snapshot(t, s).Revision == r })
			if got := tags(t, s); len(got) != 2 || got["a"] != had["a"] || got["b"] != had["b"] || snapshot(t, s).Stamp <= stamp {
				t.Errorf("tags are %v, were %v; stamp %d, was %d", got, had, snapshot(t, s).Stamp, stamp)
			}
		}
	})
}

// TestRemovedPoliciesAreForgotten removes more policies than are remembered. Their rows go, and no store takes that for a loss.
func TestRemovedPoliciesAreForgotten(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, _ := start(t, config(db), func(s *policysql.Store) { s.Hurry(50 * time.Millisecond) })
		other := open(t, config(db))
		raw := connect(t, db)
		var ps []policy.Policy
		for i := range 9000 {
			ps = append(ps, policytest.Of(t, fmt.Sprintf("s%d d%d tcp %d", i%100, i%70, 1+i)))
		}
		at := create(t, s, ps...)
		remove(t, s, ps[1:]...)
		create(t, s, policytest.Of(t, "a b tcp 1"))
		remove(t, s, policytest.Of(t, "a b tcp 1"))
		left := func() (n int) {
			if err := raw.QueryRow(t.Context(), "SELECT COUNT(*) FROM silk_policies WHERE gone = 1").Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		policytest.Eventually(t, "most removed policies are forgotten", func() bool { return left() <= 1 })
		for _, s := range []*policysql.Store{s, other, open(t, config(db))} {
			policytest.Eventually(t, "one is left", func() bool { return snapshot(t, s).Len() == 1 })
			if got := snapshot(t, s).Revision; got.Epoch != at.Epoch {
				t.Errorf("the epoch is %v, was %v", got, at)
			}
			if u, err := s.Watch(t.Context(), policy.Ask{Groups: []identity.Group{"s1"}, Since: at}); err != nil || !u.Full {
				t.Errorf("a watcher from before: %+v, %v, want everything", u, err)
			}
		}
	})
}

// TestUnreadableRowsHarmNobody puts garbage into the tables. It is counted and left out.
func TestUnreadableRowsHarmNobody(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, raw := open(t, config(db)), connect(t, db)
		p := policytest.Of(t, "a b tcp 1")
		create(t, s, p)
		group := "INSERT INTO silk_policy_groups (tag, name, former, kind, freed_at, assigned, changed) SELECT ?, ?, '', ?, 0, 1, counter + 1 FROM silk_policy_revision"
		exec(t, raw, group, 3, "bad,name", "app")
		exec(t, raw, group, 70000, "far", "app")
		exec(t, raw, group, 4, nil, "")
		rule := "INSERT INTO silk_policies (source_tag, destination_tag, protocol, first_port, last_port, gone, changed) SELECT ?, ?, ?, ?, ?, 0, counter + 1 FROM silk_policy_revision"
		exec(t, raw, rule, 1, 2, 6, 0, 1)
		exec(t, raw, rule, 1, 2, 1, 1, 1)
		exec(t, raw, rule, 1, 2, 6, 5, 70000)
		exec(t, raw, rule, 1, 3, 6, 1, 1)
		exec(t, raw, rule, 70000, 2, 6, 1, 1)
		exec(t, raw, rule, 1, 4, 6, 1, 1)
		exec(t, raw, "UPDATE silk_policy_revision SET counter = counter + 1")
		policytest.Eventually(t, "the rows are counted", func() bool { return s.Stats().Invalid == 8 })
		for _, s := range []*policysql.Store{s, open(t, config(db))} {
			if got := rules(t, s); len(got) != 1 || got[0].Policy != p {
				t.Errorf("policies are %v, want %v", got, p)
			}
			if n := s.Stats().Invalid; n != 8 {
				t.Errorf("%d rows are counted, want 8", n)
			}
		}
		q := policytest.Of(t, "c d tcp 1")
		create(t, s, q)
		if got := tags(t, s); got["c"].Tag == 3 || got["d"].Tag == 3 || len(got) != 4 {
			t.Errorf("tags are %v", got)
		}
	})
}

// TestDatabaseAway stops the server. Watchers are answered from memory, everything else says so; afterwards all goes on by itself.
func TestDatabaseAway(t *testing.T) {
	server, err := testkit.StartPostgres(t.Context(), testkit.Options{})
	testkit.Require(t, "postgres", err)
	defer server.Stop()
	db, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	db.Timeout = 5
	s := open(t, config(db))
	p := policytest.Of(t, "a b tcp 1")
	at := create(t, s, p)
	ask := policy.Ask{Host: "h", Groups: []identity.Group{"a"}}
	server.Kill()
	if err := s.Create(t.Context(), []policy.Policy{policytest.Of(t, "c d tcp 1")}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("create without a database: %v, want an Unavailable fault", err)
	}
	policytest.Eventually(t, "lists are refused", func() bool {
		_, err := s.List(t.Context(), policy.Filter{})
		return errors.Is(err, fault.Unavailable)
	})
	if u, err := s.Watch(t.Context(), ask); err != nil || !u.Full || u.Count != 1 {
		t.Errorf("watch from nothing without a database: %+v, %v, want what is in memory", u, err)
	}
	ask.Since = at
	policytest.Eventually(t, "a watcher that has everything is told", func() bool {
		_, err := s.WatchFor(t.Context(), ask, 100*time.Millisecond)
		return errors.Is(err, fault.Unavailable)
	})
	ask.Since.Epoch = "another"
	if u, err := s.Watch(t.Context(), ask); !errors.Is(err, fault.Unavailable) {
		t.Errorf("watch from another epoch without a database: %+v, %v, want an Unavailable fault", u, err)
	}
	if f, err := s.Force(t.Context(), at, nil, brief); !errors.Is(err, fault.Unavailable) {
		t.Errorf("force without a database: %+v, %v, want an Unavailable fault", f, err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	policytest.Eventually(t, "all is well again", func() bool { return s.Create(t.Context(), []policy.Policy{p}) == nil })
	if got := snapshot(t, s).Revision; got != at {
		t.Errorf("the revision is %v, was %v", got, at)
	}
}

// TestKilledConnections ends the stores' connections all the time, commits included. Nothing that was confirmed is lost, and what was not is there or not, as the
// next look says.
func TestKilledConnections(t *testing.T) {
	db := testkit.Database(t, sqldb.Postgres)
	stores, raw := []*policysql.Store{open(t, config(db)), open(t, config(db))}, connect(t, db)
	stop := make(chan struct{})
	var killer, wg sync.WaitGroup
	killer.Go(func() {
		tick := time.NewTicker(15 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				raw.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
			}
		}
	})
	retries := func() uint64 { return stores[0].DBCounts().Retries + stores[1].DBCounts().Retries }
	var mu sync.Mutex
	var sure []policy.Policy
	failed := 0
	for c := range 8 {
		wg.Go(func() {
			for i := 0; i < 20 || retries() == 0 && i < 1000; i++ {
				s := stores[(c+i)%2]
				p := policytest.Of(t, fmt.Sprintf("c%d d%d tcp %d", c, i%5, 1+i))
				err := s.Create(t.Context(), []policy.Policy{p})
				if err == nil && i%3 == 0 {
					if err = s.Delete(t.Context(), []policy.Policy{p}); err == nil {
						continue
					}
				}
				mu.Lock()
				switch {
				case err == nil:
					sure = append(sure, p)
				case errors.Is(err, fault.Unavailable):
					failed++
				default:
					t.Error(err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	close(stop)
	killer.Wait()
	if retries() == 0 {
		t.Error("nothing was tried again: the test tested nothing")
	}
	t.Logf("%d requests were told to try later", failed)
	var lists [2][]policy.Policy
	policytest.Eventually(t, "the stores agree with each other and the table", func() bool {
		for i, s := range stores {
			var err error
			if lists[i], err = s.List(t.Context(), policy.Filter{}); err != nil {
				return false
			}
		}
		var n int
		err := raw.QueryRow(t.Context(), "SELECT COUNT(*) FROM silk_policies WHERE gone = 0").Scan(&n)
		return err == nil && n == len(lists[0]) && slices.Equal(lists[0], lists[1])
	})
	for _, p := range sure {
		if !slices.Contains(lists[0], p) {
			t.Errorf("%v was created and is not there", p)
		}
	}
	if extra := len(lists[0]) - len(sure); extra > failed {
		t.Errorf("%d policies are there that nobody created", extra)
	}
}
