package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

var ne = binary.NativeEndian

// Batch is a sequence of rtnetlink requests to be sent together. The kernel carries them out in order and goes on
// after one that fails. The zero Batch is empty and ready.
type Batch struct {
	buf  []byte
	offs []int
}

// Add begins a request of type typ (RTM_*) with flags beyond NLM_F_REQUEST and the fixed header that the
// type asks for. Attributes that follow belong to it.
func (b *Batch) Add(typ uint16, flags int, header []byte) {
	b.finish()
	o := len(b.buf)
	b.offs = append(b.offs, o)
	b.buf = append(b.buf, make([]byte, unix.NLMSG_HDRLEN)...)
	ne.PutUint16(b.buf[o+4:], typ)
	ne.PutUint16(b.buf[o+6:], uint16(flags)|unix.NLM_F_REQUEST)
	b.buf = append(b.buf, header...)
	b.pad()
}

// Attr appends an attribute to the request begun last.
func (b *Batch) Attr(typ uint16, value []byte) {
	b.buf = ne.AppendUint16(b.buf, uint16(4+len(value)))
	b.buf = ne.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, value...)
	b.pad()
}

// Uint32 appends a 32-bit attribute in host order.
func (b *Batch) Uint32(typ uint16, v uint32) {
	var x [4]byte
	ne.PutUint32(x[:], v)
	b.Attr(typ, x[:])
}

// Uint16BE appends a 16-bit attribute in network order.
func (b *Batch) Uint16BE(typ uint16, v uint16) { b.Attr(typ, []byte{byte(v >> 8), byte(v)}) }

// Uint8 appends an 8-bit attribute.
func (b *Batch) Uint8(typ uint16, v uint8) { b.Attr(typ, []byte{v}) }

// String appends a NUL-terminated attribute.
func (b *Batch) String(typ uint16, s string) { b.Attr(typ, append([]byte(s), 0)) }

// Raw appends bytes that are not an attribute: the ifinfomsg inside VETH_INFO_PEER.
func (b *Batch) Raw(p []byte) { b.buf = append(b.buf, p...); b.pad() }

// Nest appends an attribute whose content is what fn appends.
func (b *Batch) Nest(typ uint16, fn func()) {
	o := len(b.buf)
	b.buf = append(b.buf, 0, 0, byte(typ), byte(typ>>8))
	ne.PutUint16(b.buf[o+2:], typ)
	fn()
	ne.PutUint16(b.buf[o:], uint16(len(b.buf)-o))
}

// Len returns the number of requests.
func (b *Batch) Len() int { return len(b.offs) }

// Bytes returns the requests as they would be sent, but for their numbers. It is valid until the next change.
func (b *Batch) Bytes() []byte { b.finish(); return b.buf }

// Reset empties the batch and keeps its memory.
func (b *Batch) Reset() { b.buf, b.offs = b.buf[:0], b.offs[:0] }

