package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h.
const (
	ctaStatus, ctaProtoInfo, ctaTimeout, ctaCountersOrig, ctaCountersReply, ctaTimestamp = 3, 4, 7, 9, 10, 20

	ctaIPv6Src, ctaIPv6Dst            = 3, 4
	ctaICMPID, ctaICMPType, ctaICMP   = 4, 5, 6 // CTA_PROTO_ICMP_*
	ctaICMPv6ID, ctaICMPv6T, ctaICMP6 = 7, 8, 9
	ctaPackets, ctaBytes              = 1, 2
	ctaBegun, ctaEnded                = 1, 2
	ctaTCP, ctaTCPState               = 1, 1

	statusAssured = 1 << 2
)

// FlowEnd is a tracked connection that has ended: the kernel has forgotten it. From and Server are as in Flow; of ICMP the port of From is the
// identifier, and that of Server type and code of what began it.
type FlowEnd struct {
	Protocol     uint8 // IPPROTO_*
	From, Server netip.AddrPort
	Mark         uint32
	Sent, Heard  Traffic       // by who began it, and by who answered; zero without nf_conntrack_acct
	Begun, Ended time.Time     // zero without nf_conntrack_timestamp
	Left         time.Duration // that it would still have been remembered for: it did not end by itself
	Assured      bool          // packets went both ways for a while
	TCPState     uint8         // last, in the kernel's numbers
}

// Traffic is what one side has sent.
type Traffic struct{ Packets, Bytes uint64 }

// FlowEnds hears of the connections that end. It never holds the kernel up: what it does not read in time is lost and counted. Read is not to be
// called twice at a time; Close and Lost may be called at any time.
type FlowEnds struct{ e *events }

// OpenFlowEnds listens in ns, nil for the calling thread's namespace. It hears the ends of connections that begin from now on.
func OpenFlowEnds(ns *NS) (*FlowEnds, error) {
	fd, err := socket(ns, unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, err
	}
	e, err := newEvents(fd)
	if err != nil {
		return nil, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_CONNTRACK_DESTROY)
	if err != nil {
		e.Close()
		return nil, fmt.Errorf("listen to ends of connections: %w", err)
	}
	return &FlowEnds{e}, nil
}

// Close ends a Read with os.ErrClosed.
func (f *FlowEnds) Close() error { return f.e.Close() }

// Lost returns how many ends were not heard of for lack of room.
func (f *FlowEnds) Lost() uint64 { return uint64(f.e.dropped()) }

// Read waits for ends and calls each for those that are there.
func (f *FlowEnds) Read(each func(FlowEnd)) error {
	return f.e.read(func(m Message) {
		if m.Type != ctDelete {
			return
		}
		if end, ok := parseFlowEnd(m.Body); ok {
			each(end)
		}
	})
}

