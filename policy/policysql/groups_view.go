package policysql

import (
	"slices"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// groupView is the security groups of one revision. It never changes.
type groupView struct {
	groupState
	rows     []groupRow // by id
	byGUID   map[string]int
	defaults []int // places in rows
	bySpace  map[string][]int
	byMember map[identity.Group][]int
	sum      secgroup.Digest
	bad      map[string]int64 // rows that cannot be read, by GUID
}

func newGroupView(st groupState, rows []groupRow) *groupView {
	v := &groupView{groupState: st, rows: rows, byGUID: make(map[string]int, len(rows)), bySpace: map[string][]int{}, byMember: map[identity.Group][]int{}}
	sum := secgroup.Sum(nil)
	for i, r := range rows {
		sum = sum.Add(r.digest)
		v.byGUID[r.GUID] = i
		if r.StagingDefault || r.RunningDefault {
			v.defaults = append(v.defaults, i)
			continue
		}
		for _, spaces := range [][]string{r.StagingSpaces, r.RunningSpaces} {
			for _, s := range spaces {
				v.bySpace[s] = append(v.bySpace[s], i)
			}
		}
		for _, m := range r.Members {
			v.byMember[m] = append(v.byMember[m], i)
		}
	}
	v.sum = sum
	return v
}

// with returns the rows after a change, sorted by id.
func (v *groupView) with(c groupChange) []groupRow {
	put := make(map[int64]bool, len(c.put))
	for _, r := range c.put {
		put[r.id] = true
	}
	rows := make([]groupRow, 0, len(v.rows)+len(c.put))
	for _, r := range v.rows {
		if !put[r.id] && !slices.Contains(c.remove, r.id) {
			rows = append(rows, r)
		}
	}
	rows = append(rows, c.put...)
	slices.SortFunc(rows, byID)
	return rows
}

func byID(a, b groupRow) int {
	switch {
	case a.id < b.id:
		return -1
	case a.id > b.id:
		return 1
	}
	return 0
}

// touched returns the places of the groups for all containers, and for those of some spaces and policy groups, in order.
func (v *groupView) touched(spaces []string, members []identity.Group) []int {
	places := slices.Clone(v.defaults)
	for _, s := range spaces {
		places = append(places, v.bySpace[s]...)
	}
	for _, m := range members {
		places = append(places, v.byMember[m]...)
	}
	slices.Sort(places)
	return slices.Compact(places)
}

// digestOf returns the digest of the groups at places.
func (v *groupView) digestOf(places []int) secgroup.Digest {
	sum := secgroup.Sum(nil)
	for _, i := range places {
		sum = sum.Add(v.rows[i].digest)
	}
	return sum
}

func (v *groupView) records(places []int) []secgroup.Record {
	list := make([]secgroup.Record, len(places))
	for i, p := range places {
		list[i] = v.rows[p].Record
	}
	return list
}

// GroupPage is a part of a list of security groups, all of one revision.
type GroupPage struct {
	Revision revision.Revision
	Groups   []secgroup.Record
	Next     int64 // what to ask from for the next part; 0: this is the last
}

// The parts of GroupPage.Next: the number of a group, and above it the counter of the list's revision, so that all servers of a database
// know which list it is of.
const (
	idBits   = 40
	pageBits = 22
)

// token returns what to ask from for the part of this view that begins with a group.
func (v *groupView) token(id int64) int64 {
	return int64(v.Counter&(1<<pageBits-1)+1)<<idBits | id
}

// page returns at most limit (0: all) of the groups at places, from one number on.
func (v *groupView) page(places []int, from int64, limit int) GroupPage {
	first, _ := slices.BinarySearchFunc(places, from, func(p int, id int64) int {
		if v.rows[p].id < id {
			return -1
		}
		return 1
	})
	places = places[first:]
	pg := GroupPage{Revision: v.Revision}
	if limit > 0 && len(places) > limit {
		pg.Next, places = v.token(v.rows[places[limit]].id), places[:limit]
	}
	pg.Groups = v.records(places)
	return pg
}