func (b *Batch) pad() {
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

// finish writes the length of the request begun last.
func (b *Batch) finish() {
	if n := len(b.offs); n > 0 {
		o := b.offs[n-1]
		ne.PutUint32(b.buf[o:], uint32(len(b.buf)-o))
	}
}

// IfInfo returns an ifinfomsg: a link's index and the flags to change (linux/rtnetlink.h).
func IfInfo(index int, flags, change uint32) []byte {
	h := make([]byte, unix.SizeofIfInfomsg)
	ne.PutUint32(h[4:], uint32(index))
	ne.PutUint32(h[8:], flags)
	ne.PutUint32(h[12:], change)
	return h
}

// IfAddr returns an ifaddrmsg for an IPv4 address of the given prefix length and scope.
func IfAddr(index, bits int, scope uint8) []byte {
	h := []byte{unix.AF_INET, byte(bits), 0, scope, 0, 0, 0, 0}
	ne.PutUint32(h[4:], uint32(index))
	return h
}

// Rt returns an rtmsg for an IPv4 unicast route of the main table.
func Rt(bits int, proto, scope uint8, flags uint32) []byte {
	h := []byte{unix.AF_INET, byte(bits), 0, 0, unix.RT_TABLE_MAIN, proto, scope, unix.RTN_UNICAST, 0, 0, 0, 0}
	ne.PutUint32(h[8:], flags)
	return h
}

// Nd returns an ndmsg: a neighbour (AF_INET) or forwarding entry (AF_BRIDGE) of a device.
func Nd(family uint8, index int, state uint16, flags uint8) []byte {
	h := make([]byte, unix.SizeofNdMsg)
	h[0] = family
	ne.PutUint32(h[4:], uint32(index))
	ne.PutUint16(h[8:], state)
	h[10] = flags
	return h
}

// RequestError is the kernel's refusal of one request of a batch.
type RequestError struct {
	Index int // of the request in the batch
	Errno unix.Errno
	Text  string // the kernel's extended acknowledgement, often empty
}

// Error returns the errno's text and the kernel's own words, if it gave any.
func (e *RequestError) Error() string {
	if e.Text != "" {
		return e.Errno.Error() + " (" + e.Text + ")"
	}
	return e.Errno.Error()
}

// Unwrap returns the errno.
func (e *RequestError) Unwrap() error { return e.Errno }

// Conn is an rtnetlink socket in one namespace. It is safe for concurrent use.
type Conn struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	rb  *[rbSize]byte
}

// spare is the buffer of a closed connection. Programs that do one thing have one connection after the other, and begin with one that
// is not on the heap: a first object of this size costs more than what is read into it.
var (
	spare atomic.Pointer[[rbSize]byte]
	one   [rbSize]byte
)

func init() { spare.Store(&one) }

const (
	chunk   = 160 << 10 // bytes of requests in one send
	bufSize = 8 << 20   // socket buffers, as far as the kernel allows
	rbSize  = 64 << 10  // one read; the kernel never builds a longer answer
	tries   = 10        // of a dump that is interrupted by changes
)

// Dial opens an rtnetlink socket in ns, nil for the calling thread's namespace.
func Dial(ns *NS) (*Conn, error) { return dial(ns, unix.NETLINK_ROUTE) }

func dial(ns *NS, protocol int) (*Conn, error) {
	fd, err := socket(ns, protocol, 0)
	if err != nil {
		return nil, err
	}
	c := &Conn{fd: fd}
	setBuffers(fd)
	// Short acknowledgements with the kernel's own words; filters in dump requests (4.20).
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	return c, nil
}

// socket opens a bound netlink socket in ns.
func socket(ns *NS, protocol, flags int) (fd int, err error) {
	open := func() error {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, protocol)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			unix.Close(fd)
			return err
		}
		return nil
	}
	if ns == nil {
		err = open()
	} else {
		err = ns.Do(open)
	}
	if err != nil {
		return -1, fmt.Errorf("open netlink socket of protocol %d: %w", protocol, err)
	}
	return fd, nil
}

// Port returns the socket's address: what Message.Port says of notifications about its requests, where the kernel
// fills that in (it does not for forwarding entries and removed neighbours).
func (c *Conn) Port() (uint32, error) {
	sa, err := unix.Getsockname(c.fd)
	if err != nil {
		return 0, fmt.Errorf("read netlink socket's address: %w", err)
	}
	return sa.(*unix.SockaddrNetlink).Pid, nil
}

// setBuffers asks for large socket buffers; without privilege the system's limit must do.
func setBuffers(fd int) {
	for _, o := range [][2]int{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[0], bufSize) != nil {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, o[1], bufSize)
		}
	}
}

// Close closes the socket.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rb != nil {
		spare.Store(c.rb)
		c.rb = nil
	}
	return unix.Close(c.fd)
}

// release gives the socket away. The connection is of no use for anything else afterwards.
func (c *Conn) release() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rb != nil {
		spare.Store(c.rb)
		c.rb = nil
	}
	fd := c.fd
	c.fd = -1
	return fd
}

