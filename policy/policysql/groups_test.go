package policysql_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
	"code.cloudfoundry.org/silk/secgroup"
)

func TestSecurityGroupsConformance(t *testing.T) {
	eachEngine(t, func(t *testing.T, _ sqldb.Config) {
		engine := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
		policytest.RunSecurityGroups(t, func(t testing.TB) policytest.GroupsSubject {
			g := open(t, config(testkit.Database(t, engine))).SecurityGroups()
			return policytest.GroupsSubject{Book: g, Feed: g}
		})
	})
}

// groupOf returns a record as Cloud Controller has it.
func groupOf(guid, address string) secgroup.Record {
	return secgroup.Record{GUID: guid, Name: "name of " + guid, Rules: policytest.RulesTo(address), RunningSpaces: []string{"s1"}}
}

func groups(t testing.TB, g *policysql.SecurityGroups) []secgroup.Kept {
	t.Helper()
	list, err := g.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func guids(t testing.TB, g *policysql.SecurityGroups) string {
	t.Helper()
	var all []string
	for _, k := range groups(t, g) {
		all = append(all, k.GUID)
	}
	return strings.Join(all, " ")
}

func hold(t testing.TB, g *policysql.SecurityGroups, holder string, want bool) {
	t.Helper()
	if got, err := g.Hold(t.Context(), holder, time.Minute); err != nil || got != want {
		t.Fatalf("%s holds the lease: %v, %v, expected %v", holder, got, err, want)
	}
}

func replace(t testing.TB, g *policysql.SecurityGroups, r policysql.Replacement) policysql.Replaced {
	t.Helper()
	did, err := g.Replace(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return did
}

// TestReplaceWritesOnlyWhatDiffers holds what the syncer's writes come to, in rows and in revisions.
func TestReplaceWritesOnlyWhatDiffers(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		cfg.CloudController = true
		g, raw := open(t, cfg).SecurityGroups(), connect(t, db)
		hold(t, g, "me", true)
		if _, err := g.Create(t.Context(), secgroup.Record{GUID: "own", Name: "own", Rules: "[]"}); err != nil {
			t.Fatal(err)
		}
		all := policysql.Replacement{Groups: []secgroup.Record{groupOf("b", "10.0.0.1"), groupOf("a", "10.0.0.2"), groupOf("c", "10.0.0.3")}, Stamp: "1", Holder: "me"}
		first := replace(t, g, all)
		if first.Added != 3 || guids(t, g) != "own b a c" {
			t.Errorf("%+v, groups %s", first, guids(t, g))
		}
		if again := replace(t, g, all); again != (policysql.Replaced{Revision: first.Revision}) {
			t.Errorf("the same again: %+v, expected that nothing moves from %v", again, first.Revision)
		}
		all.Stamp = "2"
		if again := replace(t, g, all); again.Revision != first.Revision {
			t.Errorf("only another stamp: %+v, expected that the revision stays %v", again, first.Revision)
		}
		if s, err := g.Stamp(t.Context()); s != "2" || err != nil {
			t.Errorf("stamp %q, %v", s, err)
		}
		if _, err := g.Change(t.Context(), "a", secgroup.Change{Bind: secgroup.Scope{Members: []identity.Group{"web"}}}); err != nil {
			t.Fatal(err)
		}
		all.Groups = []secgroup.Record{groupOf("d", "10.0.0.4"), groupOf("a", "10.0.0.9"), groupOf("c", "10.0.0.3")}
		all.Keep = []string{"b"}
		before := rowVersions(t, raw)
		did := replace(t, g, all)
		if did.Added != 1 || did.Changed != 1 || did.Removed != 0 || did.Revision.Counter != first.Revision.Counter+2 {
			t.Errorf("%+v, expected one added, one changed, none removed, and one revision more", did)
		}
		after := rowVersions(t, raw)
		for guid, want := range map[string]bool{"own": false, "b": false, "c": false, "a": true} {
			if (before[guid] != after[guid]) != want {
				t.Errorf("row %s was written: %v, expected %v", guid, before[guid] != after[guid], want)
			}
		}
		if k := groups(t, g)[2]; k.GUID != "a" || !slices.Equal(k.Members, []identity.Group{"web"}) {
			t.Errorf("the members of a group that changed: %+v", k)
		}
		all.Keep = nil
		if did = replace(t, g, all); did.Removed != 1 || guids(t, g) != "own a c d" {
			t.Errorf("%+v, groups %s", did, guids(t, g))
		}
		name := "x"
		for _, err := range []error{g.Delete(t.Context(), "a"), second(g.Change(t.Context(), "a", secgroup.Change{Name: &name}))} {
			if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "follows Cloud Controller") {
				t.Errorf("a change of what follows cloud controller: %v", err)
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }

// rowVersions returns at which counter each row was written last.
func rowVersions(t testing.TB, db *sqldb.DB) map[string]int64 {
	t.Helper()
	rows, err := db.Query(t.Context(), "SELECT guid, changed FROM silk_security_groups")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	all := map[string]int64{}
	for rows.Next() {
		var guid string
		var changed int64
		if err := rows.Scan(&guid, &changed); err != nil {
			t.Fatal(err)
		}
		all[guid] = changed
	}
	return all
}

// TestOneFollowsCloudController holds that of two stores one has the lease, that the other gets it when it ends, and that who lost it
// replaces nothing.
func TestOneFollowsCloudController(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		one, other, raw := open(t, config(db)).SecurityGroups(), open(t, config(db)).SecurityGroups(), connect(t, db)
		hold(t, one, "one", true)
		hold(t, one, "one", true)
		hold(t, other, "other", false)
		all := policysql.Replacement{Groups: []secgroup.Record{groupOf("a", "10.0.0.1")}, Stamp: "1", Holder: "one"}
		replace(t, one, all)
		exec(t, raw, "UPDATE silk_security_syncer SET until_at = 1000") // it did not come back in time
		hold(t, other, "other", true)
		all.Groups = nil
		if _, err := one.Replace(t.Context(), all); !errors.Is(err, fault.Denied) {
			t.Errorf("who lost the lease replaces groups: %v", err)
		}
		policytest.Eventually(t, "what was replaced in time is there, and stays", func() bool { return guids(t, other) == "a" })
		exec(t, raw, "UPDATE silk_security_syncer SET until_at = until_at + 3600000000") // by a clock that has gone back since
		hold(t, one, "one", true)
		if err := one.LetGo(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
		hold(t, other, "other", true)
	})
}

// TestPagesAreOfOneList holds that who reads page by page, at several stores, gets the list as it was, whatever happens meanwhile.
func TestPagesAreOfOneList(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		stores := []*policysql.SecurityGroups{open(t, config(db)).SecurityGroups(), open(t, config(db)).SecurityGroups()}
		hold(t, stores[0], "me", true)
		var all []secgroup.Record
		for i := range 10 {
			all = append(all, groupOf(fmt.Sprintf("g%d", i), "10.0.0.1"))
		}
		replace(t, stores[0], policysql.Replacement{Groups: all, Holder: "me"})
		policytest.Eventually(t, "both stores have all", func() bool { return len(groups(t, stores[1])) == 10 })
		var got []string
		from, rounds := int64(0), 0
		for {
			p, err := stores[rounds%2].Page(t.Context(), []string{"s1"}, from, 3)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range p.Groups {
				got = append(got, r.GUID)
			}
			if from = p.Next; from == 0 {
				break
			}
			rounds++
			all = all[1:] // and a group of a page that was read goes
			did := replace(t, stores[0], policysql.Replacement{Groups: all, Holder: "me"})
			policytest.Eventually(t, "both stores are up to date", func() bool { return stores[1].Stats().Revision == did.Revision })
		}
		if want := "g0 g1 g2 g3 g4 g5 g6 g7 g8 g9"; strings.Join(got, " ") != want || rounds != 3 {
			t.Errorf("page by page: %v in %d pages more", got, rounds)
		}
		if p, err := stores[0].Page(t.Context(), []string{"s1"}, 5, 0); err != nil || len(p.Groups) != 6 || p.Groups[0].GUID != "g4" || p.Next != 0 {
			t.Errorf("from number 5: %+v, %v", p, err)
		}
		for range 20 {
			all[0].Name += "x"
			replace(t, stores[0], policysql.Replacement{Groups: all, Holder: "me"})
		}
		p, err := stores[0].Page(t.Context(), []string{"s1"}, 0, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			all[0].Name += "x"
			replace(t, stores[0], policysql.Replacement{Groups: all, Holder: "me"})
		}
		if _, err := stores[0].Page(t.Context(), []string{"s1"}, p.Next, 1); !errors.Is(err, fault.Unavailable) {
			t.Errorf("a part of a list that has passed: %v, expected to be told to begin again", err)
		}
	})
}

