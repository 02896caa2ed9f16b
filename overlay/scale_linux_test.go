package overlay_test

import (
	"strings"
	"testing"
)

// TestManyPeersAtDefaultThresholds holds more neighbours than the kernel keeps of those it finds out itself (gc_thresh3,
// 1,024): permanent ones do not count. How long it takes is for bench/overlay to judge.
func TestManyPeersAtDefaultThresholds(t *testing.T) {
	n := 65_000
	if testing.Short() {
		n = 5_000
	}
	h := newHost(t, "192.168.16.15")
	if v := strings.TrimSpace(h.sh("cat /proc/sys/net/ipv4/neigh/default/gc_thresh3 2>/dev/null || echo 1024")); v != "1024" {
		t.Logf("gc_thresh3 is %s here", v)
	}
	c := large(n)
	r := h.set(c)
	if r.Failed != 0 || r.Desired != 4*n {
		t.Errorf("report %+v", r)
	}
	c.Peers = append(c.Peers[:n/2:n/2], c.Peers[n/2+1:]...)
	h.set(c)
	if r := h.set(c); r.Changed != 0 || r.Observed != 4*(n-1) {
		t.Errorf("report %+v", r)
	}
	h.holds(c)
	if got := strings.Count(h.sh("ip neigh show dev silk-vtep nud permanent"), "\n"); got != n-1 {
		t.Errorf("%d neighbours, want %d", got, n-1)
	}
}