// Do sends the batch in chunks and returns what the kernel refused, in the batch's order. The second result is a failure
// of the conversation itself: then it is not known which requests were carried out.
func (c *Conn) Do(b *Batch) ([]*RequestError, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b.finish()
	var refused []*RequestError
	for first := 0; first < len(b.offs); {
		end, next := b.cut(first)
		base := c.seq + 1
		for i := first; i < next; i++ {
			o := b.offs[i]
			ne.PutUint32(b.buf[o+8:], base+uint32(i-first))
			fl := ne.Uint16(b.buf[o+6:]) &^ unix.NLM_F_ACK
			if i == next-1 {
				fl |= unix.NLM_F_ACK
			}
			ne.PutUint16(b.buf[o+6:], fl)
		}
		c.seq += uint32(next - first)
		if err := unix.Sendto(c.fd, b.buf[b.offs[first]:end], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return refused, fmt.Errorf("send to netlink: %w", err)
		}
		err := c.receive(base, c.seq, func(typ, _ uint16, seq uint32, body []byte) error {
			if typ == unix.NLMSG_ERROR {
				if e := requestError(body, 0); e != nil {
					e.Index = first + int(seq-base)
					refused = append(refused, e)
				}
			}
			return nil
		})
		if err != nil {
			return refused, err
		}
		first = next
	}
	return refused, nil
}

// cut returns where the chunk that begins with request first ends: its last byte and the next request.
func (b *Batch) cut(first int) (end, next int) {
	for next = first + 1; next < len(b.offs); next++ {
		if b.offs[next]-b.offs[first] >= chunk {
			return b.offs[next], next
		}
	}
	return len(b.buf), next
}

// Message is one answer or notification: its type, the port of the socket that caused it (see Conn.Port) and what
// follows the netlink header. It is valid during the call only.
type Message struct {
	Type uint16
	Port uint32
	Body []byte
}

// ErrDumpInterrupted is a dump that changes elsewhere kept interrupting: it must not be taken for a list.
var ErrDumpInterrupted = errors.New("dump interrupted by changes every time: the list is not complete")

// Dump asks for all objects of the one request in b (its flags gain NLM_F_DUMP). begin is called before every attempt, each for
// every object; an attempt that the kernel marks as interrupted is repeated. Any error means that the
// objects seen are not the whole list.
func (c *Conn) Dump(b *Batch, begin func(), each func(Message) error) error {
	for range tries {
		interrupted, err := c.DumpOnce(b, begin, each)
		if !interrupted {
			return err
		}
	}
	return ErrDumpInterrupted
}

