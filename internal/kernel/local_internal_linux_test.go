package kernel

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func FuzzParseLocal(f *testing.F) {
	var b Batch
	b.local(unix.RTM_NEWROUTE, 0, netip.MustParseAddr("169.254.0.2"), 83)
	seed := b.Bytes()[unix.NLMSG_HDRLEN:]
	f.Add(seed)
	f.Add(seed[:unix.SizeofRtMsg])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		a, ok := parseLocal(body, 83)
		if string(body) == string(seed) && (!ok || a != netip.MustParseAddr("169.254.0.2")) || ok && int(body[1]) != a.BitLen() {
			t.Errorf("%q gave %v, %v", body, a, ok)
		}
	})
}
