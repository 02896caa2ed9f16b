package nft_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
	"github.com/google/go-cmp/cmp"
)

// TestLogListing lists the rules that log with the nft of the distribution.
func TestLogListing(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{Unowned: true, LogGroup: 4711})
	rs := compile(t, example())
	rs.Log = firewall.Log{C2C: true, Denied: 2, UDP: 50}
	set(t, table, rs)
	holds(t, table, rs)
	got := sortElements(h.sh("nft -s list ruleset"))
	testkit.Listing(t, "testdata/logging.nft", got, *update)
}

// TestLogSwitch: turning the log on and off changes the rules that log, their sets, and nothing else.
func TestLogSwitch(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{})
	rs := compile(t, example())
	set(t, table, rs)
	before := h.sh("nft -s list ruleset")
	on := rs
	for _, l := range []firewall.Log{{C2C: true}, {C2C: true, Denied: 7, UDP: 9}, {C2C: true, Egress: true, Denied: 7, UDP: 9}, {}} {
		on.Log = l
		c, err := table.Set(context.Background(), on)
		if err != nil {
			t.Fatal(err)
		}
		if c.Full && c.Drift > 0 || c.Sent > 200 {
			t.Errorf("log %+v: %+v", l, c)
		}
		holds(t, table, on)
	}
	if d := cmp.Diff(lines(before), lines(h.sh("nft -s list ruleset"))); d != "" {
		t.Errorf("on and off again (-before +after):\n%s", d)
	}
}

// lines returns those of a listing in an order of their own: the kernel lists sets in the order in which they came.
func lines(listing string) []string {
	out := strings.Split(sortElements(listing), "\n")
	slices.Sort(out)
	return out
}
