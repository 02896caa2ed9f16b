package overlay

import (
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// attrs returns attributes as the kernel writes them: type, value, type, value...
func attrs(pairs ...any) []byte {
	var b kernel.Batch
	b.Add(0, 0, nil)
	for i := 0; i < len(pairs); i += 2 {
		b.Attr(uint16(pairs[i].(int)), pairs[i+1].([]byte))
	}
	return b.Bytes()[unix.NLMSG_HDRLEN:]
}

// FuzzParse gives any bytes to every reader of rtnetlink messages. None may panic, and what one accepts must be fit for
// a plan.
func FuzzParse(f *testing.F) {
	ip, mac, four := []byte{10, 255, 2, 0}, []byte{0xee, 0xee, 10, 255, 2, 0}, []byte{1, 0, 0, 0}
	f.Add(append(kernel.IfInfo(5, 1, 0), attrs(unix.IFLA_IFNAME, []byte("silk-vtep\x00"), unix.IFLA_ADDRESS, mac, unix.IFLA_MTU, four, unix.IFLA_LINKINFO,
		attrs(unix.IFLA_INFO_KIND, []byte("vxlan\x00"), unix.IFLA_INFO_DATA, attrs(unix.IFLA_VXLAN_ID, four, unix.IFLA_VXLAN_PORT, []byte{18, 181}, unix.IFLA_VXLAN_LOCAL, ip, unix.IFLA_VXLAN_GBP, []byte{})))...))
	f.Add(append(kernel.IfAddr(5, 16, scopeLink), attrs(unix.IFA_LOCAL, ip)...))
	f.Add(append(kernel.Rt(24, Protocol, 0, 0), attrs(unix.RTA_DST, ip, unix.RTA_GATEWAY, ip, unix.RTA_PREFSRC, ip, unix.RTA_PRIORITY, four, unix.RTA_OIF, four)...))
	f.Add(append(kernel.Rt(33, 0, 0, 0), attrs(unix.RTA_DST, ip[:3])...))
	f.Add(append(kernel.Nd(unix.AF_INET, 5, unix.NUD_PERMANENT, 0), attrs(unix.NDA_DST, ip, unix.NDA_LLADDR, mac)...))
	f.Add(append(kernel.Nd(unix.AF_BRIDGE, 5, unix.NUD_PERMANENT, unix.NTF_SELF), attrs(unix.NDA_DST, ip, unix.NDA_LLADDR, mac)...))
	f.Add(append(kernel.Nd(unix.AF_BRIDGE, 5, 0, 0), attrs(unix.NDA_LLADDR, append(mac, mac...))...))
	f.Add(append(append([]byte{unix.AF_INET}, make([]byte, 11)...), attrs(unix.FRA_FWMARK, four, unix.FRA_FWMASK, four)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		o := observed{}
		if l, _, ok := parseLink(b); ok {
			o.link = &l
		}
		if _, a, ok := parseAddr(b); ok {
			o.addrs = append(o.addrs, a)
		}
		if r, oif, ok := parseRoute(b); ok {
			if oif == 0 || r.dst != r.dst.Masked() {
				t.Errorf("route %v by device %d", r, oif)
			}
			o.routes = append(o.routes, r)
		}
		if _, n, ok := parseNeigh(b); ok {
			o.neighs = append(o.neighs, n)
		}
		if _, e, ok := parseEntry(b); ok {
			o.entries = append(o.entries, e)
		}
		o.lower = lowerLink{2, 1500, "eth0"}
		cfg := Config{Device: "silk-vtep", VNI: 1, Port: 4789, Underlay: netip.MustParseAddr("10.0.16.15"), Network: netip.MustParsePrefix("10.255.0.0/16")}
		cfg.Local = testLease(t, "10.255.30.0/24", "10.0.16.15")
		cfg.Peers = append(cfg.Peers, testLease(t, "10.255.2.0/24", "10.0.16.16"))
		w := newWish(cfg)
		if p, err := makePlan(&w, &o); err == nil {
			p.explain()
		}
		for _, typ := range []uint16{unix.RTM_NEWLINK, unix.RTM_NEWADDR, unix.RTM_NEWROUTE, unix.RTM_NEWNEIGH} {
			(&view{index: 5, peers: w.peers}).concerns(false, kernel.Message{Type: typ, Body: b})
		}
	})
}

// FuzzParseGuard gives any bytes to every reader of nftables messages.
func FuzzParseGuard(f *testing.F) {
	nf := func(a []byte) []byte { return append(kernel.NFGen(unix.NFPROTO_INET), a...) }
	be := []byte{0, 0, 0, 1}
	f.Add(nf(attrs(unix.NFTA_CHAIN_TABLE, []byte("silk\x00"), unix.NFTA_CHAIN_NAME, []byte("overlay-input\x00"), unix.NFTA_CHAIN_TYPE, []byte("filter\x00"), unix.NFTA_CHAIN_POLICY, be,
		unix.NFTA_CHAIN_HOOK, attrs(unix.NFTA_HOOK_HOOKNUM, be, unix.NFTA_HOOK_PRIORITY, be))))
	f.Add(nf(attrs(unix.NFTA_SET_TABLE, []byte("silk\x00"), unix.NFTA_SET_NAME, []byte("overlay-peers\x00"), unix.NFTA_SET_KEY_TYPE, []byte{0, 0, 0, 7}, unix.NFTA_SET_DESC, attrs(unix.NFTA_SET_DESC_SIZE, be))))
	f.Add(nf(attrs(unix.NFTA_SET_ELEM_LIST_ELEMENTS, attrs(unix.NFTA_LIST_ELEM, attrs(unix.NFTA_SET_ELEM_KEY, attrs(unix.NFTA_DATA_VALUE, be))))))
	for _, name := range []string{"meta", "cmp", "payload", "bitwise", "lookup", "counter", "notrack", "immediate", "socket"} {
		data := attrs(1, be, 2, be, 3, attrs(1, be), 4, attrs(2, attrs(1, be)), 5, attrs(1, be))
		f.Add(nf(attrs(unix.NFTA_RULE_EXPRESSIONS, attrs(unix.NFTA_LIST_ELEM, attrs(unix.NFTA_EXPR_NAME, []byte(name+"\x00"), unix.NFTA_EXPR_DATA, data)))))
	}
	c := Config{Device: "silk-vtep", Port: 4789, Underlay: netip.MustParseAddr("10.0.16.15"), Network: netip.MustParsePrefix("10.255.0.0/16")}
	c.Local.Subnet = netip.MustParsePrefix("10.255.30.0/24")
	want := guardRules(c, "eth0")[0].rules
	f.Fuzz(func(t *testing.T, b []byte) {
		dormant(b)
		isPeerSet(b)
		isOwnSet(b)
		eachKey(b, func(key []byte) {
			if len(key) == len(pair{}) {
				samePairs([]pair{pair(key)}, nil)
			}
		})
		parseChain(b)
		recognise(b, want)
		if err := parseElements(b, func(a netip.Addr, ok bool) {
			if ok && !a.Is4() {
				t.Errorf("element %v", a)
			}
		}); err != nil {
			t.Error(err)
		}
		for typ := range uint16(0x20) {
			concernsGuard(kernel.Message{Type: kernel.NFTables(typ), Body: b})
		}
	})
}
