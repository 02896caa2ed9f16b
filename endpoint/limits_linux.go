package endpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// What goes to the container waits in a token bucket on the host's end of its veth pair; what comes from it is sent round by a device of kind
// ifb and waits there. As tc(8) would have them, for 10.255.30.2:
//
//	qdisc replace dev s-010255030002 root handle 1: tbf rate R burst B limit R*25ms+B
//	link add i-010255030002 index I mtu 1450 type ifb
//	qdisc replace dev i-010255030002 root handle 1: tbf rate R burst B limit R*25ms+B
//	qdisc add dev s-010255030002 clsact
//	filter add dev s-010255030002 ingress prio 100 u32 match u32 0 0 action mirred egress redirect dev i-010255030002

// Limiter names the device that delays what a container sends, after its address as Device does; "" for an address that is not IPv4.
func Limiter(a netip.Addr) string {
	if d := Device(a); d != "" {
		return "i-" + d[len("s-"):]
	}
	return ""
}

// limited is the inverse of Limiter.
func limited(device string) (netip.Addr, bool) {
	if len(device) < 2 || device[:2] != "i-" {
		return netip.Addr{}, false
	}
	return AddressOf("s-" + device[2:])
}

// limiterIndex returns the device number that a limiter is asked for: one that wakes nobody (kernel.Listener.Sieve).
func limiterIndex(a netip.Addr) int { return indexesOf(a).host ^ 1<<23 }

// latency bounds in milliseconds how long a packet may wait for its turn.
const latency = 25

// frameHeader is that of Ethernet, which the kernel counts too, in bytes.
const frameHeader = 14

// SmallestBurst returns how many bits a token bucket of a rate in bits a second has to hold on devices with the MTU, in bytes: one frame, or it would
// pass none, and what a millisecond brings, or the rate is not reached.
func SmallestBurst(rate uint64, mtu int) uint64 {
	return 8 * max(uint64(mtu)+frameHeader, (rate/8+999)/1000)
}

// Validate judges limits for devices with the MTU, in bytes. fault.Invalid names what can work.
func (l Limits) Validate(mtu int) error {
	for _, d := range []struct {
		name        string
		rate, burst uint64
	}{{"ingress", l.IngressRate, l.IngressBurst}, {"egress", l.EgressRate, l.EgressBurst}} {
		least := SmallestBurst(d.rate, mtu)
		switch {
		case d.rate == 0 && d.burst == 0:
		case d.rate == 0:
			return fault.Invalidf("%s burst of %d bits without a rate: expected both or none", d.name, d.burst)
		case d.rate < 8 || d.rate > 1<<50:
			return fault.Invalidf("%s rate of %d bit/s: expected 8 to %d", d.name, d.rate, uint64(1)<<50)
		case d.burst < least:
			return fault.Invalidf("%s burst of %d bits is too small for %d bit/s and frames of %d bytes: expected at least %d", d.name, d.burst, d.rate, mtu+frameHeader, least)
		case d.burst/8 > math.MaxUint32:
			return fault.Invalidf("%s burst of %d bits: expected at most %d", d.name, d.burst, uint64(8)*math.MaxUint32)
		}
	}
	return nil
}

// From linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h and linux/tc_act/tc_mirred.h.
const (
	tcaKind, tcaOptions                    = 1, 2
	tcaTBFParms, tcaTBFRate64, tcaTBFBurst = 1, 4, 6
	tcaU32Sel, tcaU32Act                   = 5, 7
	tcaActKind, tcaActOptions              = 1, 2
	tcaMirredParms                         = 2

	parentRoot    = 0xffffffff
	parentClsact  = 0xfffffff1
	parentIngress = 0xfffffff2
	handleBucket  = 0x00010000
	handleClsact  = 0xffff0000

	sizeofTcmsg = 20
	filterPrio  = 100
	etherAll    = 0x0300 // ETH_P_ALL in network order
)

var ne = binary.NativeEndian

// tcmsg is the header of requests about queues and filters.
func tcmsg(index int, handle, parent, info uint32) []byte {
	h := make([]byte, 4, sizeofTcmsg)
	h = ne.AppendUint32(h, uint32(index))
	h = ne.AppendUint32(h, handle)
	h = ne.AppendUint32(h, parent)
	return ne.AppendUint32(h, info)
}

// bucket is a token bucket: bytes a second and bytes.
type bucket struct {
	rate  uint64
	burst uint32
}

func bucketOf(rate, burst uint64) bucket { return bucket{rate / 8, uint32(burst / 8)} }

