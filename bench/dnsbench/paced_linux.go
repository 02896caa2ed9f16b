package dnsbench

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// paced is what became of questions that were sent at a rate, whether or not earlier ones had been answered.
type paced struct {
	Rate   float64   // questions a second that were sent
	Lost   float64   // questions without an answer
	Millis []float64 // from the sending of a question to the moment at which the kernel received its answer
}

const (
	window  = 1 << 16 // questions under way: a question's number is its id
	burst   = 64      // most packets of one system call
	sockets = 8       // several, as a server may have some for each of its threads
	// behind is how late a question may be sent. What the asker did not come to in time is never sent, rather than all at once: that would
	// be another load.
	behind = time.Millisecond
	gap    = 50 * time.Microsecond
)

// asker sends and receives in one thread. When an answer came is known from the kernel's time stamp, so that it does not matter when it
// is read.
type asker struct {
	c       [sockets]*ipv4.PacketConn
	next    int // of c
	in, out []ipv4.Message
	queries [][]byte
	sent    [window]int64 // ns since 1970; 0: answered
	p       paced
}

// pace asks.
func pace(to netip.AddrPort, rate float64, length time.Duration) (paced, error) {
	debug.SetGCPercent(-1)
	a := &asker{in: make([]ipv4.Message, burst), out: make([]ipv4.Message, burst)}
	for i := range a.c {
		c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return paced{}, err
		}
		defer c.Close()
		if err := stamp(c); err != nil {
			return paced{}, err
		}
		a.c[i] = ipv4.NewPacketConn(c)
	}
	for i := range burst {
		a.in[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 2048)}, OOB: make([]byte, 128)}
		a.out[i].Buffers = make([][]byte, 1)
	}
	for _, i := range order() {
		a.queries = append(a.queries, question(nameOf(i)))
	}
	a.p.Millis = make([]float64, 0, int(rate*length.Seconds())+burst)
	sent, missed, begin := 0, 0, time.Now()
	for since := time.Duration(0); since < length; since = time.Since(begin) {
		due := int(rate*since.Seconds()) - missed
		if late := due - sent - 1 - int(rate*behind.Seconds()); late > 0 {
			missed, due = missed+late, due-late
		}
		var err error
		if sent, err = a.send(sent, due); err != nil {
			return paced{}, err
		}
		a.receive()
		unix.Nanosleep(&unix.Timespec{Nsec: int64(gap)}, nil)
	}
	a.p.Rate = float64(sent) / length.Seconds()
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end) && len(a.p.Millis) < sent; {
		a.receive()
		unix.Nanosleep(&unix.Timespec{Nsec: int64(gap)}, nil)
	}
	a.p.Lost = float64(sent - len(a.p.Millis))
	return a.p, nil
}

// stamp has the kernel say when packets were received, and makes room for them.
func stamp(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20))
	})
	return errors.Join(err, failed)
}

// question is one for the addresses of a name.
func question(name string) []byte {
	b := []byte{0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0, 0, 1, 0, 1)
}

// send sends the questions from..to, and returns how far it came.
func (a *asker) send(from, to int) (int, error) {
	for from < to {
		n := min(to-from, burst)
		for i := range n {
			q := a.queries[(from+i)%len(a.queries)]
			binary.BigEndian.PutUint16(q, uint16(from+i))
			a.out[i].Buffers[0] = q
		}
		now := time.Now().UnixNano()
		for i := range n {
			a.sent[(from+i)%window] = now
		}
		a.next = (a.next + 1) % sockets
		k, err := a.c[a.next].WriteBatch(a.out[:n], 0)
		if err != nil {
			return from, err
		}
		from += k
	}
	return from, nil
}

// receive takes the answers that are there.
func (a *asker) receive() {
	for _, c := range a.c {
		for n := burst; n == burst; {
			var err error
			if n, err = c.ReadBatch(a.in, unix.MSG_DONTWAIT); err != nil {
				break
			}
			for i := range a.in[:n] {
				a.note(&a.in[i])
			}
		}
	}
}

// note keeps how long an answer took. One that is wrong counts as none.
func (a *asker) note(m *ipv4.Message) {
	id := binary.BigEndian.Uint16(m.Buffers[0])
	at := received(m.OOB[:m.NN])
	if a.sent[id] == 0 || at == 0 || m.Buffers[0][3]&15 != 0 || m.Buffers[0][7] == 0 {
		return
	}
	a.p.Millis = append(a.p.Millis, float64(at-a.sent[id])/1e6)
	a.sent[id] = 0
}

// received reads the time stamp, in ns since 1970: a struct timespec behind a header.
func received(oob []byte) int64 {
	if len(oob) < unix.SizeofCmsghdr+16 || binary.NativeEndian.Uint32(oob[12:]) != unix.SO_TIMESTAMPNS {
		return 0
	}
	return int64(binary.NativeEndian.Uint64(oob[unix.SizeofCmsghdr:]))*1e9 + int64(binary.NativeEndian.Uint64(oob[unix.SizeofCmsghdr+8:]))
}