// TestManyStoresWriteSecurityGroups has the clients of three stores write at once: nothing is lost, no number is given twice, and all agree.
func TestManyStoresWriteSecurityGroups(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		var stores []*policysql.SecurityGroups
		for range 3 {
			stores = append(stores, open(t, config(db)).SecurityGroups())
		}
		var wg sync.WaitGroup
		for c := range 6 {
			wg.Go(func() {
				for i := range 5 {
					g := stores[(c+i)%3]
					k, err := g.Create(t.Context(), secgroup.Record{Name: fmt.Sprintf("n%d-%d", c, i), Rules: "[]"})
					if err == nil {
						_, err = stores[c%3].Change(t.Context(), k.GUID, secgroup.Change{Bind: secgroup.Scope{RunningSpaces: []string{fmt.Sprint(c)}}})
					}
					if err == nil && i == 4 {
						err = stores[i%3].Delete(t.Context(), k.GUID)
					}
					if err != nil {
						t.Errorf("client %d: %v", c, err)
					}
				}
			})
		}
		wg.Wait()
		for _, g := range stores {
			policytest.Eventually(t, "all have all", func() bool {
				list := groups(t, g)
				return len(list) == 24 && cmp.Equal(groups(t, stores[0]), list) && !slices.ContainsFunc(list, func(k secgroup.Kept) bool { return k.RunningSpaces == nil })
			})
		}
	})
}

