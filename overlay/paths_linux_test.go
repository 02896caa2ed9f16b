package overlay_test

import (
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/lease"
)

func TestPathsTellsThePeersThatThereAre(t *testing.T) {
	h := newHost(t, "10.0.16.15")
	if got, err := h.f.Paths(t.Context(), "silk-vtep"); len(got) > 0 || err != nil {
		t.Errorf("without a device: %v, %v", got, err)
	}
	c := example()
	h.set(c)
	paths := func() []lease.Lease {
		got, err := h.f.Paths(t.Context(), "silk-vtep")
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := paths(); !slices.Equal(got, c.Peers) {
		t.Errorf("%v, want %v", got, c.Peers)
	}
	h.sh("bridge fdb del ee:ee:0a:ff:02:00 dev silk-vtep dst 10.0.16.16; ip route add 10.255.9.0/24 dev silk-vtep")
	if got, want := paths(), c.Peers[:1]; !slices.Equal(got, want) {
		t.Errorf("with half a path: %v, want %v", got, want)
	}
}
