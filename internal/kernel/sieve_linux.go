package kernel

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"
)

// TransientIndex is where the device numbers begin that programs choose for devices which come and go all the time, as containers do;
// they end before twice that. The kernel itself numbers devices from 1 up.
const TransientIndex = 1 << 24

// IsTransient reports whether a device number is one of those.
func IsTransient(index int) bool { return index>>24 == 1 }

// Sieve makes the kernel keep from a listener of NETLINK_ROUTE what is about transient devices: their links, neighbours and addresses of
// scope link, and routes by one of them that do not have the given protocol. Nobody is woken for it then. Notifications that are waiting
// stay. Unsieve takes it back.
func (l *Listener) Sieve(protocol uint8) error {
	program := sieve(protocol)
	return l.control(func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
}

// Unsieve lets a listener hear everything again.
func (l *Listener) Unsieve() error {
	return l.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) })
}

func (l *Listener) control(fn func(fd int) error) error {
	conn, err := l.f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = fn(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// Where things are in a notification, which is one message (linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h). The
// number of the device is at the same place in all but routes.
const (
	atType     = 4
	atScope    = unix.NLMSG_HDRLEN + 3 // of an address
	atIndex    = unix.NLMSG_HDRLEN + 4
	atProtocol = unix.NLMSG_HDRLEN + 5                // of a route
	atAttrs    = unix.NLMSG_HDRLEN + unix.SizeofRtMsg // of a route
	inAttr     = unix.SizeofNlAttr
)

// sieve returns the program, in the old instructions that a socket without privilege may have too (linux/filter.h, networking/filter.rst):
// it returns how much of a notification is to be kept.
func sieve(protocol uint8) []unix.SockFilter {
	const address, route, index, compare, none, all = 9, 11, 20, 21, 22, 23 // instructions to jump to
	var p []unix.SockFilter
	do := func(code uint16, k uint32) { p = append(p, unix.SockFilter{Code: code, K: k}) }
	ifEqual := func(k uint32, then, or int) {
		at := len(p) + 1
		p = append(p, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(then - at), Jf: uint8(or - at), K: k})
	}
	const load8, load16, load32 = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	do(load16, atType) // 0
	ifEqual(loaded(unix.RTM_NEWLINK), index, 2)
	ifEqual(loaded(unix.RTM_DELLINK), index, 3)
	ifEqual(loaded(unix.RTM_NEWNEIGH), index, 4)
	ifEqual(loaded(unix.RTM_DELNEIGH), index, 5)
	ifEqual(loaded(unix.RTM_NEWADDR), address, 6)
	ifEqual(loaded(unix.RTM_DELADDR), address, 7)
	ifEqual(loaded(unix.RTM_NEWROUTE), route, 8)
	ifEqual(loaded(unix.RTM_DELROUTE), route, all)
	do(load8, atScope) // 9: address
	ifEqual(unix.RT_SCOPE_LINK, index, all)
	do(load8, atProtocol) // 11: route
	ifEqual(uint32(protocol), all, 13)
	do(unix.BPF_LD|unix.BPF_IMM, atAttrs)
	do(unix.BPF_LDX|unix.BPF_IMM, unix.RTA_OIF)
	do(load32, skfNLAttr)
	ifEqual(0, all, 17) // it has several next hops, or none
	do(unix.BPF_MISC|unix.BPF_TAX, 0)
	do(unix.BPF_LD|unix.BPF_B|unix.BPF_IND, inAttr+highByte())
	do(unix.BPF_JMP|unix.BPF_JA, compare-index)
	do(load8, atIndex+highByte()) // 20: index
	ifEqual(TransientIndex>>24, none, all)
	do(unix.BPF_RET|unix.BPF_K, 0)
	do(unix.BPF_RET|unix.BPF_K, 1<<31)
	return p
}

// highByte returns where in a number of 32 bits its highest byte is.
func highByte() uint32 {
	if littleEndian {
		return 3
	}
	return 0
}

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// skfNLAttr is the address from which a filter loads where in the message the attribute X is, looking from A on; 0 for nowhere.
const skfNLAttr = 0xfffff000 + 12 // SKF_AD_OFF + SKF_AD_NLATTR

// loaded returns what a filter that loads a number of 16 bits, as of network order, gets for one in the host's.
func loaded(v uint16) uint32 {
	if littleEndian {
		v = bits.ReverseBytes16(v)
	}
	return uint32(v)
}