// add appends the request that puts it on a device or changes the one there.
func (k bucket) add(b *kernel.Batch, index int) {
	b.Add(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, tcmsg(index, handleBucket, parentRoot, 0))
	b.String(tcaKind, "tbf")
	b.Nest(tcaOptions|unix.NLA_F_NESTED, func() {
		parms := make([]byte, 36) // struct tc_tbf_qopt
		parms[1] = 1              // TC_LINKLAYER_ETHERNET
		ne.PutUint32(parms[8:], uint32(min(k.rate, math.MaxUint32)))
		ne.PutUint32(parms[24:], uint32(min(k.rate/1000*latency+uint64(k.burst), math.MaxUint32)))
		b.Attr(tcaTBFParms, parms)
		b.Uint32(tcaTBFBurst, k.burst)
		if k.rate > math.MaxUint32 {
			b.Attr(tcaTBFRate64, ne.AppendUint64(nil, k.rate))
		}
	})
}

// filter appends the request that sends what comes in by a device round by another.
func filter(b *kernel.Batch, index, through int) {
	b.Add(unix.RTM_NEWTFILTER, create, tcmsg(index, 0, parentIngress, filterPrio<<16|etherAll))
	b.String(tcaKind, "u32")
	b.Nest(tcaOptions|unix.NLA_F_NESTED, func() {
		sel := make([]byte, 32) // struct tc_u32_sel and one key that matches everything
		sel[0], sel[2] = 1, 1   // TC_U32_TERMINAL, number of keys
		b.Attr(tcaU32Sel, sel)
		mirred := make([]byte, 28)   // struct tc_mirred
		ne.PutUint32(mirred[8:], 4)  // TC_ACT_STOLEN
		ne.PutUint32(mirred[20:], 1) // TCA_EGRESS_REDIR
		ne.PutUint32(mirred[24:], uint32(through))
		b.Nest(tcaU32Act|unix.NLA_F_NESTED, func() {
			b.Nest(1|unix.NLA_F_NESTED, func() {
				b.String(tcaActKind, "mirred")
				b.Nest(tcaActOptions|unix.NLA_F_NESTED, func() { b.Attr(tcaMirredParms, mirred) })
			})
		})
	})
}

func unfilter(b *kernel.Batch, index int) {
	b.Add(unix.RTM_DELTFILTER, 0, tcmsg(index, 0, parentIngress, filterPrio<<16|etherAll))
}

// limit makes the kernel's queues of the endpoint what its record says, whatever they are. A device of the limiter's name that is of
// another kind is a fault.Conflict.
func (r Record) limit(host *kernel.Conn) error {
	var l Limits
	if r.Limits != nil {
		l = *r.Limits
	}
	veth, ifb, err := observePair(host, r.Address())
	if err != nil {
		return err
	}
	if veth.index == 0 {
		return fault.NotFoundf("device %s of endpoint %v is gone", r.Device, r.Key)
	}
	if ifb.index != 0 && ifb.kind != "ifb" {
		return fault.Conflictf("device %s exists, made by somebody else", ifb.name)
	}
	if l.EgressRate != 0 && ifb.index == 0 {
		if ifb, err = r.makeLimiter(host); err != nil {
			return err
		}
	}
	var b kernel.Batch
	optional := map[int]bool{} // requests about what may be gone
	maybe := func(request func()) {
		optional[b.Len()] = true
		request()
	}
	if l.IngressRate != 0 {
		bucketOf(l.IngressRate, l.IngressBurst).add(&b, veth.index)
	} else {
		maybe(func() { b.Add(unix.RTM_DELQDISC, 0, tcmsg(veth.index, handleBucket, parentRoot, 0)) })
	}
	maybe(func() { unfilter(&b, veth.index) })
	if l.EgressRate != 0 {
		b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(ifb.index, unix.IFF_UP, unix.IFF_UP))
		bucketOf(l.EgressRate, l.EgressBurst).add(&b, ifb.index)
		maybe(func() {
			b.Add(unix.RTM_NEWQDISC, create, tcmsg(veth.index, handleClsact, parentClsact, 0))
			b.String(tcaKind, "clsact")
		})
		filter(&b, veth.index, ifb.index)
	} else if ifb.index != 0 {
		maybe(func() { b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(ifb.index, 0, 0)) })
	}
	refused, err := host.Do(&b)
	for _, e := range refused {
		if err == nil && !optional[e.Index] {
			err = e
		}
	}
	if err != nil {
		return fmt.Errorf("limit endpoint %v: %w", r.Key, err)
	}
	return nil
}

