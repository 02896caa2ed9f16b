package nft_test

import (
	"flag"
	"regexp"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/testkit"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

// sortElements sorts the elements of each set in a listing: the kernel keeps them in no order.
func sortElements(listing string) string {
	return regexp.MustCompile(`(?s)elements = \{.*?\}`).ReplaceAllStringFunc(listing, func(s string) string {
		list := strings.Split(strings.TrimSpace(s[len("elements = {"):len(s)-1]), ",")
		for i := range list {
			list[i] = strings.TrimSpace(list[i])
		}
		slices.Sort(list)
		return "elements = { " + strings.Join(list, ", ") + " }"
	})
}

// TestListing lists the table with the nft of the distribution, which dies of rules that it does not know.
func TestListing(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{Unowned: true})
	in := example()
	in.Router = 0x77
	restrict(t, &in)
	in.Endpoints[0].Ingress = []uint16{8080, 8443}
	rs := compile(t, in)
	rs.Log.Egress = true
	set(t, table, rs)
	holds(t, table, rs)
	got := sortElements(h.sh("nft -s list ruleset"))
	testkit.Listing(t, "testdata/listing.nft", got, *update)
}
