package registration

import "slices"

// host is an address that has names.
type host struct {
	told  *told
	names []Name       // in the order in which they came; "": one that has gone
	gone  int          // of names, how many are ""
	at    map[Name]int // where each is in names; nil while they are few
}

// fewNames are looked through faster than an index is kept.
const fewNames = 64

// find returns where a name is, or -1.
func (h *host) find(name Name) int {
	if h.at == nil {
		return slices.Index(h.names, name)
	}
	if i, ok := h.at[name]; ok {
		return i
	}
	return -1
}

// add adds a name that is not there.
func (h *host) add(name Name) {
	h.names = append(h.names, name)
	if h.at != nil {
		h.at[name] = len(h.names) - 1
	} else if len(h.names) > fewNames {
		h.index()
	}
}

// remove removes a name, if it is there. Of many each leaves a hole, and the others move up when half of all are holes: an address that has a hundred
// thousand names loses them in no more time for each than others.
func (h *host) remove(name Name) {
	i := h.find(name)
	switch {
	case i < 0:
	case h.at == nil:
		h.names = slices.Delete(h.names, i, i+1)
	default:
		h.names[i] = ""
		delete(h.at, name)
		if h.gone++; 2*h.gone > len(h.names) {
			h.names, h.gone = h.list(), 0
			h.index()
		}
	}
}

// index makes at anew.
func (h *host) index() {
	h.at = nil
	if len(h.names) <= fewNames {
		return
	}
	h.at = make(map[Name]int, len(h.names))
	for i, n := range h.names {
		h.at[n] = i
	}
}

// list returns the names, for the caller to keep; nil for none.
func (h *host) list() []Name {
	if h.empty() {
		return nil
	}
	list := make([]Name, 0, len(h.names)-h.gone)
	for _, n := range h.names {
		if n != "" {
			list = append(list, n)
		}
	}
	return list
}

func (h *host) empty() bool { return len(h.names) == h.gone }
