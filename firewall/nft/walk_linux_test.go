package nft_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
)

// states returns rulesets that differ in every way a host's may.
func states(t testing.TB, r *rand.Rand) []firewall.Ruleset {
	var out []firewall.Ruleset
	for i := range 30 {
		in := example()
		in.Endpoints, in.Rules = nil, nil
		egress := someEgress(t, r)
		for last := byte(2); last < 30; last++ {
			if r.IntN(3) > 0 {
				e := endpoint(last, identity.Tag(r.IntN(8)))
				if r.IntN(3) == 0 {
					e.Ingress = []uint16{uint16(1 + r.IntN(9000)), 8080}
				}
				e.Egress = egress()
				in.Endpoints = append(in.Endpoints, e)
			}
		}
		for range r.IntN(200) {
			first := uint16(1 + r.IntN(60000))
			last := first
			if r.IntN(3) == 0 {
				last += uint16(r.IntN(5000))
			}
			in.Rules = append(in.Rules, rule(identity.Tag(1+r.IntN(12)), identity.Tag(1+r.IntN(8)), []policy.Protocol{policy.TCP, policy.UDP}[r.IntN(2)], first, last))
		}
		switch i % 10 {
		case 1:
			in.Router = 77
		case 2:
			in.Unrestricted = true
		case 3:
			in.Services, in.DNS = nil, nil
		case 4:
			in.VTEP = "other-vtep"
		case 5:
			in.Endpoints = nil
		case 6:
			in.Limit = firewall.Limit{Rate: 1 + r.IntN(9), Burst: 1 + r.IntN(99), Dry: true}
		case 7:
			in.Limit = firewall.Limit{Rate: 100, Burst: 1000}
		}
		out = append(out, compile(t, in))
	}
	return out
}

// foreign is what others have on the host: it must survive everything.
const foreign = `nft add table inet silk; nft add chain inet silk c '{ type filter hook forward priority 0; }'; nft add rule inet silk c accept
	nft add table ip silk-policy; nft add chain ip silk-policy refuse; nft add rule ip silk-policy refuse drop
	nft add table inet firewalld; nft add chain inet firewalld forward '{ type filter hook forward priority 10; }'; nft add rule inet firewalld forward ct state established accept
	iptables-nft -P FORWARD DROP; iptables-nft -N DOCKER-USER; iptables-nft -A FORWARD -j DOCKER-USER; iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE`

const showForeign = `nft list table inet silk; nft list table ip silk-policy; nft list table inet firewalld; iptables-nft-save | grep -v '^#'`

// sabotage is what others may do to a table that they can get at.
var sabotage = []string{
	"nft flush ruleset", "nft delete table inet silk-policy", "nft flush table inet silk-policy", "nft flush chain inet silk-policy forward",
	"nft flush chain inet silk-policy to-any", "nft insert rule inet silk-policy from-overlay accept", "nft add rule inet silk-policy refuse accept",
	"nft flush set inet silk-policy own", "nft flush map inet silk-policy sources", "nft flush map inet silk-policy destinations",
	`nft add element inet silk-policy own '{ "s-evil" . 10.255.30.2 }'`, "nft add element inet silk-policy destinations '{ 10.255.30.99 : accept }'",
	"nft add element inet silk-policy destinations '{ 10.255.30.98 : jump unmatched }'", "nft add chain inet silk-policy mine; nft add rule inet silk-policy mine accept",
	"nft add chain inet silk-policy early '{ type filter hook forward priority -5; policy drop; }'", "nft add set inet silk-policy other '{ type mark; }'",
	"nft add set inet silk-policy allow-0009 '{ type mark; }'", "nft add counter inet silk-policy mine", "nft delete counter inet silk-policy ended",
	"nft add table inet silk-policy '{ flags dormant; }'", "nft add element inet silk-policy services '{ 10.0.16.15 . tcp . 22 }'",
	"nft add set inet silk-policy ranges-0005-7 '{ type mark . inet_proto . inet_service; flags interval; elements = { 1 . tcp . 1-9 }; }'",
	"nft flush map inet silk-policy outside", "nft add element inet silk-policy outside '{ 10.255.30.77 : jump egress-pass }'",
	"nft flush chain inet silk-policy egress-pass", "nft insert rule inet silk-policy refuse-no-rule accept",
	"c=$(nft list chains inet | grep -om1 'reach-[0-9a-f]*'); nft insert rule inet silk-policy $c accept",
	"s=$(nft list sets inet | grep -om1 'ports-[-0-9a-f]*'); nft add element inet silk-policy $s '{ 99.0.0.0/8 . tcp . 1-2 }'",
	"s=$(nft list sets inet | grep -om1 'others-[-0-9a-f]*'); nft flush set inet silk-policy $s",
	"nft add set inet silk-policy ports-012345678901234567890123-0 '{ type ipv4_addr . inet_proto . inet_service; flags interval; elements = { 1.0.0.0/8 . tcp . 1-9 }; }'",
	"nft add element inet silk-policy allow-0001 '{ 7 . tcp . 1 }'", "nft flush set inet silk-policy allow-0002",
}

