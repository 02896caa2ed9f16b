package policysql_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// TestTagsAreGivenInOrder has the lowest never used come first, then what was freed longest ago; the quarantine is by the clock of the database.
func TestTagsAreGivenInOrder(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		cfg := config(db)
		cfg.MaxTag, cfg.Quarantine = 6, time.Minute
		s, stop := start(t, cfg)
		self := func(name string) policy.Policy { return policytest.Of(t, name+" "+name+" tcp 1") }
		for i := range 4 {
			name := fmt.Sprintf("g%d", 1+i)
			create(t, s, self(name))
			if got := tags(t, s)[identity.Group(name)].Tag; got != identity.Tag(1+i) {
				t.Fatalf("%s got tag %v, want the lowest", name, got)
			}
		}
		remove(t, s, self("g3"))
		remove(t, s, self("g2"))
		create(t, s, self("g5"))
		create(t, s, self("g6"))
		if got := tags(t, s); got["g5"].Tag != 5 || got["g6"].Tag != 6 {
			t.Fatalf("tags are %v, want those never used", got)
		}
		err := s.Create(t.Context(), []policy.Policy{self("g7")})
		if !errors.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "4 of 6 tags are in use, 2 were freed less than 1m0s ago") {
			t.Fatalf("with two tags in quarantine: %v", err)
		}
		if st := s.Stats(); st.Used != 4 || st.Quarantine != 2 || st.Tags != 6 || !st.TagsLow {
			t.Errorf("stats are %+v", st)
		}
		stop()
		raw := connect(t, db)
		exec(t, raw, "UPDATE silk_policy_groups SET freed_at = freed_at - 61000000 WHERE name IS NULL")
		s = open(t, cfg)
		if st := s.Stats(); st.Used != 4 || st.Quarantine != 0 || st.TagsLow {
			t.Errorf("after the quarantine stats are %+v", st)
		}
		create(t, s, self("g7"))
		create(t, s, self("g8"))
		if got := tags(t, s); got["g7"].Tag != 3 || got["g8"].Tag != 2 {
			t.Errorf("tags are %v, want 3, which was freed first, then 2", got)
		}
	})
}

// TestTagKinds has groups of internal clients beside those of policies.
func TestTagKinds(t *testing.T) {
	eachEngine(t, func(t *testing.T, db sqldb.Config) {
		s, other := open(t, config(db)), open(t, config(db))
		router, err := s.Tag(t.Context(), identity.IngressRouter, identity.Router)
		if err != nil {
			t.Fatal(err)
		}
		policytest.Eventually(t, "the other store knows", func() bool { return tags(t, other)[identity.IngressRouter].Tag == router })
		p := policytest.Of(t, string(identity.IngressRouter)+" web tcp 1")
		if err := other.Create(t.Context(), []policy.Policy{p, policytest.Of(t, "a b tcp 1")}); !errors.Is(err, fault.Conflict) {
			t.Errorf("a policy of the router's group: %v, want a Conflict fault", err)
		}
		if n := len(rules(t, other)); n != 0 {
			t.Errorf("%d policies are left of a refused request", n)
		}
		// A tag of the common kind goes with the last policy, however it came.
		app, err := s.Tag(t.Context(), "app", identity.App)
		if err != nil {
			t.Fatal(err)
		}
		q := policytest.Of(t, "app app tcp 1")
		create(t, s, q)
		if got := tags(t, s)["app"].Tag; got != app {
			t.Errorf("app has tag %v, was given %v", got, app)
		}
		remove(t, s, q)
		if got, has := tags(t, s)["app"]; has {
			t.Errorf("%v is left of a group without policies", got)
		}
		for _, bad := range []identity.Tagged{{Group: "", Kind: "x"}, {Group: "g", Kind: ""}, {Group: "a,b", Kind: "x"}, {Group: "g", Kind: "a\nb"}} {
			if tag, err := s.Tag(t.Context(), bad.Group, bad.Kind); !errors.Is(err, fault.Invalid) {
				t.Errorf("tag of %+v: %v, %v, want an Invalid fault", bad, tag, err)
			}
		}
	})
}

// TestAllTagsFit uses up every tag there is.
func TestAllTagsFit(t *testing.T) {
	if testing.Short() {
		t.Skip("65,535 groups")
	}
	s := open(t, config(testkit.Database(t, sqldb.Postgres)))
	var ps []policy.Policy
	for i := range 65534 {
		ps = append(ps, policytest.Of(t, fmt.Sprintf("g%d hub tcp 1", i)))
	}
	create(t, s, ps...)
	st := s.Stats()
	if st.Used != 65535 || st.Policies != 65534 || !st.TagsLow {
		t.Errorf("stats are %+v", st)
	}
	if err := s.Create(t.Context(), []policy.Policy{policytest.Of(t, "one-more hub tcp 1")}); !errors.Is(err, fault.Exhausted) {
		t.Errorf("one group more: %v, want an Exhausted fault", err)
	}
	start := time.Now()
	remove(t, s, ps[:10000]...)
	t.Logf("10,000 removed in %v", time.Since(start))
	if st := s.Stats(); st.Used != 55535 || st.Quarantine != 10000 || st.Policies != 55534 {
		t.Errorf("stats are %+v", st)
	}
}
