package kernel

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

func FuzzParseDevice(f *testing.F) {
	var b Batch
	b.Add(unix.RTM_NEWLINK, 0, IfInfo(7, 0, 0))
	b.String(unix.IFLA_IFNAME, "silk-vtep")
	b.Attr(unix.IFLA_ADDRESS, []byte{0xee, 0xee, 10, 255, 30, 0})
	seed := b.Bytes()[unix.NLMSG_HDRLEN:]
	f.Add(seed)
	f.Add(seed[:unix.SizeofIfInfomsg])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		d, ok := parseDevice(body)
		if ok != (d.Name != "") {
			t.Errorf("%q gave %+v, %v", body, d, ok)
		}
		if bytes.Equal(body, seed) && (!ok || d.Index != 7 || d.Name != "silk-vtep" || len(d.MAC) != 6) {
			t.Errorf("a device was read as %+v, %v", d, ok)
		}
	})
}

func FuzzParseNumber(f *testing.F) {
	var b Batch
	b.Add(unix.RTM_NEWNSID, 0, []byte{0, 0, 0, 0})
	b.Uint32(unix.NETNSA_NSID, 7)
	seed := b.Bytes()[unix.NLMSG_HDRLEN:]
	f.Add(seed)
	f.Add(seed[:len(seed)-1])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		n := parseNumber(body)
		if bytes.Equal(body, seed) && n != 7 || len(body) < 12 && n != -1 {
			t.Errorf("%q gave %d", body, n)
		}
	})
}
