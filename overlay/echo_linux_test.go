package overlay

import (
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// TestOnlyTheEchoOfAPlanIsExplained holds what a Set takes for the notifications of its own requests.
func TestOnlyTheEchoOfAPlanIsExplained(t *testing.T) {
	ours, theirs := testLease(t, "10.255.2.0/24", "10.0.16.16"), testLease(t, "10.255.3.0/24", "10.0.16.17")
	p := &plan{
		putEntries: []entry{{mac: ours.MAC, dst: ours.Underlay, permanent: true}},
		delNeighs:  []neigh{{ours.Base(), ours.MAC, true}},
	}
	f := &Fabric{rtPort: 7, nfPort: 8}
	fdb := func(mac []byte) []byte {
		return append(kernel.Nd(unix.AF_BRIDGE, 5, unix.NUD_PERMANENT, unix.NTF_SELF), attrs(unix.NDA_LLADDR, mac)...)
	}
	arp := func(a netip.Addr) []byte {
		return append(kernel.Nd(unix.AF_INET, 5, unix.NUD_PERMANENT, 0), attrs(unix.NDA_DST, a.AsSlice())...)
	}
	for _, c := range []struct {
		name string
		nf   bool
		m    kernel.Message
		want bool
	}{
		{"our route", false, kernel.Message{Type: unix.RTM_NEWROUTE, Port: 7}, true},
		{"their route", false, kernel.Message{Type: unix.RTM_NEWROUTE, Port: 9}, false},
		{"the kernel's route", false, kernel.Message{Type: unix.RTM_DELROUTE}, false},
		{"our set element", true, kernel.Message{Port: 8}, true},
		{"their set element", true, kernel.Message{Port: 7}, false},
		{"our entry", false, kernel.Message{Type: unix.RTM_NEWNEIGH, Body: fdb(ours.MAC[:])}, true},
		{"another entry", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: fdb(theirs.MAC[:])}, false},
		{"our neighbour goes", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: arp(ours.Base())}, true},
		{"another goes", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: arp(theirs.Base())}, false},
		{"a neighbour changes", false, kernel.Message{Type: unix.RTM_NEWNEIGH, Body: arp(ours.Base())}, false},
		{"a link", false, kernel.Message{Type: unix.RTM_NEWLINK}, false},
	} {
		if got := f.explains(p)(c.nf, c.m); got != c.want {
			t.Errorf("%s: explained %v, want %v", c.name, got, c.want)
		}
	}
}
