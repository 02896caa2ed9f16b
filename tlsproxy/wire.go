package tlsproxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Sizes of what holds bytes on their way. A connection over which nothing moves holds none of these.
const (
	smallBuffer = 16 << 10 // a TLS record's worth
	largeBuffer = 64 << 10 // for streams: fewer system calls, larger packets
	maxLarge    = 512      // of them in use at a time: 32 MiB; streams beyond make do with small ones
)

// buffers are those that nobody uses. Connections that are stuck hold theirs, so the large ones are counted.
var buffers = struct {
	small, large sync.Pool
	room         chan struct{} // a token for each large buffer in use
}{
	small: sync.Pool{New: func() any { return new([smallBuffer]byte) }},
	large: sync.Pool{New: func() any { return new([largeBuffer]byte) }},
	room:  make(chan struct{}, maxLarge),
}

// takeBuffer returns a buffer, a large one if that is wanted and there is room.
func takeBuffer(large bool) []byte {
	if large {
		select {
		case buffers.room <- struct{}{}:
			return buffers.large.Get().(*[largeBuffer]byte)[:]
		default:
		}
	}
	return buffers.small.Get().(*[smallBuffer]byte)[:]
}

// giveBuffer takes back what takeBuffer returned, which may have been cut short at its end.
func giveBuffer(b []byte) {
	switch b = b[:cap(b)]; len(b) {
	case smallBuffer:
		buffers.small.Put((*[smallBuffer]byte)(b))
	case largeBuffer:
		buffers.large.Put((*[largeBuffer]byte)(b))
		<-buffers.room
	}
}

// errWait is what a wire's Read returns when there is nothing to read and it must not wait. To crypto/tls it is what a deadline is: the
// connection can be read again.
var errWait error = waitError{}

type waitError struct{}

func (waitError) Error() string   { return "nothing to read yet" }
func (waitError) Timeout() bool   { return true }
func (waitError) Temporary() bool { return true } // what crypto/tls asks for

// source reads a connection into buffers that it holds only while there is something in them.
type source struct {
	raw    syscall.RawConn
	in     []byte // a buffer; nil while there is nothing in it
	from   int    // what has been taken of it
	stream bool   // the last read filled its buffer: there is more to come
	n      int
	err    error
	try    func(fd uintptr) bool
}

func newSource(c *net.TCPConn) (*source, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &source{raw: raw}
	s.try = s.read // one closure for the connection's life
	return s, nil
}

// read is called with the descriptor when there may be something to read.
func (s *source) read(fd uintptr) bool {
	s.in = takeBuffer(s.stream)
	for {
		s.n, s.err = syscall.Read(int(fd), s.in)
		if s.err != syscall.EINTR {
			break
		}
	}
	if s.err == syscall.EAGAIN {
		giveBuffer(s.in)
		s.in, s.stream = nil, false
		return false
	}
	return true
}

// fill waits until there are bytes in the buffer, which must be empty. io.EOF when there will be none.
func (s *source) fill() error {
	err := s.raw.Read(s.try)
	switch {
	case s.in == nil: // it was closed, or the deadline is over
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return err
	case err == nil && s.err != nil:
		err = os.NewSyscallError("read", s.err)
	case err == nil && s.n == 0:
		err = io.EOF
	}
	if err != nil {
		s.drop()
		return err
	}
	s.stream = s.n == len(s.in)
	s.in, s.from = s.in[:s.n], 0
	return nil
}

// take copies from the buffer, which it gives up when all has been taken.
func (s *source) take(p []byte) int {
	n := copy(p, s.in[s.from:])
	if s.from += n; s.from == len(s.in) {
		s.drop()
	}
	return n
}

// drop empties the buffer.
func (s *source) drop() {
	if s.in != nil {
		giveBuffer(s.in)
		s.in, s.from = nil, 0
	}
}

// maxHandshake bounds what a client may send until its handshake is over, in bytes: crypto/tls keeps all of a message until it has the whole, and would
// take a quarter of a MiB for certificates. A hello has up to some KiB, a chain of four with long RSA keys 8.
const maxHandshake = 32 << 10

var errLong = errors.New("client sent more than 32 KiB and its handshake is not over")

// wire is the connection below one of TLS. While its handshake lasts a Read waits, and lets others of the container compute meanwhile; after
// that it does not, so that who waits holds no buffers. A wire has one reader at a time.
type wire struct {
	*net.TCPConn
	in          *source
	turns       chan struct{} // a token for each handshake that computes
	established bool          // Read does not wait
	taken       int           // bytes, until then
	frame       frame
}

// frame follows the records of TLS (RFC 8446, section 5.1), so that no read goes beyond one. What crypto/tls reads beyond it keeps, and makes room for by
// doubling its own buffer, which it never gives up.
type frame struct {
	header [5]byte // type, version, length
	have   int     // of the header
	left   int     // of what follows it
}

// within returns how many of n bytes are of one record's header or body.
func (f *frame) within(n int) int {
	if f.left > 0 {
		return min(n, f.left)
	}
	return min(n, len(f.header)-f.have)
}

// pass notes that bytes, as many as within said at most, were read.
func (f *frame) pass(b []byte) {
	if f.left > 0 {
		f.left -= len(b)
		return
	}
	if f.have += copy(f.header[f.have:], b); f.have == len(f.header) {
		f.have, f.left = 0, int(f.header[3])<<8|int(f.header[4])
	}
}

// Read implements io.Reader.
func (w *wire) Read(p []byte) (int, error) {
	if w.in.in == nil {
		if w.established {
			return 0, errWait
		}
		<-w.turns
		err := w.in.fill()
		w.turns <- struct{}{}
		if err != nil {
			return 0, err
		}
	}
	n := w.in.take(p[:w.frame.within(len(p))])
	w.frame.pass(p[:n])
	if !w.established {
		if w.taken += n; w.taken > maxHandshake {
			return n, errLong
		}
	}
	return n, nil
}

// SetWriteDeadline is for the handshake alone: after that crypto/tls would give a client that takes a pause five seconds to make room for the
// word that the connection ends, and break off what it has not read by then.
func (w *wire) SetWriteDeadline(t time.Time) error {
	if w.established {
		return nil
	}
	return w.TCPConn.SetWriteDeadline(t)
}
