package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"code.cloudfoundry.org/silk/dns/dnsserver"
)

// firstInherited is the first descriptor that a supervisor hands over (sd_listen_fds(3)).
const firstInherited = 3

// inherited returns the sockets that a supervisor holds for us, and takes their addresses from listen: what is asked while no process of ours runs waits in them.
// A socket for one protocol alone, or for an address that is not in listen, is an error.
func inherited(listen []netip.AddrPort) (sockets []dnsserver.Socket, rest []netip.AddrPort, err error) {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, listen, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 1024 {
		return nil, nil, fmt.Errorf("LISTEN_FDS is %.20q: expected how many sockets are handed over", os.Getenv("LISTEN_FDS"))
	}
	at := map[netip.AddrPort]*dnsserver.Socket{}
	var errs []error
	for fd := firstInherited; fd < firstInherited+n; fd++ {
		errs = append(errs, inherit(fd, at))
	}
	for a, s := range at {
		if s.Packets == nil || s.Streams == nil {
			errs = append(errs, fmt.Errorf("socket for %v: expected one for udp and one for tcp", a))
			continue
		}
		i := slices.Index(listen, a)
		if i < 0 {
			errs = append(errs, fmt.Errorf("socket for %v: expected an address of listen_dns", a))
			continue
		}
		sockets, listen = append(sockets, *s), slices.Delete(slices.Clone(listen), i, i+1)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, fmt.Errorf("take over sockets: %w", err)
	}
	return sockets, listen, nil
}

// inherit adds the socket with a descriptor to those of its address.
func inherit(fd int, at map[netip.AddrPort]*dnsserver.Socket) error {
	f := os.NewFile(uintptr(fd), "inherited")
	defer f.Close()
	of := func(a net.Addr) (*dnsserver.Socket, error) {
		addr, err := netip.ParseAddrPort(a.String())
		if err != nil {
			return nil, fmt.Errorf("descriptor %d is of %v: expected an address and a port", fd, a)
		}
		addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
		if at[addr] == nil {
			at[addr] = &dnsserver.Socket{}
		}
		return at[addr], nil
	}
	if ln, err := net.FileListener(f); err == nil {
		s, err := of(ln.Addr())
		tcp, ok := ln.(*net.TCPListener)
		if err != nil || !ok {
			ln.Close()
			return errors.Join(err, fmt.Errorf("descriptor %d: expected tcp or udp", fd))
		}
		s.Streams = tcp
		return nil
	}
	pc, err := net.FilePacketConn(f)
	if err != nil {
		return fmt.Errorf("descriptor %d: expected a socket: %w", fd, err)
	}
	s, err := of(pc.LocalAddr())
	udp, ok := pc.(*net.UDPConn)
	if err != nil || !ok {
		pc.Close()
		return errors.Join(err, fmt.Errorf("descriptor %d: expected tcp or udp", fd))
	}
	s.Packets = udp
	return nil
}
