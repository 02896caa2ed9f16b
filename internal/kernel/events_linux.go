package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// eventBuffer is the room for events that nobody has read yet, in bytes of kernel memory, of which it takes twice as many: a second of 10,000.
const eventBuffer = 16 << 20

// eventReads bounds how many datagrams one call reads, so that who reads can stop under any load.
const eventReads = 1 << 16

// events is a netlink socket to which the kernel writes without ever waiting: what finds no room is dropped and counted.
//
// Go's poller is kept out of it: it would be woken for every event, at a cost to whoever causes them, also while nobody wants to read. A read
// takes a thread of its own while it waits.
type events struct {
	fd     int
	stop   int // an eventfd that ends a wait
	buf    []byte
	drops  atomic.Uint32
	closed atomic.Bool
	mu     sync.Mutex // held by a read
}

// newEvents takes the socket over.
func newEvents(fd int) (*events, error) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, eventBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, eventBuffer) // without privilege the system's limit must do
	}
	// Otherwise the first event that finds no room closes the socket to all others until it has been read empty.
	err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS, 1)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	stop := -1
	if err == nil {
		stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("prepare netlink socket: %w", err)
	}
	return &events{fd: fd, stop: stop, buf: make([]byte, rbSize)}, nil
}

// Close ends a read with os.ErrClosed and waits for it.
func (e *events) Close() error {
	if e.closed.Swap(true) {
		return os.ErrClosed
	}
	_, err := unix.Write(e.stop, binary.NativeEndian.AppendUint64(nil, 1))
	e.mu.Lock()
	defer e.mu.Unlock()
	return errors.Join(err, unix.Close(e.fd), unix.Close(e.stop))
}

// read waits for events and calls each for those that are there, at most eventReads datagrams.
func (e *events) read(each func(Message)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n := 0; ; {
		if e.closed.Load() {
			return os.ErrClosed
		}
		size, err := unix.Read(e.fd, e.buf)
		switch {
		case err == nil:
			notifications(e.buf[:size], each)
			if n++; n < eventReads {
				continue
			}
			e.count()
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOBUFS):
		case !errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("receive netlink events: %w", err)
		case n > 0:
			e.count()
			return nil
		default:
			fds := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}, {Fd: int32(e.stop), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for netlink events: %w", err)
			}
		}
	}
}

// count notes what the kernel has dropped so far.
func (e *events) count() {
	const drops = 8 // SK_MEMINFO_DROPS (linux/sock_diag.h)
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(e.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno == 0 {
		e.drops.Store(info[drops])
	}
}

// dropped returns how many datagrams found no room.
func (e *events) dropped() uint32 { return e.drops.Load() }
