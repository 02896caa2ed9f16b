package dnsserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"
)

// receiveBuffer is the room for questions that nobody has read yet, in bytes of kernel memory.
const receiveBuffer = 4 << 20

// Socket is one address with both protocols.
type Socket struct {
	Packets *net.UDPConn
	Streams *net.TCPListener
}

// Address returns where the socket listens.
func (s Socket) Address() netip.AddrPort {
	a := s.Packets.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// Close closes both.
func (s Socket) Close() error { return errors.Join(s.Packets.Close(), s.Streams.Close()) }

// Listen opens sockets in the network namespace of the calling thread. An address that the host does not have yet is taken all the same
// (IP_FREEBIND): it is answered on as soon as it is there. What was opened before an error is returned with it.
func Listen(ctx context.Context, addresses []netip.AddrPort) ([]Socket, error) {
	var open []Socket
	for _, a := range addresses {
		s, err := listen(ctx, a)
		if err != nil {
			return open, err
		}
		open = append(open, s)
	}
	return open, nil
}

func listen(ctx context.Context, a netip.AddrPort) (Socket, error) {
	family := "6" // of which an unspecified address does not take the other's packets
	if a.Addr().Is4() {
		family = "4"
	}
	for tries := 1; ; tries++ {
		lc := net.ListenConfig{Control: prepare, KeepAlive: -1} // idle connections are closed before a probe would be sent
		lc.SetMultipathTCP(false)
		streams, err := lc.Listen(ctx, "tcp"+family, a.String())
		if err != nil {
			return Socket{}, fmt.Errorf("listen for tcp: %w", err)
		}
		port := streams.Addr().(*net.TCPAddr).AddrPort().Port()
		packets, err := (&net.ListenConfig{Control: prepare}).ListenPacket(ctx, "udp"+family, netip.AddrPortFrom(a.Addr(), port).String())
		if err == nil {
			return Socket{packets.(*net.UDPConn), streams.(*net.TCPListener)}, nil
		}
		streams.Close()
		if a.Port() != 0 || tries == 20 || !errors.Is(err, syscall.EADDRINUSE) { // a port that is free for tcp may be taken for udp
			return Socket{}, fmt.Errorf("listen for udp: %w", err)
		}
	}
}

// prepare sets what must be set before a socket is bound. More room than the system's limit needs CAP_NET_ADMIN; without it the limit
// must do.
func prepare(network, _ string, c syscall.RawConn) (err error) {
	failed := c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_IP, syscall.IP_FREEBIND, 1) // of IPv6 sockets too
		if network == "udp4" || network == "udp6" {
			if syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, receiveBuffer) != nil {
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, receiveBuffer)
			}
		}
	})
	return errors.Join(failed, err)
}

// ours reports whether the host has the address.
func ours(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, i := range all {
		if n, ok := i.(*net.IPNet); ok && n.IP.Equal(a.AsSlice()) {
			return true
		}
	}
	return false
}

// readers is how many goroutines read a udp socket. More than one: while it sends what it answered, others read on.
func readers() int { return min(runtime.GOMAXPROCS(0), 4) }
