package authorityhttp

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	var p paces
	host, now, admitted := netip.MustParseAddr("10.0.0.1"), time.Unix(1000, 0), 0
	for range 1000 { // 100 s of 10 a second
		if p.admit(host, now) {
			admitted++
		}
		now = now.Add(100 * time.Millisecond)
	}
	if want := burst + int(100*time.Second/pace) - 1; admitted < want-1 || admitted > want+1 {
		t.Errorf("admitted %d times in 100 s, want %d", admitted, want)
	}
	if now = now.Add(time.Hour); !p.admit(host, now) {
		t.Error("refused after an hour")
	}
}

func TestPacesAreForgotten(t *testing.T) {
	var p paces
	now := time.Unix(1000, 0)
	for n := range 100_000 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(n))
		p.admit(netip.AddrFrom4(b), now)
		now = now.Add(100 * time.Millisecond)
	}
	if n := len(p.free); n > 1000 {
		t.Errorf("%d hosts are remembered, want those of the last 80 s", n)
	}
}
