package kernel

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// eventBuffer is the room for events that nobody has read yet, in bytes of kernel memory: half a second of 10,000 a second.
const eventBuffer = 16 << 20

// eventReads bounds how many datagrams one call reads, so that who reads can stop under any load.
const eventReads = 1 << 16

// events is a netlink socket to which the kernel writes without ever waiting: what finds no room is dropped and counted.
type events struct {
	f     *os.File
	raw   syscall.RawConn
	buf   []byte
	drops atomic.Uint32
}

// newEvents takes the socket over.
func newEvents(fd int) (*events, error) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, eventBuffer) // without privilege the system's limit must do
	}
	// Otherwise the first event that finds no room closes the socket to all others until it has been read empty.
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS, 1); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set netlink socket to drop: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	e := &events{f: os.NewFile(uintptr(fd), "netlink events"), buf: make([]byte, rbSize)}
	var err error
	if e.raw, err = e.f.SyscallConn(); err != nil {
		e.f.Close()
		return nil, err
	}
	return e, nil
}

// Close ends a read with os.ErrClosed.
func (e *events) Close() error { return e.f.Close() }

// read waits for events and calls each for those that are there, at most eventReads datagrams.
func (e *events) read(each func(Message)) error {
	var failed error
	err := e.raw.Read(func(fd uintptr) bool {
		for n := range eventReads {
			size, _, err := unix.Recvfrom(int(fd), e.buf, unix.MSG_DONTWAIT)
			switch {
			case err == nil:
				notifications(e.buf[:size], each)
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOBUFS):
			case errors.Is(err, unix.EAGAIN):
				if n > 0 {
					e.count(int(fd))
				}
				return n > 0
			default:
				failed = fmt.Errorf("receive netlink events: %w", err)
				return true
			}
		}
		e.count(int(fd))
		return true
	})
	if err != nil { // no deadline is ever set: it was closed, before or meanwhile
		return os.ErrClosed
	}
	return failed
}

// count notes what the kernel has dropped so far.
func (e *events) count(fd int) {
	const drops = 8 // SK_MEMINFO_DROPS (linux/sock_diag.h)
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno == 0 {
		e.drops.Store(info[drops])
	}
}

// dropped returns how many datagrams found no room.
func (e *events) dropped() uint32 { return e.drops.Load() }
