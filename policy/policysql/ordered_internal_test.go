package policysql

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
)

// check compares a list with what it should hold, and looks at its pages.
func check(t *testing.T, o ordered[int], want []int) {
	t.Helper()
	if got := slices.Collect(o.all()); !slices.Equal(got, want) || o.n != len(want) {
		t.Fatalf("the list has %d elements and counts %d, want %d", len(got), o.n, len(want))
	}
	for i, p := range o.pages {
		if len(p) == 0 || len(p) > pageSize {
			t.Fatalf("page %d has %d elements", i, len(p))
		}
	}
	if most := 4 + 4*len(want)/(pageSize/8); len(o.pages) > most {
		t.Fatalf("%d elements take %d pages, want at most %d", len(want), len(o.pages), most)
	}
}

// TestOrderedAgreesWithASlice edits lists at random, in batches. Earlier lists stay what they were.
func TestOrderedAgreesWithASlice(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var kept []ordered[int]
	var were [][]int
	var o ordered[int]
	var want []int
	for round := range 400 {
		grow := round%100 < 60 // then it shrinks again, to nothing
		e := o.edit(cmp.Compare[int])
		want = slices.Clone(want)
		for range 1 + rnd.IntN(120) {
			v := rnd.IntN(5000)
			if round%100 >= 90 && len(want) > 0 {
				v = want[rnd.IntN(len(want))]
			}
			i, found := slices.BinarySearch(want, v)
			if grow == (rnd.IntN(5) > 0) {
				e.insert(v)
				if !found {
					want = slices.Insert(want, i, v)
				}
			} else {
				e.remove(v)
				if found {
					want = slices.Delete(want, i, i+1)
				}
			}
		}
		o = e.done()
		check(t, o, want)
		for range 20 {
			v := rnd.IntN(5100) - 50
			got, ok := o.find(func(x int) int { return cmp.Compare(x, v) })
			if _, found := slices.BinarySearch(want, v); ok != found || ok && got != v {
				t.Fatalf("find %d = %d, %v, want %v", v, got, ok, found)
			}
			tens := slices.Collect(o.span(func(x int) int { return cmp.Compare(x/10, v/10) }))
			from, _ := slices.BinarySearchFunc(want, v/10, func(x, d int) int { return cmp.Compare(x/10, d) })
			to, _ := slices.BinarySearchFunc(want, v/10+1, func(x, d int) int { return cmp.Compare(x/10, d) })
			if !slices.Equal(tens, want[from:to]) {
				t.Fatalf("span of %d: %v, want %v", v/10, tens, want[from:to])
			}
		}
		if round%10 == 0 {
			kept, were = append(kept, o), append(were, slices.Clone(want))
		}
	}
	for i := range kept {
		check(t, kept[i], were[i])
	}
}

func TestOrderedStopsWhenToldTo(t *testing.T) {
	all := make([]int, 1000)
	for i := range all {
		all[i] = i
	}
	o := newOrdered(all)
	check(t, o, all)
	n := 0
	for v := range o.all() {
		if n++; v == 500 {
			break
		}
	}
	for v := range o.span(func(int) int { return 0 }) {
		if n++; v == 300 {
			break
		}
	}
	if n != 501+301 {
		t.Errorf("%d elements were seen, want 802", n)
	}
}

func TestPortions(t *testing.T) {
	for n := range 3 * chunk {
		list := make([]int, n)
		for i := range list {
			list[i] = i
		}
		var got []int
		sizes := map[int]bool{}
		portions(list, func(part []int) {
			got = append(got, part...)
			sizes[len(part)] = true
			if len(part)&(len(part)-1) != 0 || len(part) > chunk {
				t.Fatalf("%d elements: a part of %d", n, len(part))
			}
		})
		if !slices.Equal(got, list) {
			t.Fatalf("%d elements became %v", n, got)
		}
	}
}
