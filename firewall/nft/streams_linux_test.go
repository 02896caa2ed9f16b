package nft_test

import (
	"testing"

	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/policy"
)

// TestKnownStreams: a stream without answers, whose connection remembers who began it, is judged by the policies and groups of
// now with each packet, wherever its mark is kept.
func TestKnownStreams(t *testing.T) {
	for _, mask := range []uint32{0, 0xffff0000} {
		f := newFleet(t, nft.Options{ConnMask: mask})
		allowed := []policy.Rule{rule(1, 2, policy.UDP, 80, 80), rule(1, 2, policy.UDP, 90, 95), rule(1, 1, policy.UDP, 80, 80), rule(3, 2, policy.UDP, 81, 81)}
		f.set(allowed...)
		for host := range 2 {
			single, inRange := f.packet(1, host, 2, policy.UDP, 80), f.packet(1, host, 2, policy.UDP, 92)
			for range 3 {
				f.arrives(0, host, single, false)
				f.arrives(0, host, inRange, false)
			}
			f.set(rule(1, 2, policy.UDP, 81, 81), rule(3, 2, policy.UDP, 80, 80)) // the group still has single ports
			f.isRefused(0, host, nft.NoPolicy, single, false)
			f.isRefused(0, host, nft.NoPolicy, inRange, false)
			f.set(rule(1, 2, policy.UDP, 90, 95)) // and now it has none
			f.isRefused(0, host, nft.NoPolicy, single, false)
			f.arrives(0, host, inRange, false)
			f.set(rule(1, 2, policy.TCP, 80, 80))
			f.isRefused(0, host, nft.NoPolicy, inRange, false)
			f.set(allowed...)
			f.arrives(0, host, single, false)
			f.arrives(0, host, inRange, false)
			// Another group at the source's address does not inherit the stream, nor does one at the destination's.
			for _, end := range []struct{ host, endpoint int }{{0, 0}, {host, 1}} {
				e := &f.in[end.host].Endpoints[end.endpoint]
				was := e.Group
				e.Group = group(3)
				f.set(allowed...)
				f.isRefused(0, host, nft.NoPolicy, single, false)
				e.Group = was
				f.set(allowed...)
				f.arrives(0, host, single, false)
			}
			// Nor can another container send in it.
			thief := single
			thief.Device = f.w.Hosts[0].Device(2)
			f.isRefused(0, 0, nft.UnknownSource, thief, false)
		}
	}
}