// LiveFlows calls each for every connection that is tracked in ns, nil for the calling thread's namespace, as if it had ended. What was there before
// and after the call is not missed.
func LiveFlows(ns *NS, each func(FlowEnd)) error {
	c, err := DialNetfilter(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b Batch
	b.Add(ctGet, 0, NFGen(unix.AF_UNSPEC))
	if err := c.Dump(&b, func() {}, func(m Message) error {
		if e, ok := parseFlowEnd(m.Body); ok {
			each(e)
		}
		return nil
	}); err != nil {
		return fmt.Errorf("list connections: %w", err)
	}
	return nil
}

// parseFlowEnd reads a notification. It is not ok for one that does not name both ends.
func parseFlowEnd(body []byte) (e FlowEnd, ok bool) {
	for t, v := range Attrs(body[min(len(ctHeader), len(body)):]) {
		switch t {
		case ctaTupleOrig:
			var id, what uint16
			if e.From, e.Protocol, id, what = parseEnd(v); isICMP(e.Protocol) {
				e.From, e.Server = netip.AddrPortFrom(e.From.Addr(), id), netip.AddrPortFrom(e.Server.Addr(), what)
			}
		case ctaTupleReply:
			s, proto, _, _ := parseEnd(v)
			if isICMP(proto) {
				s = netip.AddrPortFrom(s.Addr(), e.Server.Port())
			}
			e.Server = s
		case ctaMark:
			e.Mark = beUint32(v)
		case ctaStatus:
			e.Assured = beUint32(v)&statusAssured != 0
		case ctaTimeout:
			e.Left = time.Duration(beUint32(v)) * time.Second
		case ctaCountersOrig:
			e.Sent = parseTraffic(v)
		case ctaCountersReply:
			e.Heard = parseTraffic(v)
		case ctaTimestamp:
			e.Begun, e.Ended = parseTimes(v)
		case ctaProtoInfo:
			e.TCPState = parseTCPState(v)
		}
	}
	return e, e.From.Addr().IsValid() && e.Server.Addr().IsValid()
}

func isICMP(proto uint8) bool { return proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6 }

// parseEnd reads the source of a tuple, and of ICMP what stands for ports.
func parseEnd(b []byte) (src netip.AddrPort, proto uint8, id, what uint16) {
	var from netip.Addr
	var port uint16
	for t, v := range Attrs(b) {
		switch t {
		case ctaTupleIP:
			for t, v := range Attrs(v) {
				if a, good := netip.AddrFromSlice(v); good && (t == ctaIPv4Src && a.Is4() || t == ctaIPv6Src && a.Is6()) {
					from = a
				}
			}
		case ctaTupleProto:
			for t, v := range Attrs(v) {
				switch {
				case t == ctaProtoNum && len(v) == 1:
					proto = v[0]
				case t == ctaSrcPort && len(v) == 2:
					port = binary.BigEndian.Uint16(v)
				case (t == ctaICMPID || t == ctaICMPv6ID) && len(v) == 2:
					id = binary.BigEndian.Uint16(v)
				case (t == ctaICMPType || t == ctaICMPv6T) && len(v) == 1:
					what |= uint16(v[0]) << 8
				case (t == ctaICMP || t == ctaICMP6) && len(v) == 1:
					what |= uint16(v[0])
				}
			}
		}
	}
	return netip.AddrPortFrom(from, port), proto, id, what
}

func parseTraffic(b []byte) (n Traffic) {
	for t, v := range Attrs(b) {
		switch t {
		case ctaPackets:
			n.Packets = beUint64(v)
		case ctaBytes:
			n.Bytes = beUint64(v)
		}
	}
	return n
}

func parseTimes(b []byte) (begun, ended time.Time) {
	for t, v := range Attrs(b) {
		ns := beUint64(v)
		if ns == 0 || ns > 1<<62 {
			continue
		}
		switch t {
		case ctaBegun:
			begun = time.Unix(0, int64(ns))
		case ctaEnded:
			ended = time.Unix(0, int64(ns))
		}
	}
	return begun, ended
}

func parseTCPState(b []byte) (state uint8) {
	for t, v := range Attrs(b) {
		if t != ctaTCP {
			continue
		}
		for t, v := range Attrs(v) {
			if t == ctaTCPState && len(v) == 1 {
				state = v[0]
			}
		}
	}
	return state
}

// beUint32 reads an attribute in network order, 0 if it is of another length; so does beUint64.
func beUint32(v []byte) uint32 {
	if len(v) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

func beUint64(v []byte) uint64 {
	if len(v) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// FlowTimeouts is how long the kernel remembers a connection after its last packet.
type FlowTimeouts struct {
	TCP                  [10]time.Duration // by state
	UDP, UDPStream, ICMP time.Duration
	Other                time.Duration
}

// ReadFlowTimeouts reads them of the calling thread's namespace. What cannot be read is 0.
func ReadFlowTimeouts() (t FlowTimeouts) {
	read := func(name string) time.Duration {
		s, err := Sysctl("net/netfilter/nf_conntrack_" + name)
		if err != nil {
			return 0
		}
		n, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			return 0
		}
		return time.Duration(n) * time.Second
	}
	for state, name := range []string{1: "syn_sent", 2: "syn_recv", 3: "established", 4: "fin_wait", 5: "close_wait", 6: "last_ack", 7: "time_wait", 8: "close", 9: "syn_sent"} {
		if name != "" {
			t.TCP[state] = read("tcp_timeout_" + name)
		}
	}
	t.UDP, t.UDPStream, t.ICMP, t.Other = read("udp_timeout"), read("udp_timeout_stream"), read("icmp_timeout"), read("generic_timeout")
	return t
}

// LastPacket returns when the connection's last packet passed: it was remembered for a while after that. Zero if that is not known.
func (t FlowTimeouts) LastPacket(e FlowEnd) time.Time {
	if e.Ended.IsZero() {
		return time.Time{}
	}
	idle := t.Other
	switch {
	case e.Protocol == unix.IPPROTO_TCP:
		idle = t.TCP[min(int(e.TCPState), len(t.TCP)-1)]
	case e.Protocol == unix.IPPROTO_UDP && e.Assured:
		idle = t.UDPStream
	case e.Protocol == unix.IPPROTO_UDP:
		idle = t.UDP
	case isICMP(e.Protocol):
		idle = t.ICMP
	}
	last := e.Ended.Add(-max(idle-e.Left, 0))
	if last.Before(e.Begun) {
		return e.Begun
	}
	return last
}