// makeLimiter makes the device that delays what the container sends.
func (r Record) makeLimiter(host *kernel.Conn) (device, error) {
	ifb := device{index: limiterIndex(r.Address()), name: Limiter(r.Address()), kind: "ifb"}
	for range 8 {
		var b kernel.Batch
		b.Add(unix.RTM_NEWLINK, create, kernel.IfInfo(ifb.index, 0, 0))
		b.String(unix.IFLA_IFNAME, ifb.name)
		b.Uint32(unix.IFLA_MTU, uint32(r.MTU))
		b.Nest(unix.IFLA_LINKINFO, func() { b.Attr(unix.IFLA_INFO_KIND, []byte("ifb")) })
		refused, err := host.Do(&b)
		if err == nil && len(refused) == 0 {
			return ifb, disableIPv6(ifb.name)
		}
		if err != nil {
			return device{}, fmt.Errorf("make device %s: %w", ifb.name, err)
		}
		if !errors.Is(refused[0], unix.EEXIST) && !errors.Is(refused[0], unix.EBUSY) {
			return device{}, fmt.Errorf("make device %s: %w", ifb.name, refused[0])
		}
		if there, err := exists(host, ifb.name); err != nil || there {
			return device{}, errors.Join(err, fault.Conflictf("device %s exists, made by somebody else", ifb.name))
		}
		ifb.index = others().host
	}
	return device{}, fault.Unavailablef("make device %s: every device number tried was taken", ifb.name)
}

// observePair returns the host's devices of an address, by one question; zero ones for those that are not there, or have the name only as an alternative one.
func observePair(c *kernel.Conn, a netip.Addr) (veth, ifb device, err error) {
	var b kernel.Batch
	askLink(&b, Device(a))
	askLink(&b, Limiter(a))
	answers, err := c.Query(&b)
	if err != nil {
		return veth, ifb, err
	}
	for i, d := range []*device{&veth, &ifb} {
		switch e := answers[i].Err; {
		case e == nil:
			*d = parseDevice(answers[i].Body)
		case e.Errno != unix.ENODEV:
			return veth, ifb, fmt.Errorf("look for devices of %v: %w", a, e)
		}
	}
	if veth.name != Device(a) {
		veth = device{}
	}
	if ifb.name != Limiter(a) {
		ifb = device{}
	}
	return veth, ifb, nil
}

// SetLimits gives an endpoint other limits, in the host namespace of the calling thread: change gets those it has. They are recorded
// before the kernel has them; when that fails, or the process is killed in between, Check says so, and the same again puts it right. fault.NotFound when there is no such
// endpoint, Invalid when the limits cannot be.
func (d *Dir) SetLimits(ctx context.Context, k Key, change func(Record) (Limits, error)) (Record, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return Record{}, err
	}
	defer host.Close()
	h, r, err := d.rewrite(ctx, k, func(r *Record) error {
		l, err := change(*r)
		if err != nil {
			return err
		}
		if r.Limits = nil; l != (Limits{}) {
			r.Limits = &l
		}
		return l.Validate(r.MTU)
	})
	if err != nil {
		return Record{}, err
	}
	defer h.Close()
	return r, r.limit(host)
}

// rewrite changes k's record and returns it, its file locked. While somebody else works on the endpoint, it waits without the directory's lock: others are
// not to wait for the same.
func (d *Dir) rewrite(ctx context.Context, k Key, change func(*Record) error) (*kernel.File, Record, error) {
	for {
		f, r, busy, err := d.rewriteNow(ctx, k, change)
		if busy.file == "" {
			return f, r, err
		}
		h, err := d.hold(ctx, busy)
		if err != nil {
			return nil, Record{}, err
		}
		if h != nil {
			h.release()
		}
	}
}