// TestRandomWalk jumps between states at random. After each jump the kernel has what was asked for, a second Set sends nothing, and what is
// foreign survives. Half of the time somebody has been at the table in between.
func TestRandomWalk(t *testing.T) {
	for _, unowned := range []bool{false, true} {
		h := newHost(t)
		h.sh(foreign)
		before := h.sh(showForeign)
		table := h.open(nft.Options{Unowned: unowned})
		seed := rand.Uint64()
		t.Logf("seed %d, unowned %v", seed, unowned)
		r := rand.New(rand.NewPCG(seed, 1))
		all := states(t, r)
		steps := 100
		if testing.Short() {
			steps = 20
		}
		for step := range steps {
			rs := all[r.IntN(len(all))]
			did := ""
			switch r.IntN(4) {
			case 0, 1:
				if did = sabotage[r.IntN(len(sabotage))]; !strings.Contains(did, "ruleset") {
					_, err := h.try(did) // what it is about may not be there
					if err == nil && owned(t, table) {
						t.Fatalf("%s: nobody objected to a change of an owned table", did)
					}
				}
			case 2:
				table.Forget()
			}
			set(t, table, rs)
			holds(t, table, rs)
			if c := set(t, table, rs); c.Sent != 0 || c.Observed != c.Desired {
				t.Fatalf("step %d after %q: a second set did %+v", step, did, c)
			}
			if after := h.sh(showForeign); after != before {
				t.Fatalf("step %d: what others made changed:\n%s\nwas\n%s", step, after, before)
			}
		}
		table.Close()
		if err := nft.Remove(h.ns); err != nil {
			t.Fatal(err)
		}
		if out := h.sh("nft list tables"); strings.Contains(out, "inet silk-policy") {
			t.Errorf("left after Remove:\n%s", out)
		}
	}
}

// TestSabotageIsNoticed is about kernels where tables have no owners: every kind of damage is told to Watch within a second, and
// a Set after it leaves the table as it was.
func TestSabotageIsNoticed(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{Unowned: true})
	in := example()
	restrict(t, &in)
	rs := compile(t, in)
	set(t, table, rs)
	ctx, cancel := context.WithCancel(context.Background())
	kicks, done := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		done <- table.Watch(ctx, func() {
			select {
			case kicks <- struct{}{}:
			default:
			}
		})
	}()
	<-kicks
	// Sets of spans get new names with a new number at the end.
	const show = `nft -s list ruleset | sed -E 's/((ports|messages|others)-[-0-9a-fl]*)-[0-9]+/\1/' | sort`
	for _, s := range sabotage {
		before := h.sh(show)
		if out, err := h.try(s); err != nil {
			if !strings.Contains(out, "allow-0009") && !strings.Contains(out, "allow-0001") && !strings.Contains(out, "counter") {
				t.Errorf("%s: %v\n%s", s, err, out)
			}
			continue
		}
		if h.sh(show) == before {
			continue
		}
		select {
		case <-kicks:
		case <-time.After(time.Second):
			t.Errorf("%s: not noticed within a second", s)
		}
		c := set(t, table, rs)
		if c.Sent == 0 || c.Drift == 0 {
			t.Errorf("%s: the set after it did %+v", s, c)
		}
		holds(t, table, rs)
		if after := h.sh(show); after != before && !strings.Contains(s, "ranges") {
			t.Errorf("%s: afterwards\n%s\nwas\n%s", s, after, before)
		}
		// Our own repair is no news.
		select {
		case <-kicks:
			if c := set(t, table, rs); c.Sent != 0 {
				t.Errorf("%s: a set for our own change did %+v", s, c)
			}
		default:
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// owned reports whether nobody else can change the table.
func owned(t *testing.T, table *nft.Table) bool {
	t.Helper()
	s, err := table.Stats(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s.Owned
}

func requireOwners(t *testing.T, table *nft.Table) {
	t.Helper()
	if !owned(t, table) {
		testkit.Require(t, "tableowner", errors.New("tables do not outlive their owners before Linux 6.9"))
	}
}

// TestOwnership: while a table is open nobody else can change it, flush it or open it; what was set stays when it is closed, and
// the next one adopts it without a change.
func TestOwnership(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{})
	rs := compile(t, example())
	set(t, table, rs)
	requireOwners(t, table)
	for _, s := range slices.DeleteFunc(slices.Clone(sabotage), func(s string) bool {
		return strings.Contains(s, "allow-0001") || strings.Contains(s, "flush ruleset")
	}) {
		if out, err := h.try(s); err == nil {
			t.Errorf("%s succeeded: %s", s, out)
		}
	}
	h.sh("nft flush ruleset")
	holds(t, table, rs)
	if other, err := nft.Open(h.ns, nft.Options{}); fault.Of(err) != fault.Conflict {
		t.Errorf("a second table opened: %v, %v", other, err)
	}
	if err := nft.Remove(h.ns); fault.Of(err) != fault.Conflict {
		t.Errorf("removed although it has an owner: %v", err)
	}
	table.Close()
	again := h.open(nft.Options{})
	holds(t, again, rs)
	if c := set(t, again, rs); c.Sent != 0 || !c.Full {
		t.Errorf("the first set after a restart did %+v", c)
	}
}

// TestOwnsWhatHadNoOwner is an upgrade of the kernel, or of us.
func TestOwnsWhatHadNoOwner(t *testing.T) {
	h := newHost(t)
	old, rs := h.open(nft.Options{Unowned: true}), compile(t, example())
	set(t, old, rs)
	old.Close()
	table := h.open(nft.Options{})
	requireOwners(t, table)
	if c := set(t, table, rs); c.Sent == 0 {
		t.Errorf("the table has no owner still: %+v", c)
	}
	holds(t, table, rs)
	if out, err := h.try("nft flush table inet silk-policy"); err == nil {
		t.Errorf("flushed: %s", out)
	}
}
