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
	dead := testLease(t, "10.255.4.0/24", "10.0.16.18")
	p := &plan{
		putEntries: []entry{{mac: ours.MAC, dst: ours.Underlay, permanent: true}},
		delEntries: []entry{{mac: dead.MAC, dst: dead.Underlay, permanent: true}},
		delNeighs:  []neigh{{ours.Base(), ours.MAC, true}},
	}
	f := &Fabric{rtPort: 7, nfPort: 8}
	fdb := func(mac []byte, dst netip.Addr) []byte {
		b := append(kernel.Nd(unix.AF_BRIDGE, 5, unix.NUD_PERMANENT, unix.NTF_SELF), attrs(unix.NDA_LLADDR, mac)...)
		return append(b, attrs(unix.NDA_DST, dst.AsSlice())...)
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
		{"our entry", false, kernel.Message{Type: unix.RTM_NEWNEIGH, Body: fdb(ours.MAC[:], ours.Underlay)}, true},
		{"our entry, to another host", false, kernel.Message{Type: unix.RTM_NEWNEIGH, Body: fdb(ours.MAC[:], theirs.Underlay)}, false},
		{"our entry goes again", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: fdb(ours.MAC[:], ours.Underlay)}, false},
		{"another entry", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: fdb(theirs.MAC[:], theirs.Underlay)}, false},
		{"an entry we delete", false, kernel.Message{Type: unix.RTM_DELNEIGH, Body: fdb(dead.MAC[:], dead.Underlay)}, true},
		{"an entry we delete comes again", false, kernel.Message{Type: unix.RTM_NEWNEIGH, Body: fdb(dead.MAC[:], dead.Underlay)}, false},
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