// rewriteNow is rewrite, but does not wait for the record: busy is the one that somebody else holds, and else has no file.
func (d *Dir) rewriteNow(ctx context.Context, k Key, change func(*Record) error) (f *kernel.File, r Record, busy entry, err error) {
	g, err := d.lock(ctx)
	if err != nil {
		return nil, Record{}, busy, err
	}
	defer g.unlock()
	list, err := d.sweep()
	if err != nil {
		return nil, Record{}, busy, err
	}
	e, there := list.find(k)
	if !there {
		return nil, Record{}, busy, fault.NotFoundf("no endpoint %v in %s", k, d.path)
	}
	h, free, err := d.tryHold(e)
	switch {
	case err != nil:
		return nil, Record{}, busy, err
	case !free:
		return nil, Record{}, e, nil
	case h == nil:
		return nil, Record{}, busy, fault.NotFoundf("endpoint %v went away", k)
	}
	defer h.release()
	if h.damaged != nil {
		return nil, Record{}, busy, h.damaged
	}
	r = h.record
	if err := change(&r); err != nil {
		return nil, Record{}, busy, err
	}
	if f, err = d.write(e.file, r); err != nil {
		return nil, Record{}, busy, fmt.Errorf("record endpoint %v: %w", k, err)
	}
	return f, r, busy, nil
}

// limitDifferences compares the kernel's queues with the record.
func (r Record) limitDifferences(host *kernel.Conn) ([]Difference, error) {
	if r.Limits == nil {
		return nil, nil
	}
	veth, ifb, err := observePair(host, r.Address())
	if err != nil || veth.index == 0 {
		return nil, err // which is a difference already
	}
	var diffs []Difference
	check := func(what string, index int, rate, burst uint64) error {
		if rate == 0 {
			return nil
		}
		want, have := bucketOf(rate, burst), bucket{}
		if index != 0 {
			var err error
			if have, err = observeBucket(host, index); err != nil {
				return err
			}
		}
		if have.rate != want.rate {
			text := ""
			if have.rate != 0 {
				text = fmt.Sprint(have.rate*8, " bit/s")
			}
			diffs = append(diffs, Difference{what + " limit of " + r.Device, fmt.Sprint(want.rate*8, " bit/s"), text})
		}
		return nil
	}
	err = errors.Join(check("ingress", veth.index, r.Limits.IngressRate, r.Limits.IngressBurst), check("egress", ifb.index, r.Limits.EgressRate, r.Limits.EgressBurst))
	if err != nil || r.Limits.EgressRate == 0 || ifb.index == 0 {
		return diffs, err
	}
	through, err := observeFilter(host, veth.index)
	if !slices.Contains(through, ifb.index) {
		diffs = append(diffs, Difference{"way of " + r.Device + " through its limit", ifb.name, ""})
	}
	return diffs, err
}

// observeBucket returns the token bucket of a device, a zero one when there is none.
func observeBucket(c *kernel.Conn, index int) (bucket, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETQDISC, unix.NLM_F_ECHO, tcmsg(index, 0, parentRoot, 0)) // without it the kernel answers to nobody
	answers, err := c.Query(&b)
	if err != nil || answers[0].Err != nil || len(answers[0].Body) < sizeofTcmsg {
		return bucket{}, err
	}
	var k bucket
	kind := ""
	for t, v := range kernel.Attrs(answers[0].Body[sizeofTcmsg:]) {
		switch t {
		case tcaKind:
			kind = kernel.Text(v)
		case tcaOptions:
			for t, v := range kernel.Attrs(v) {
				switch {
				case t == tcaTBFParms && len(v) >= 36 && k.rate == 0:
					k.rate = uint64(ne.Uint32(v[8:]))
				case t == tcaTBFRate64 && len(v) == 8:
					k.rate = ne.Uint64(v)
				}
			}
		}
	}
	if kind != "tbf" {
		return bucket{}, nil
	}
	return k, nil
}

// observeFilter returns the devices that our filter on a device sends what comes in through.
func observeFilter(c *kernel.Conn, index int) ([]int, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETTFILTER, 0, tcmsg(index, 0, parentIngress, 0))
	var out []int
	err := c.Dump(&b, func() { out = nil }, func(m kernel.Message) error {
		if len(m.Body) < sizeofTcmsg || kernel.Uint32(m.Body[16:])>>16 != filterPrio {
			return nil
		}
		for _, path := range attrsAt(m.Body[sizeofTcmsg:], tcaOptions, tcaU32Act, 1, tcaActOptions, tcaMirredParms) {
			if len(path) >= 28 {
				out = append(out, int(ne.Uint32(path[24:])))
			}
		}
		return nil
	})
	return out, none(err)
}

// attrsAt returns the attributes that a path of types leads to.
func attrsAt(body []byte, path ...uint16) [][]byte {
	if len(path) == 0 {
		return [][]byte{body}
	}
	var out [][]byte
	for t, v := range kernel.Attrs(body) {
		if t == path[0] {
			out = append(out, attrsAt(v, path[1:]...)...)
		}
	}
	return out
}
