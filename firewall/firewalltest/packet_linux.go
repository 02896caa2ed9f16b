package firewalltest

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

var ethIP = binary.NativeEndian.Uint16([]byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff}) // in network order

// open opens the socket that speaks for all containers of the host.
func (h *Host) open(n int) {
	t := h.World.t
	err := h.Box.Do(func() (err error) {
		for i := 1; i <= n; i++ {
			link, err := net.InterfaceByName(fmt.Sprintf("c%d", i))
			if err != nil {
				return err
			}
			h.ends[h.Device(i)], h.at[link.Index] = link.Index, h.Device(i)
		}
		h.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(ethIP))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(h.fd) })
	unix.SetsockoptInt(h.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
}

// TCP flags.
const (
	syn, rst, ack = 2, 4, 16
)

// Send makes a container send a packet: of TCP the first of a connection, or with answer the second.
func (h *Host) Send(p Packet, answer bool) error {
	flags := byte(syn)
	if answer {
		flags |= ack
	}
	return h.send(p, flags)
}

func (h *Host) send(p Packet, flags byte) error { return h.SendIP(p.Device, datagram(p, flags)) }

// SendIP makes the container behind a device send an IPv4 packet as it is, header and all.
func (h *Host) SendIP(device string, packet []byte) error {
	index, ok := h.ends[device]
	if !ok {
		return fmt.Errorf("no device %s", device)
	}
	a := h.Address(0).As4()
	var n int
	fmt.Sscanf(device[len(device)-3:], "%d", &n)
	frame := []byte{0xaa, 0xaa, a[0], a[1], a[2], byte(n), 0xee, 0xee, a[0], a[1], a[2], byte(n), 8, 0}
	frame = append(frame, packet...)
	return unix.Sendto(h.fd, frame, 0, &unix.SockaddrLinklayer{Protocol: ethIP, Ifindex: index})
}

// IPv4 returns an IPv4 packet (RFC 791) of a protocol around its content.
func IPv4(from, to netip.Addr, protocol byte, content []byte) []byte {
	src, dst, n := from.As4(), to.As4(), 20+len(content)
	ip := []byte{0x45, 0, byte(n >> 8), byte(n), 0, 0, 0x40, 0, 64, protocol, 0, 0}
	ip = append(append(ip, src[:]...), dst[:]...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, content...)
}

// Complaint returns an ICMP error (RFC 792) from one address to another that says that about could not be delivered.
func Complaint(from, to netip.Addr, typ, code byte, about Packet) []byte {
	l4 := append([]byte{typ, code, 0, 0, 0, 0, 2, 0x40}, datagram(about, ack)[:28]...)
	binary.BigEndian.PutUint16(l4[2:], checksum(l4))
	return IPv4(from, to, unix.IPPROTO_ICMP, l4)
}

// datagram is an IPv4 packet (RFC 791) with whatever its protocol asks for.
func datagram(p Packet, flags byte) []byte {
	var l4 []byte
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, p.SourcePort), p.Port)
	src, dst := p.Source.As4(), p.Destination.As4()
	switch p.Protocol {
	case policy.TCP:
		l4 = append(ports, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
		if flags&ack != 0 {
			l4[11] = 2 // what the first one said, and 1
		}
		pseudo := append(append(append([]byte(nil), src[:]...), dst[:]...), 0, byte(p.Protocol), 0, byte(len(l4)))
		binary.BigEndian.PutUint16(l4[16:], checksum(append(pseudo, l4...)))
	case policy.UDP:
		l4 = append(ports, 0, 12, 0, 0, 's', 'i', 'l', 'k')
	default:
		l4 = append([]byte{8, 0, 0, 0}, ports...) // an echo request, if it is ICMP
		binary.BigEndian.PutUint16(l4[2:], checksum(l4))
	}
	return IPv4(p.Source, p.Destination, byte(p.Protocol), l4)
}

// Checksum puts the right checksum into the header of an IPv4 packet, where it is zero.
func Checksum(packet []byte) {
	binary.BigEndian.PutUint16(packet[10:], checksum(packet[:int(packet[0]&15)*4]))
}

// checksum is that of RFC 1071 over an even number of bytes.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parse is the inverse of datagram. It is not ok for what an engine answers: resets and ICMP errors.
func parse(b []byte) (p Packet, ok bool) {
	if len(b) < 28 || b[0] != 0x45 {
		return Packet{}, false
	}
	l4 := b[20:]
	p = Packet{Source: netip.AddrFrom4([4]byte(b[12:16])), Destination: netip.AddrFrom4([4]byte(b[16:20])), Protocol: policy.Protocol(b[9])}
	switch p.Protocol {
	case policy.TCP, policy.UDP:
		p.SourcePort, p.Port = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		return p, p.Protocol == policy.UDP || len(l4) >= 20 && l4[13]&rst == 0
	}
	p.SourcePort, p.Port = binary.BigEndian.Uint16(l4[4:]), binary.BigEndian.Uint16(l4[6:])
	return p, l4[0] == 8
}

// Hear calls each for every packet that has arrived at a container of the host, with the device in front of it.
func (h *Host) Hear(each func(Packet)) error {
	return h.HearIP(func(device string, b []byte) {
		if p, ok := parse(b); ok {
			p.Device = device
			each(p)
		}
	})
}

// HearIP calls each for every IPv4 packet that has arrived at a container of the host, with the device in front of it. The packet is valid until
// each returns.
func (h *Host) HearIP(each func(device string, packet []byte)) error {
	var buf [2048]byte
	for {
		n, from, err := unix.Recvfrom(h.fd, buf[:], 0)
		switch {
		case err == unix.EAGAIN:
			return nil
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < 14 {
			continue
		}
		each(h.at[ll.Ifindex], buf[14:n])
	}
}

// wait waits until the host's socket has something to read, until the deadline.
func (h *Host) wait(deadline time.Time) bool {
	left := time.Until(deadline)
	if left <= 0 {
		return false
	}
	n, _ := unix.Poll([]unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}}, int(left/time.Millisecond)+1)
	return n > 0
}

// Forget makes the host's kernel forget all connections.
func (h *Host) Forget() error {
	return h.NS.Do(func() error {
		c, err := kernel.OpenConntrack()
		if err != nil || c == nil {
			return err
		}
		defer c.Close()
		return c.FlushAll(func(netip.Addr) bool { return true })
	})
}
