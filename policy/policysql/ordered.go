package policysql

import (
	"iter"
	"slices"
	"sort"
)

// ordered is a sorted list without duplicates that never changes: an edit makes a new one, which shares all pages with the old that the edit did not touch. So
// readers need no lock, and a change among 60,000 elements costs a few pages.
type ordered[T any] struct {
	pages [][]T // none is empty
	n     int
}

const (
	pageSize = 128              // elements of a page at most
	pageFill = pageSize * 3 / 4 // elements of a new page
)

// newOrdered makes a list of what is sorted.
func newOrdered[T any](sorted []T) ordered[T] {
	o := ordered[T]{n: len(sorted)}
	for part := range slices.Chunk(sorted, pageFill) {
		o.pages = append(o.pages, slices.Clone(part))
	}
	return o
}

// search returns where the first element stands for which at is not negative; at must grow along the list.
func (o ordered[T]) search(at func(T) int) (page, index int) {
	page = sort.Search(len(o.pages), func(i int) bool { return at(o.pages[i][len(o.pages[i])-1]) >= 0 })
	if page < len(o.pages) {
		index = sort.Search(len(o.pages[page]), func(i int) bool { return at(o.pages[page][i]) >= 0 })
	}
	return page, index
}

// find returns the element for which at is 0.
func (o ordered[T]) find(at func(T) int) (v T, ok bool) {
	if p, i := o.search(at); p < len(o.pages) && at(o.pages[p][i]) == 0 {
		return o.pages[p][i], true
	}
	return v, false
}

// span iterates over the elements for which at is 0.
func (o ordered[T]) span(at func(T) int) iter.Seq[T] {
	return func(yield func(T) bool) {
		p, i := o.search(at)
		for ; p < len(o.pages); p, i = p+1, 0 {
			for _, v := range o.pages[p][i:] {
				if at(v) != 0 || !yield(v) {
					return
				}
			}
		}
	}
}

// all iterates over the list.
func (o ordered[T]) all() iter.Seq[T] {
	return func(yield func(T) bool) {
		for _, p := range o.pages {
			for _, v := range p {
				if !yield(v) {
					return
				}
			}
		}
	}
}

// editor makes a new list from an old one.
type editor[T any] struct {
	pages   [][]T
	own     []bool // the page of the same index is not shared
	n       int
	compare func(a, b T) int
}

func (o ordered[T]) edit(compare func(a, b T) int) *editor[T] {
	return &editor[T]{slices.Clone(o.pages), make([]bool, len(o.pages)), o.n, compare}
}

func (e *editor[T]) done() ordered[T] { return ordered[T]{e.pages, e.n} }

// page returns the page at an index, to be written to.
func (e *editor[T]) page(p int) []T {
	if !e.own[p] {
		e.pages[p], e.own[p] = append(make([]T, 0, min(len(e.pages[p])+pageSize/8, pageSize)), e.pages[p]...), true
	}
	return e.pages[p]
}

// insert adds v; one that is there already is replaced.
func (e *editor[T]) insert(v T) {
	at := func(x T) int { return e.compare(x, v) }
	p, i := ordered[T]{e.pages, e.n}.search(at)
	if p == len(e.pages) { // beyond the last
		if p == 0 {
			e.pages, e.own, e.n = [][]T{{v}}, []bool{true}, 1
			return
		}
		p, i = p-1, len(e.pages[p-1])
	} else if at(e.pages[p][i]) == 0 {
		e.page(p)[i] = v
		return
	}
	e.n++
	e.pages[p] = slices.Insert(e.page(p), i, v)
	if all := e.pages[p]; len(all) >= pageSize {
		half := len(all) / 2
		e.pages[p] = slices.Clone(all[:half])
		e.pages = slices.Insert(e.pages, p+1, slices.Clone(all[half:]))
		e.own = slices.Insert(e.own, p+1, true)
	}
}

// remove deletes what compares equal to v.
func (e *editor[T]) remove(v T) {
	at := func(x T) int { return e.compare(x, v) }
	p, i := ordered[T]{e.pages, e.n}.search(at)
	if p == len(e.pages) || at(e.pages[p][i]) != 0 {
		return
	}
	e.n--
	e.pages[p] = slices.Delete(e.page(p), i, i+1)
	if len(e.pages[p]) > pageSize/8 {
		return
	}
	if p+1 < len(e.pages) && len(e.pages[p])+len(e.pages[p+1]) <= pageFill {
		e.pages[p] = append(e.page(p), e.pages[p+1]...)
		e.pages, e.own = slices.Delete(e.pages, p+1, p+2), slices.Delete(e.own, p+1, p+2)
	} else if p > 0 && len(e.pages[p])+len(e.pages[p-1]) <= pageFill {
		e.pages[p-1] = append(e.page(p-1), e.pages[p]...)
		e.pages, e.own = slices.Delete(e.pages, p, p+1), slices.Delete(e.own, p, p+1)
	} else if len(e.pages[p]) == 0 {
		e.pages, e.own = slices.Delete(e.pages, p, p+1), slices.Delete(e.own, p, p+1)
	}
}