// TestLostSecurityGroupsBeginAnEpoch drops the tables under a running store, takes the counter back, and changes a row by hand.
func TestLostSecurityGroupsBeginAnEpoch(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		for name, harm := range map[string]string{
			"dropped": "DROP TABLE silk_security_groups", "emptied": "DELETE FROM silk_security_revision", "restored": "UPDATE silk_security_revision SET counter = counter - 1",
			"changed": "UPDATE silk_security_revision SET counter = counter + 1, digest = '0000000000000000'",
		} {
			t.Run(name, func(t *testing.T) {
				db := testkit.Database(t, db.Type)
				s, _ := start(t, config(db), func(s *policysql.Store) { s.Hurry(100 * time.Millisecond) })
				g, raw := s.SecurityGroups(), connect(t, db)
				hold(t, g, "me", true)
				replace(t, g, policysql.Replacement{Groups: []secgroup.Record{groupOf("a", "10.0.0.1")}, Stamp: "1", Holder: "me"})
				at := g.Stats().Revision
				exec(t, raw, harm)
				policytest.Eventually(t, "a new epoch has begun", func() bool {
					now := g.Stats().Revision
					return now.Epoch != at.Epoch && now.Epoch == s.Stats().Revision.Epoch
				})
				if stamp, err := g.Stamp(t.Context()); stamp != "" || err != nil {
					t.Errorf("stamp %q, %v: expected none, so that all is read from cloud controller again", stamp, err)
				}
				want := "a"
				if name == "dropped" {
					want = ""
				}
				if got := guids(t, g); got != want {
					t.Errorf("groups %q, expected %q", got, want)
				}
				policytest.Eventually(t, "groups can be written", func() bool {
					_, err := g.Create(t.Context(), secgroup.Record{GUID: "b", Name: "b", Rules: "[]"})
					return err == nil || errors.Is(err, fault.Conflict)
				})
			})
		}
	})
}

// TestUnreadableRowIsIgnored holds that a row that nobody can read harms no other, and does not keep its GUID from being stored again.
func TestUnreadableRowIsIgnored(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		g, raw := open(t, config(db)).SecurityGroups(), connect(t, db)
		hold(t, g, "me", true)
		all := policysql.Replacement{Groups: []secgroup.Record{groupOf("a", "10.0.0.1"), groupOf("b", "10.0.0.2")}, Stamp: "1", Holder: "me"}
		replace(t, g, all)
		exec(t, raw, "UPDATE silk_security_groups SET running_spaces = 'torn', changed = changed + 1 WHERE guid = 'a'")
		exec(t, raw, "UPDATE silk_security_revision SET counter = counter + 1")
		policytest.Eventually(t, "the row is ignored and counted", func() bool { return guids(t, g) == "b" && g.Stats().Invalid == 1 })
		policytest.Eventually(t, "the row is replaced", func() bool {
			_, err := g.Replace(t.Context(), all)
			return err == nil && guids(t, g) == "b a"
		})
		policytest.Eventually(t, "no row is unreadable", func() bool { return g.Stats().Invalid == 0 })
	})
}