// DumpOnce is one attempt of Dump that reads to the end also when the kernel marks it as interrupted. It is for callers who can tell
// by other means whether what they ask for has changed meanwhile: the kernel marks a dump for any change to any object of a kind.
func (c *Conn) DumpOnce(b *Batch, begin func(), each func(Message) error) (interrupted bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.list(b); err != nil {
		return false, err
	}
	begin()
	var failed error
	err = c.receive(c.seq, c.seq, func(typ, flags uint16, _ uint32, body []byte) error {
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch {
		case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
			if e := requestError(body, 0); e != nil {
				failed = e
			}
		case failed == nil:
			failed = each(Message{Type: typ, Body: body})
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	return interrupted, failed
}

// Any reports whether the list that the one request in b asks for has an object that is says so of, and reads no further than to the first. The
// connection is of no use for anything else afterwards: close it.
func (c *Conn) Any(b *Batch, is func(Message) bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.list(b); err != nil {
		return false, err
	}
	found := errors.New("found")
	var failed error
	err := c.receive(c.seq, c.seq, func(typ, _ uint16, _ uint32, body []byte) error {
		if typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE {
			if e := requestError(body, 0); e != nil {
				failed = e
			}
		} else if is(Message{Type: typ, Body: body}) {
			return found
		}
		return nil
	})
	if errors.Is(err, found) {
		return true, nil
	}
	return false, errors.Join(err, failed)
}

// list sends the one request in b as one for a list.
func (c *Conn) list(b *Batch) error {
	b.finish()
	ne.PutUint16(b.buf[6:], ne.Uint16(b.buf[6:])|unix.NLM_F_DUMP)
	c.seq++
	ne.PutUint32(b.buf[8:], c.seq)
	if err := unix.Sendto(c.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netlink: %w", err)
	}
	return nil
}

// receive reads answers up to the acknowledgement of, or the end of the dump for, request last. Answers to requests
// before first are what a failed conversation left behind and are passed over.
func (c *Conn) receive(first, last uint32, each func(typ, flags uint16, seq uint32, body []byte) error) error {
	if c.rb == nil {
		if c.rb = spare.Swap(nil); c.rb == nil {
			c.rb = new([rbSize]byte)
		}
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.rb[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive from netlink: %w", err)
		}
		for rest := c.rb[:n]; len(rest) >= unix.NLMSG_HDRLEN; {
			l := int(ne.Uint32(rest))
			if l < unix.NLMSG_HDRLEN || l > len(rest) {
				return fmt.Errorf("receive from netlink: message of %d bytes in %d", l, len(rest))
			}
			typ, flags, seq := ne.Uint16(rest[4:]), ne.Uint16(rest[6:]), ne.Uint32(rest[8:])
			if seq-first <= last-first {
				if err := each(typ, flags, seq, rest[unix.NLMSG_HDRLEN:l]); err != nil {
					return err
				}
			}
			if seq == last && (typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE) {
				return nil
			}
			rest = rest[min((l+3)&^3, len(rest)):]
		}
	}
}

// requestError reads the errno of an NLMSG_ERROR or NLMSG_DONE body and, if there, the extended text.
func requestError(body []byte, index int) *RequestError {
	if len(body) < 4 {
		return nil
	}
	code := int32(ne.Uint32(body))
	if code == 0 {
		return nil
	}
	e := &RequestError{Index: index, Errno: unix.Errno(-code)}
	if len(body) >= 4+unix.NLMSG_HDRLEN {
		for t, v := range Attrs(body[4+unix.NLMSG_HDRLEN:]) {
			if t == unix.NLMSGERR_ATTR_MSG {
				e.Text = Text(v)
			}
		}
	}
	return e
}

// Get sends the one request in b and calls each for every answer. A refusal is a *RequestError: ENODEV for a link that
// is not there.
func (c *Conn) Get(b *Batch, each func(Message) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	b.finish()
	c.seq++
	ne.PutUint16(b.buf[6:], ne.Uint16(b.buf[6:])|unix.NLM_F_ACK)
	ne.PutUint32(b.buf[8:], c.seq)
	if err := unix.Sendto(c.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netlink: %w", err)
	}
	var failed error
	err := c.receive(c.seq, c.seq, func(typ, _ uint16, _ uint32, body []byte) error {
		if typ == unix.NLMSG_ERROR {
			if e := requestError(body, 0); e != nil {
				failed = e
			}
		} else if failed == nil {
			failed = each(Message{Type: typ, Body: body})
		}
		return nil
	})
	return errors.Join(err, failed)
}

// Attrs yields the type (without flag bits) and value of each attribute in b. It stops at the first that is malformed.
func Attrs(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			l := int(ne.Uint16(b))
			if l < 4 || l > len(b) || !yield(ne.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:l]) {
				return
			}
			b = b[min((l+3)&^3, len(b)):]
		}
	}
}

// Uint32 reads a 32-bit attribute in host order, 0 if it is shorter.
func Uint32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return ne.Uint32(v)
}

// Text reads an attribute as a string up to its first NUL.
func Text(v []byte) string {
	for i, c := range v {
		if c == 0 {
			return string(v[:i])
		}
	}
	return string(v)
}
