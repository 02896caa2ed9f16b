package dnsserver

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// batch is how many questions are read, and answers sent, with one system call at most.
const batch = 32

// oobSize is room for the control message that says which address was asked, in bytes.
const oobSize = 64

// packetConn is ipv4.PacketConn or ipv6.PacketConn; their Message is the same type.
type packetConn interface {
	ReadBatch(ms []ipv4.Message, flags int) (int, error)
	WriteBatch(ms []ipv4.Message, flags int) (int, error)
}

// packets is a udp socket.
type packets struct {
	packetConn
	v4, wildcard bool
}

func newPackets(c *net.UDPConn) (p packets, err error) {
	a := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
	p.v4, p.wildcard = a.Is4() || a.Is4In6(), a.IsUnspecified()
	if p.v4 {
		pc := ipv4.NewPacketConn(c)
		p.packetConn = pc
		if p.wildcard {
			err = pc.SetControlMessage(ipv4.FlagDst, true)
		}
		return p, err
	}
	pc := ipv6.NewPacketConn(c)
	p.packetConn = pc
	if p.wildcard {
		err = pc.SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
	}
	return p, err
}

// from returns the control message that makes an answer leave from the address that was asked, nil where it does anyway.
func (p packets) from(oob []byte) []byte {
	switch {
	case !p.wildcard:
	case p.v4:
		var cm ipv4.ControlMessage
		if cm.Parse(oob) == nil && cm.Dst.To4() != nil && !cm.Dst.IsMulticast() {
			return (&ipv4.ControlMessage{Src: cm.Dst}).Marshal()
		}
	default:
		var cm ipv6.ControlMessage
		if cm.Parse(oob) == nil && cm.Dst != nil && !cm.Dst.IsMulticast() {
			out := ipv6.ControlMessage{Src: cm.Dst}
			if cm.Dst.IsLinkLocalUnicast() {
				out.IfIndex = cm.IfIndex
			}
			return out.Marshal()
		}
	}
	return nil
}

// send sends what it can without waiting, and returns how many answers it could not: a client that cannot be reached may keep the
// socket's memory in use, and must not keep others from their answers.
func (p packets) send(out []ipv4.Message) (unsent int) {
	for len(out) > 0 {
		n, err := p.WriteBatch(out, syscall.MSG_DONTWAIT)
		if err != nil {
			n = max(n, 0) + 1 // what failed is the first that was not sent
			unsent++
		}
		out = out[min(max(n, 1), len(out)):]
	}
	return unsent
}

// serveUDP answers on a socket until ctx has ended and it is closed. Several may do so at the same time. What waits for resolvers goes on
// in goroutines of wg.
func (s *Server) serveUDP(ctx context.Context, c *net.UDPConn, wg *sync.WaitGroup) error {
	p, err := newPackets(c)
	if err != nil {
		return err
	}
	in, out := messages(maxQuery, p.wildcard), messages(0, false)
	workers := make([]worker, batch) // each has an answer in its memory until all are sent
	for i := range workers {
		workers[i] = worker{s: s, buf: make([]byte, 0, s.cfg.UDPSize)}
	}
	for {
		n, err := p.ReadBatch(in, 0)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		k := 0
		for i := range in[:n] {
			m := &in[i]
			if m.Flags&syscall.MSG_TRUNC != 0 {
				s.counts.dropped.Add(1)
				continue
			}
			w := &workers[k]
			resp, v := w.answer(m.Buffers[0][:m.N], false)
			if v == drop {
				continue
			}
			oob := p.from(m.OOB[:m.NN])
			if v == onward {
				if s.later(ctx, w, wg, p, m.Addr, oob) {
					continue
				}
				resp = w.fail(servFail, false)
			}
			out[k].Buffers[0], out[k].Addr, out[k].OOB = resp, m.Addr, oob
			k++
		}
		s.counts.unsent.Add(uint64(p.send(out[:k])))
	}
}

// later has a resolver asked and its answer sent, unless too much is under way.
func (s *Server) later(ctx context.Context, w *worker, wg *sync.WaitGroup, p packets, to net.Addr, oob []byte) bool {
	return s.onward.begin(ctx, wg, w.q, w.limit(false), false, addressFrom(to), func(resp []byte) {
		s.counts.unsent.Add(uint64(p.send([]ipv4.Message{{Buffers: [][]byte{resp}, Addr: to, OOB: oob}})))
	})
}

// messages are a batch with room for size bytes each.
func messages(size int, wildcard bool) []ipv4.Message {
	ms := make([]ipv4.Message, batch)
	for i := range ms {
		ms[i].Buffers = [][]byte{make([]byte, size)}
		if wildcard {
			ms[i].OOB = make([]byte, oobSize)
		}
	}
	return ms
}

// addressFrom returns the address of a client.
func addressFrom(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort().Addr()
	case *net.UDPAddr:
		return a.AddrPort().Addr()
	}
	return netip.Addr{}
}
