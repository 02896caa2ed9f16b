package policysql

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// manyGroups returns a view of groups, each bound to some of 2,000 spaces, every fiftieth a default.
func manyGroups(n int) *groupView {
	rows := make([]groupRow, n)
	for i := range rows {
		r := &rows[i]
		r.id = int64(i + 1)
		r.Record = secgroup.Record{GUID: fmt.Sprintf("guid-%d", i), Name: fmt.Sprintf("name-%d", i), Rules: strings.Repeat(`{"protocol":"all"}`, 500), RunningDefault: i%50 == 0,
			RunningSpaces: []string{fmt.Sprintf("space-%d", i%2000), fmt.Sprintf("space-%d", i*7%2000)}, StagingSpaces: []string{fmt.Sprintf("space-%d", i*3%2000)},
			Members: []identity.Group{identity.Group(fmt.Sprintf("group-%d", i%300))}}
		r.tidy()
		r.digest = r.Record.Digest()
	}
	return newGroupView(groupState{Revision: revision.Revision{Epoch: "e", Counter: 5}}, rows)
}

// TestTouchedIsWhatRecordsSay compares what a view finds by its indexes with what each record says of itself, and the digest with that of the records.
func TestTouchedIsWhatRecordsSay(t *testing.T) {
	v := manyGroups(500)
	for i := range 50 {
		spaces, members := []string{fmt.Sprintf("space-%d", i), fmt.Sprintf("space-%d", i*11), "none"}, []identity.Group{identity.Group(fmt.Sprintf("group-%d", i*5))}
		var want []secgroup.Record
		for _, r := range v.rows {
			if r.Touches(spaces, members) {
				want = append(want, r.Record)
			}
		}
		places := v.touched(spaces, members)
		if got := v.records(places); !slices.EqualFunc(got, want, secgroup.Record.Equal) || v.digestOf(places) != secgroup.Sum(want) {
			t.Fatalf("%v, %v: %d groups, expected %d, or another digest", spaces, members, len(got), len(want))
		}
	}
}

// TestPartsOfAList cuts a list into parts of all sizes.
func TestPartsOfAList(t *testing.T) {
	v := manyGroups(60)
	places := v.touched([]string{"space-1", "space-2", "space-3", "space-4"}, nil)
	all := v.records(places)
	for size := range len(all) + 2 {
		var got []secgroup.Record
		for from, n := int64(0), 0; ; n++ {
			p := v.page(places, from&(1<<idBits-1), size)
			got = append(got, p.Groups...)
			if from = p.Next; from == 0 {
				break
			}
			if from>>idBits != int64(v.Counter)+1 || n > len(all) {
				t.Fatalf("size %d: next is %d after %d parts", size, from, n)
			}
		}
		if !slices.EqualFunc(got, all, secgroup.Record.Equal) {
			t.Errorf("in parts of %d: %d groups, expected %d", size, len(got), len(all))
		}
	}
}

// BenchmarkWokenWatcher is what a change of any group costs for each host that waits: one with containers of 50 spaces, of 1,000 groups.
func BenchmarkWokenWatcher(b *testing.B) {
	v := manyGroups(1000)
	var spaces []string
	for i := range 50 {
		spaces = append(spaces, fmt.Sprintf("space-%d", i*13))
	}
	b.ReportAllocs()
	for b.Loop() {
		if places := v.touched(spaces, nil); v.digestOf(places) == 0 {
			b.Fatal("no digest")
		}
	}
}

// BenchmarkViewOfAChange is what a change costs a store: the view of 1,000 groups of 9 KiB, of which one changed.
func BenchmarkViewOfAChange(b *testing.B) {
	v := manyGroups(1000)
	b.ReportAllocs()
	for b.Loop() {
		r := v.rows[7]
		r.Name += "x"
		v.after(groupChange{put: []groupRow{r}})
	}
}
