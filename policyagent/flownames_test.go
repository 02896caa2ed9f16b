package policyagent

import (
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
)

// TestFlowNames: an address goes on with the name of its last container for a while, unless another has it; metadata that cannot be read name nobody.
func TestFlowNames(t *testing.T) {
	f := &flowLog{wanted: true, join: flow.New(flow.Options{})}
	address := netip.MustParseAddr("10.255.30.2")
	named := func(id, metadata string) hosted {
		return hosted{containers: []container{{key: endpoint.Key{Container: id}, metadata: []byte(metadata),
			endpoints: []firewall.Endpoint{{Device: "s-010255030002", Address: address, Group: "web"}}}}}
	}
	at := time.Now()
	whose := func(after time.Duration, h hosted) string {
		f.know(h, nil, 1, firewall.Ruleset{}, at.Add(after))
		p := f.known.parties[address]
		if p == nil {
			return "nobody"
		}
		return p.Container + " " + p.App + " " + p.Space + " " + p.Org
	}
	for _, c := range []struct {
		after time.Duration
		h     hosted
		want  string
	}{
		{0, named("one", `{"app_id":"a","space_id":"s","org_id":"o"}`), "one a s o"},
		{time.Second, hosted{}, "one a s o"},
		{2 * time.Second, named("two", `{"app_id":7,"space_id":"s"}`), "two  s "},
		{3 * time.Second, hosted{}, "two  s "},
		{12 * time.Second, hosted{}, "two  s "},
		{14 * time.Second, hosted{}, "nobody"},
		{15 * time.Second, named("three", `[`), "three   "},
	} {
		if got := whose(c.after, c.h); got != c.want {
			t.Errorf("after %v: %q, want %q", c.after, got, c.want)
		}
	}
	f.wanted = false
	if whose(16*time.Second, named("four", "")) != "nobody" {
		t.Error("names are kept while nobody wants them")
	}
}

// TestFlowRecentIsBounded: who is slow misses some, and is told how many.
func TestFlowRecentIsBounded(t *testing.T) {
	r := newFlowRecent()
	buf := make([]flow.Record, 0, 10)
	records, _, missed, more := r.since(0, buf)
	if len(records) != 0 || missed != 0 || more == nil {
		t.Errorf("of nothing: %d, missed %d", len(records), missed)
	}
	for i := range keptRecords + 5 {
		r.add(&flow.Record{Mark: uint32(i)})
	}
	r.wake()
	select {
	case <-more:
	default:
		t.Error("who waits is not told")
	}
	records, next, missed, _ := r.since(0, buf)
	if len(records) != 10 || records[0].Mark != 5 || next != 15 || missed != 5 {
		t.Errorf("%d from %+v on, then %d, missed %d", len(records), records[0], next, missed)
	}
	if got := r.after(r.id(14)); got != 15 {
		t.Errorf("after 14 comes %d", got)
	}
	for _, id := range []string{"", "other-14", r.epoch, r.epoch + "-x", r.epoch + "--1"} {
		if got := r.after(id); got != 0 {
			t.Errorf("after %q comes %d", id, got)
		}
	}
	if records, _, _, more = r.since(1<<62, buf); len(records) != 0 || more == nil {
		t.Error("a number that nobody was told of")
	}
}
