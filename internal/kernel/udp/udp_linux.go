// Package udp reads and answers datagrams many at a time: one system call for all that wait, and no memory of the heap for any of them.
// Package net, and golang.org/x/net over it, make an address of each datagram that comes, which at 50,000 a second is most of what the
// garbage collector of a name server has to do.
package udp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// message is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type message struct {
	unix.Msghdr
	size uint32 // of the datagram, in bytes
}

// peer is who sent a datagram and which of our addresses he sent it to, as the kernel says it and as it is told.
type peer struct {
	name       [unix.SizeofSockaddrInet6]byte
	nameLen    uint32
	control    [64]byte // one control message, aligned by its place in an array of these
	controlLen int
}

// Batch is room for the datagrams of a socket that are read and answered together. One goroutine at a time may use it; several Batches may
// have the same socket.
type Batch struct {
	socket      syscall.RawConn
	asked       bool // the kernel says which address a datagram was sent to
	in, out     []message
	iovs, outIO []unix.Iovec
	peers       []peer
	queued      int // in out

	// read and write are for the socket's RawConn, which calls them with its descriptor; made once, since a closure is made on the heap.
	read, write func(fd uintptr) bool
	pending     []message // what write has to send
	n           int       // what they did
	err         error
}

// New makes room for n datagrams of at most size bytes each, of c, a socket that is not connected. The answers of one that is bound to no
// address leave from the one that was asked.
func New(c *net.UDPConn, n, size int) (*Batch, error) {
	socket, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	b := &Batch{socket: socket, in: make([]message, n), out: make([]message, n), iovs: make([]unix.Iovec, n), outIO: make([]unix.Iovec, n), peers: make([]peer, n)}
	if local := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(); local.IsUnspecified() {
		if err := tellAddress(socket, local.Is4()); err != nil {
			return nil, fmt.Errorf("learn which address is asked: %w", err)
		}
		b.asked = true
	}
	space := make([]byte, n*size)
	for i := range n {
		b.iovs[i].Base = &space[i*size]
		b.iovs[i].SetLen(size)
		m, p := &b.in[i], &b.peers[i]
		m.Name, m.Iov = &p.name[0], &b.iovs[i]
		m.SetIovlen(1)
	}
	b.read, b.write = b.readFrom, b.writeTo
	return b, nil
}

// tellAddress has the kernel say which address datagrams were sent to.
func tellAddress(socket syscall.RawConn, v4 bool) error {
	level, option := unix.SOL_IPV6, unix.IPV6_RECVPKTINFO
	if v4 {
		level, option = unix.SOL_IP, unix.IP_PKTINFO
	}
	var failed error
	err := socket.Control(func(fd uintptr) {
		failed = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, option, 1))
	})
	if err != nil {
		return err
	}
	return failed
}

// Read waits for a datagram, reads all that are there and for which there is room, and returns how many. Those of the Read before, and
// answers that were not sent, are forgotten. When the socket is closed the error is net.ErrClosed.
func (b *Batch) Read() (int, error) {
	b.queued = 0
	for i := range b.in {
		m, p := &b.in[i], &b.peers[i]
		m.Namelen = uint32(len(p.name))
		if b.asked {
			m.Control = &p.control[0]
			m.SetControllen(len(p.control))
		}
	}
	if err := b.socket.Read(b.read); err != nil {
		return 0, err
	}
	if b.err != nil {
		return 0, b.err
	}
	for i := range b.n {
		b.peers[i].note(&b.in[i])
	}
	return b.n, nil
}

// readFrom reports whether there was a datagram or an error.
func (b *Batch) readFrom(fd uintptr) bool {
	n, errno := call(unix.SYS_RECVMMSG, fd, b.in)
	if errno == unix.EAGAIN {
		return false
	}
	b.n, b.err = n, failure("recvmmsg", errno)
	return true
}

// call makes one of the two system calls. It does not wait, so the runtime is not told of it: a runtime that is told lets another thread go on
// after 20 us, and on a busy processor the two then wait for each other's time slices, 3 ms each.
func call(trap, fd uintptr, ms []message) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(ms))), uintptr(len(ms)), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// failure is os.NewSyscallError for what Syscall6 returns.
func failure(name string, errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return os.NewSyscallError(name, errno)
}

