package endpoint

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// What is read of the file of ports can be written and read again, and is nothing that could not be a port map.
func FuzzClaims(f *testing.F) {
	f.Add([]byte("tcp * 8080 80 silk@c1@eth0@10.255.30.2\nudp 10.0.16.15 53 5353 silk@c1@e th0@10.255.30.2\n"))
	f.Add([]byte("tcp ::1 1 1 x\nicmp * 1 1 x\ntcp * 0 1 x\ntcp * 1 65536 x\n\n x"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var again []byte
		all := parseClaims(text)
		for _, c := range all {
			if err := validPorts([]PortMap{c.PortMap}, netip.Prefix{}); err != nil {
				t.Fatalf("%q gave %v: %v", text, c, err)
			}
			again = fmt.Appendln(again, c)
		}
		if got := parseClaims(again); !slices.Equal(got, all) {
			t.Fatalf("%q gave %v, and that gave %v", text, all, got)
		}
	})
}
