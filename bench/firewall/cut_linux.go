package firewall

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

const (
	tracked = 100_000 // connections on the host
	doomed  = 100     // of the group that loses a policy
)

// cut measures how long it takes to end the connections of a policy that is gone, among many.
func cut(ctx context.Context, r *bench.Report) error {
	ns, err := kernel.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	t, err := nft.Open(ns, nft.Options{})
	if err != nil {
		return err
	}
	defer t.Close()
	in := firewall.Input{Network: overlayNet, VTEP: vtep, Endpoints: []firewall.Endpoint{endpointOf("b1")},
		Rules: []policy.Rule{rule(9, tags["b1"], policy.UDP, port, port)}}
	rs, _ := firewall.Compile(in)
	if _, err := t.Set(ctx, rs); err != nil {
		return err
	}
	if err := track(ns, 9, tracked); err != nil {
		return err
	}
	var one, all []float64
	for range 5 {
		if err := track(ns, 1, doomed); err != nil {
			return err
		}
		n := 0
		ms, err := bench.Millis(func() (err error) { n, err = t.Cut(ctx, 1); return err })
		if err == nil && n != doomed {
			err = fmt.Errorf("cut %d connections, expected %d", n, doomed)
		}
		if err != nil {
			return err
		}
		one = append(one, ms)
		if ms, err = bench.Millis(func() error { _, err := t.Cut(ctx); return err }); err != nil {
			return err
		}
		all = append(all, ms)
	}
	r.AtMost("firewall.cut.100000.one_group", bench.Median(one), "ms", 1000)
	r.Add("firewall.cut.100000.all_groups", bench.Median(all), "ms", math.NaN())
	return nil
}

// From linux/netfilter/nfnetlink_conntrack.h.
const (
	ctNew                                                = unix.NFNL_SUBSYS_CTNETLINK << 8
	ctOriginal, ctReply, ctStatus, ctTimeout, ctMark     = 1, 2, 3, 7, 8
	ctIP, ctProto, ctSource, ctTarget                    = 1, 2, 1, 2
	ctProtoNumber, ctSourcePort, ctTargetPort, confirmed = 1, 2, 3, 8
)

// track writes n connections from a group to b1 into the table of a namespace.
func track(ns *kernel.NS, tag uint32, n int) error {
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b kernel.Batch
	server := netip.AddrPortFrom(addresses["b1"], port)
	for i := range n {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 255, byte(tag), byte(3 + i/50000)}), uint16(10000+i%50000))
		b.Add(ctNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL, []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0})
		tuple(&b, ctOriginal, client, server)
		tuple(&b, ctReply, server, client)
		b.Attr(ctStatus, binary.BigEndian.AppendUint32(nil, confirmed))
		b.Attr(ctTimeout, binary.BigEndian.AppendUint32(nil, 600))
		b.Attr(ctMark, binary.BigEndian.AppendUint32(nil, tag))
	}
	refused, err := c.Do(&b)
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	return err
}

func tuple(b *kernel.Batch, typ uint16, from, to netip.AddrPort) {
	b.Nest(typ|unix.NLA_F_NESTED, func() {
		b.Nest(ctIP|unix.NLA_F_NESTED, func() {
			b.Attr(ctSource, from.Addr().AsSlice())
			b.Attr(ctTarget, to.Addr().AsSlice())
		})
		b.Nest(ctProto|unix.NLA_F_NESTED, func() {
			b.Uint8(ctProtoNumber, unix.IPPROTO_UDP)
			b.Uint16BE(ctSourcePort, from.Port())
			b.Uint16BE(ctTargetPort, to.Port())
		})
	})
}
