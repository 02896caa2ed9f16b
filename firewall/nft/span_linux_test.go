package nft

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/secgroup"
)

// FuzzSpan: what a span is written as reads as that span, in the set where it belongs, and no key is read as anything else than what it says.
func FuzzSpan(f *testing.F) {
	f.Add(uint8(6), uint32(0x0a000000), uint32(0x0a0000ff), uint16(80), uint16(90), true, []byte("\x0a\x00\x00\x00\x06\x00\x00\x00\x00\x50\x00\x00"))
	f.Add(uint8(1), uint32(0), uint32(0xffffffff), uint16(0x0800), uint16(0x08ff), false, []byte{})
	f.Add(uint8(0), uint32(7), uint32(7), uint16(132), uint16(132), false, []byte("\x0a\x00\x00\x00\x84\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, protocol uint8, first, last uint32, from, to uint16, log bool, key []byte) {
		addr := func(n uint32) netip.Addr { return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n))) }
		s := firewall.Span{First: addr(first), Last: addr(last), Protocol: secgroup.Protocol(protocol), From: from, To: to, Log: log}
		switch s.Protocol {
		case secgroup.TCP, secgroup.UDP, secgroup.ICMP:
		default:
			s.Protocol, s.From, s.To = secgroup.All, from&255, to&255
		}
		name := spanPrefix(s) + "0123456789abcdef01234567-0-0"
		a, b := spanKeys(s)
		if got, ok := parseSpan(name, a, b); !ok || got != s {
			t.Errorf("%+v came back from %s as %+v, %v", s, name, got, ok)
		}
		for _, n := range []string{"ports-x-0", "ports-l-x-0", "messages-x-0", "others-l-x-0"} {
			if got, ok := parseSpan(n, key, key); ok {
				if a, b := spanKeys(got); string(a) != string(key) || string(b) != string(key) || spanPrefix(got) != n[:len(n)-len("x-0")] {
					t.Errorf("%x of %s was read as %+v", key, n, got)
				}
			}
		}
	})
}

func TestNetworksOfAddresses(t *testing.T) {
	for text, want := range map[string]int{"0.0.0.0-255.255.255.255": 1, "10.0.0.0-10.0.0.255": 1, "10.0.0.1-10.0.0.1": 1, "10.0.0.1-10.0.0.2": 2, "0.0.0.1-255.255.255.254": 62,
		"10.0.0.3-10.0.0.250": 12, "255.255.255.255-255.255.255.255": 1} {
		var s firewall.Span
		for i, x := range []*netip.Addr{&s.First, &s.Last} {
			*x = netip.MustParseAddr(splitOnce(text)[i])
		}
		if got := networks(s); got != want {
			t.Errorf("%s: %d networks, expected %d", text, got, want)
		}
	}
}

func splitOnce(s string) [2]string {
	for i := range s {
		if s[i] == '-' {
			return [2]string{s[:i], s[i+1:]}
		}
	}
	return [2]string{s, s}
}
