package registration_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/registration"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// twin is a table that is easily seen to be right.
type twin []registration.Registration

func (w *twin) register(r registration.Registration) bool {
	for i, o := range *w {
		if o.Name == r.Name && o.Address == r.Address {
			(*w)[i] = r
			return false
		}
	}
	*w = append(*w, r)
	return true
}

func (w *twin) drop(gone func(registration.Registration) bool) int {
	n := len(*w)
	*w = slices.DeleteFunc(*w, gone)
	return n - len(*w)
}

func (w twin) of(name string) (list []registration.Registration) {
	for _, r := range w {
		if string(r.Name) == name {
			list = append(list, r)
		}
	}
	return list
}

func (w twin) there(name string) bool {
	return slices.ContainsFunc(w, func(r registration.Registration) bool { return r.Name.Below(registration.Name(name)) })
}

func (w twin) lookup(name string) ([]registration.Registration, registration.Standing) {
	if list := w.of(name); list != nil {
		return list, registration.Present
	}
	first, rest, _ := strings.Cut(name, ".")
	if index, err := strconv.Atoi(first); err == nil && index >= 0 && strconv.Itoa(index) == first {
		list := slices.DeleteFunc(w.of(rest), func(r registration.Registration) bool { return r.Index != index })
		if len(list) > 0 {
			return list, registration.Present
		}
	}
	if w.there(name) {
		return nil, registration.Above
	}
	for rest != "" && !w.there(rest) {
		_, rest, _ = strings.Cut(rest, ".")
	}
	if list := w.of("*." + rest); list != nil {
		return list, registration.Present
	}
	return nil, registration.Absent
}

func (w twin) namesOf(a netip.Addr) (names []registration.Name) {
	for _, r := range w {
		if r.Address == a {
			names = append(names, r.Name)
		}
	}
	return names
}

// randomName makes names of few different parts, so that they meet.
func randomName(r *rand.Rand) string {
	parts := []string{"a", "b", "0", "1", "01", "x"}
	var name []string
	for range 1 + r.IntN(4) {
		name = append(name, parts[r.IntN(len(parts))])
	}
	if len(name) > 1 && r.IntN(6) == 0 {
		name[0] = "*"
	}
	return strings.Join(name, ".")
}

func randomRegistration(r *rand.Rand, now time.Time) registration.Registration {
	pick := func(texts ...string) string { return texts[r.IntN(len(texts))] }
	out := registration.Registration{
		Name: registration.Name(randomName(r)), Address: netip.AddrFrom4([4]byte{10, 255, 0, byte(r.IntN(8))}), Index: r.IntN(3) - 1, Port: uint16(r.IntN(3)),
		Endpoint: pick("", "c1", "0f8fad5b-d9cb-469f-a165-70867728950e", "0F8fad5b-d9cb-469f-a165-70867728950e"), Zone: pick("", "z1"), Group: pick("", strings.Repeat("g", registration.MaxText)), Seen: now,
	}
	if r.IntN(8) == 0 {
		out.Address = netip.MustParseAddr("fd00::1")
	}
	if r.IntN(4) == 0 {
		out.Updated = now.Add(-time.Minute)
	}
	return out
}

// byNameAndAddress sorts, since a table has no order of names, nor has what NamesOf says of names that have come again one with the twin.
func byNameAndAddress(a, b registration.Registration) int {
	if c := strings.Compare(string(a.Name), string(b.Name)); c != 0 {
		return c
	}
	return a.Address.Compare(b.Address)
}

func same(t *testing.T, table *registration.Table, w twin) {
	t.Helper()
	var got twin
	names := 0
	for name, list := range table.All() {
		names++
		for _, r := range list {
			if r.Name != name {
				t.Fatalf("a registration of %s is among those of %s", r.Name, name)
			}
		}
		got = append(got, list...)
	}
	want := slices.Clone(w)
	slices.SortFunc(got, byNameAndAddress)
	slices.SortFunc(want, byNameAndAddress)
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("table (-want +got):\n%s", diff)
	}
	if n, all := table.Len(); n != names || all != len(w) || len(table.Names()) != names {
		t.Fatalf("%d names and %d registrations are counted, %d listed; there are %d and %d", n, all, len(table.Names()), names, len(w))
	}
}

func sameLookup(t *testing.T, table *registration.Table, w twin, name string) {
	t.Helper()
	want, standing := w.lookup(name)
	got, ok := table.Lookup(registration.Name(name))
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" || ok != (want != nil) {
		t.Fatalf("%s, found %v (-want +got):\n%s", name, ok, diff)
	}
	addrs, st := table.AppendAddrs(nil, []byte(name))
	if st != standing || table.Standing([]byte(name)) != standing || len(addrs) != len(want) {
		t.Fatalf("%s: %d addresses, %v, want %d, %v", name, len(addrs), st, len(want), standing)
	}
	for i := range addrs {
		if addrs[i] != want[i].Address {
			t.Fatalf("%s: addresses %v, want those of %v", name, addrs, want)
		}
	}
}

// TestTwin lets a table and its twin go through the same at random.
func TestTwin(t *testing.T) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 5))
		table, w, now := registration.NewTable(), twin{}, time.Unix(1_000_000, 0)
		empty := table.Size()
		for range 600 {
			now = now.Add(time.Duration(r.IntN(3)) * time.Second)
			turn, was := table.Turn(), fmt.Sprint(w)
			switch k := r.IntN(20); {
			case k < 12:
				reg := randomRegistration(r, now)
				if got, want := table.Register(reg), w.register(reg); got != want {
					t.Fatalf("seed %d: %v is new: %v, want %v", seed, reg, got, want)
				}
			case k < 18:
				reg := randomRegistration(r, now)
				want := w.drop(func(o registration.Registration) bool { return o.Name == reg.Name && o.Address == reg.Address }) > 0
				if got := table.Unregister(reg.Name, reg.Address); got != want {
					t.Fatalf("seed %d: %v was there: %v, want %v", seed, reg, got, want)
				}
			default:
				limit := now.Add(-time.Duration(r.IntN(200)) * time.Second)
				want := w.drop(func(o registration.Registration) bool { return o.Seen.Before(limit) })
				if got := table.Prune(limit); got != want {
					t.Fatalf("seed %d: %d pruned, want %d", seed, got, want)
				}
			}
			if table.Turn() != turn && fmt.Sprint(w) == was {
				t.Fatalf("seed %d: the turn has changed, nothing else", seed)
			}
			sameLookup(t, table, w, randomName(r))
			a := netip.AddrFrom4([4]byte{10, 255, 0, byte(r.IntN(8))})
			got, want := table.NamesOf(a), w.namesOf(a)
			if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
				t.Fatalf("seed %d: names of %v: %q, want %q", seed, a, got, want)
			}
		}
		same(t, table, w)
		if table.Prune(now.Add(time.Hour)); table.Size() != empty || table.Standing([]byte("a")) != registration.Absent {
			t.Fatalf("seed %d: %d bytes are left in a table without registrations, want %d", seed, table.Size(), empty)
		}
	}
}