// Data returns the i-th datagram that was read, and whether it had room. It is valid until the next Read.
func (b *Batch) Data(i int) (data []byte, whole bool) {
	m := &b.in[i]
	return unsafe.Slice(m.Iov.Base, m.size), m.Flags&unix.MSG_TRUNC == 0
}

// From returns the address that the i-th datagram came from.
func (b *Batch) From(i int) netip.Addr { return b.peers[i].address() }

// Answer has the i-th datagram answered by the next Send. data must not change until then. At most as many answers may wait as there is
// room for datagrams.
func (b *Batch) Answer(i int, data []byte) {
	m, io := &b.out[b.queued], &b.outIO[b.queued]
	b.queued++
	b.peers[i].fill(m, io, data)
}

// Send sends the answers that wait, as far as it need not wait for room, and returns how many it could not send: a peer that cannot be
// reached may keep the socket's memory in use, and must not keep others from their answers.
func (b *Batch) Send() (unsent int) {
	b.pending = b.out[:b.queued]
	for len(b.pending) > 0 {
		if b.socket.Write(b.write) != nil {
			unsent += len(b.pending) // it is closed
			break
		}
		if b.err != nil {
			b.n = 1 // what failed is the first that was not sent
			unsent++
		}
		b.pending = b.pending[b.n:]
	}
	b.queued = 0
	return unsent
}

// writeTo never has to be called again.
func (b *Batch) writeTo(fd uintptr) bool {
	n, errno := call(unix.SYS_SENDMMSG, fd, b.pending)
	b.n, b.err = n, failure("sendmmsg", errno)
	return true
}

// Later returns what sends an answer to the i-th datagram whenever it is there, without waiting, and may be kept. It may be called by any
// goroutine.
func (b *Batch) Later(i int) func(data []byte) error {
	p, socket := b.peers[i], b.socket
	return func(data []byte) error {
		var ms [1]message
		var io unix.Iovec
		p.fill(&ms[0], &io, data)
		var failed error
		err := socket.Write(func(fd uintptr) bool {
			_, errno := call(unix.SYS_SENDMMSG, fd, ms[:])
			failed = failure("sendmmsg", errno)
			return true
		})
		if err != nil {
			return err
		}
		return failed
	}
}

// note keeps what the kernel says of a datagram.
func (p *peer) note(m *message) {
	p.nameLen, p.controlLen = m.Namelen, 0
	if n := int(m.Controllen); n >= unix.SizeofCmsghdr && m.Control != nil {
		p.controlLen = back(p.control[:n])
	}
}

// back turns the control message that says where a datagram was sent to into one that says where its answer is to come from, and returns
// its size; 0 is for none.
func back(b []byte) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	size := unix.CmsgSpace(int(h.Len) - unix.CmsgLen(0))
	if int(h.Len) < unix.CmsgLen(0) || size > len(b) {
		return 0
	}
	data := b[unix.CmsgLen(0):h.Len]
	switch {
	case h.Level == unix.SOL_IP && h.Type == unix.IP_PKTINFO && len(data) == unix.SizeofInet4Pktinfo:
		// The kernel gives the address to answer from in the field from which it takes it. Its route is to be found, not the device's.
		(*unix.Inet4Pktinfo)(unsafe.Pointer(&data[0])).Ifindex = 0
		return size
	case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) == unix.SizeofInet6Pktinfo:
		i := (*unix.Inet6Pktinfo)(unsafe.Pointer(&data[0]))
		a := netip.AddrFrom16(i.Addr)
		if a.IsMulticast() {
			return 0
		}
		if !a.IsLinkLocalUnicast() {
			i.Ifindex = 0
		}
		return size
	}
	return 0
}

// address reads a struct sockaddr_in or sockaddr_in6.
func (p *peer) address() netip.Addr {
	switch binary.NativeEndian.Uint16(p.name[:]) {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(p.name[4:]))
	case unix.AF_INET6:
		return netip.AddrFrom16([16]byte(p.name[8:]))
	}
	return netip.Addr{}
}

// fill makes m a datagram to the peer.
func (p *peer) fill(m *message, io *unix.Iovec, data []byte) {
	io.Base = unsafe.SliceData(data)
	io.SetLen(len(data))
	m.Name, m.Namelen, m.Iov = &p.name[0], p.nameLen, io
	m.SetIovlen(1)
	m.Control = nil
	if p.controlLen > 0 {
		m.Control = &p.control[0]
	}
	m.SetControllen(p.controlLen)
}
