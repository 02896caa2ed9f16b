package firewall

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Traffic comes from two processes of this program, one in each container, that make their system calls without telling the Go
// scheduler: they cost what a program in C does.

// childVariable makes Child turn a process into one end of a measurement.
const childVariable = "SILK_BENCH_FIREWALL_CHILD"

const port = 7777

// measure is a kind of traffic: which CPUs the two ends are on, and what they do.
type measure struct {
	name             string
	client, serverOn int
}

// Requests and connections have both ends on one CPU: then the rate says what the whole path costs, without the waking of another CPU. Packets
// go one way, from one CPU to another.
var measures = []measure{{"requests", 0, 0}, {"connections", 0, 0}, {"packets", 0, 1}}

// rate is what one measurement found.
type rate struct {
	perSecond float64
	perCPU    float64 // operations for each second that both processes computed, their kernel work included
	count     float64 // operations
}

// ends are two processes in two containers that measure whenever they are told to.
type ends struct {
	of             measure
	server, client *exec.Cmd
	toServer       io.WriteCloser
	toClient       io.WriteCloser
	ofServer       *bufio.Reader
	ofClient       *bufio.Reader
}

// open starts both.
func (m measure) open(ctx context.Context, w *world, from, to string) (*ends, error) {
	e := &ends{of: m}
	var err error
	if e.server, e.toServer, e.ofServer, err = child(ctx, w.containers[to], "serve", m.name, m.serverOn, addresses[to]); err != nil {
		return e, err
	}
	if line, err := e.ofServer.ReadString('\n'); err != nil || line != "ready\n" {
		return e, fmt.Errorf("server of %s: said %q: %w", m.name, line, err)
	}
	e.client, e.toClient, e.ofClient, err = child(ctx, w.containers[from], "call", m.name, m.client, addresses[to])
	return e, err
}

// run measures for a while.
func (e *ends) run(length time.Duration) (rate, error) {
	before := cpuOf(e.server.Process.Pid)
	var n, seconds, cpu float64
	_, err := fmt.Fprintln(e.toClient, length.Nanoseconds())
	if err == nil {
		_, err = fmt.Fscanln(e.ofClient, &n, &seconds, &cpu)
	}
	cpu += cpuOf(e.server.Process.Pid) - before
	if e.of.name == "packets" && err == nil {
		if _, err = fmt.Fprintln(e.toServer); err == nil {
			_, err = fmt.Fscanln(e.ofServer, &n)
		}
	}
	if err != nil {
		return rate{}, fmt.Errorf("measure %s: %w", e.of.name, err)
	}
	return rate{n / seconds, n / cpu, n}, nil
}

// close ends both processes.
func (e *ends) close() {
	for _, p := range []*exec.Cmd{e.client, e.server} {
		if p != nil && p.Process != nil {
			p.Process.Kill()
			p.Wait()
		}
	}
}

// cpuOf returns the seconds that a process has computed.
func cpuOf(pid int) float64 {
	var ts unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|2), &ts) != nil {
		return 0
	}
	return float64(ts.Nano()) / 1e9
}

func child(ctx context.Context, ns *kernel.NS, role, what string, cpu int, to netip.Addr) (*exec.Cmd, io.WriteCloser, *bufio.Reader, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d %v %s", childVariable, role, what, cpu, to, path(ns)), "GODEBUG=asyncpreemptoff=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, nil, err
	}
	return cmd, in, bufio.NewReader(out), cmd.Start()
}

// Child does what a process that Run starts must do, if this is one, and reports whether it was. main calls it first.
func Child() bool {
	var role, what, ns string
	var cpu int
	var to string
	if _, err := fmt.Sscan(os.Getenv(childVariable), &role, &what, &cpu, &to, &ns); err != nil {
		return false
	}
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	if err := enter(ns, cpu); err != nil {
		fail(err)
	}
	a := netip.MustParseAddr(to)
	if serve, ok := servers[what]; ok && role == "serve" {
		serve()
		return true
	}
	for in := bufio.NewReader(os.Stdin); ; {
		var length time.Duration
		if _, err := fmt.Fscanln(in, &length); err != nil {
			return true
		}
		start, before := time.Now(), ownCPU()
		n := callers[what](a, length)
		fmt.Println(n, time.Since(start).Seconds(), ownCPU()-before)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench/firewall:", err)
	os.Exit(1)
}

func enter(ns string, cpu int) error {
	f, err := os.Open(ns)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(cpu % runtime.NumCPU())
	unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	return unix.SchedSetaffinity(0, &set)
}

var (
	servers = map[string]func(){"requests": serveStream, "connections": serveStream, "packets": servePackets}
	callers = map[string]func(netip.Addr, time.Duration) int{"requests": callRequests, "connections": callConnections, "packets": callPackets}
)

// sockaddr is a struct sockaddr_in.
func sockaddr(a netip.Addr) *[16]byte {
	var s [16]byte
	binary.NativeEndian.PutUint16(s[:], unix.AF_INET)
	binary.BigEndian.PutUint16(s[2:], port)
	b := a.As4()
	copy(s[4:], b[:])
	return &s
}

func call(what string, trap, a, b, c uintptr) uintptr {
	for {
		n, _, errno := unix.RawSyscall(trap, a, b, c)
		switch {
		case errno == 0:
			return n
		case errno != unix.EINTR:
			fail(fmt.Errorf("%s: %w", what, errno))
		}
	}
}

func socket(typ int) uintptr {
	return call("socket", unix.SYS_SOCKET, unix.AF_INET, uintptr(typ|unix.SOCK_CLOEXEC), 0)
}

func connect(fd uintptr, to *[16]byte) {
	call("connect", unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(to)), 16)
}

func noDelay(fd uintptr) {
	unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

var octet [64]byte

func exchange(fd uintptr) {
	at := uintptr(unsafe.Pointer(&octet))
	call("write", unix.SYS_WRITE, fd, at, 1)
	if call("read", unix.SYS_READ, fd, at, 1) != 1 {
		fail(io.ErrUnexpectedEOF)
	}
}

func listening(typ int) uintptr {
	fd := socket(typ)
	unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	call("bind", unix.SYS_BIND, fd, uintptr(unsafe.Pointer(sockaddr(netip.IPv4Unspecified()))), 16)
	return fd
}

func serveStream() {
	fd, at := listening(unix.SOCK_STREAM), uintptr(unsafe.Pointer(&octet))
	call("listen", unix.SYS_LISTEN, fd, 4096, 0)
	fmt.Println("ready")
	for {
		s := accept(fd)
		noDelay(s)
		for {
			n, _, errno := unix.RawSyscall(unix.SYS_READ, s, at, 64)
			if errno != 0 || n == 0 {
				break
			}
			call("write", unix.SYS_WRITE, s, at, 1)
		}
		call("close", unix.SYS_CLOSE, s, 0, 0)
	}
}

// ownCPU returns the seconds that this process has computed.
func ownCPU() float64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return float64(ts.Nano()) / 1e9
}

func callRequests(to netip.Addr, length time.Duration) int {
	fd := socket(unix.SOCK_STREAM)
	noDelay(fd)
	connect(fd, sockaddr(to))
	n, start := 0, time.Now()
	for ; time.Since(start) < length; n++ {
		exchange(fd)
	}
	call("close", unix.SYS_CLOSE, fd, 0, 0)
	return n
}

func callConnections(to netip.Addr, length time.Duration) int {
	a := sockaddr(to)
	n, start := 0, time.Now()
	for ; time.Since(start) < length; n++ {
		fd := socket(unix.SOCK_STREAM)
		noDelay(fd)
		connect(fd, a)
		exchange(fd)
		call("close", unix.SYS_CLOSE, fd, 0, 0)
	}
	return n
}

// mmsg is a struct mmsghdr.
type mmsg struct {
	header unix.Msghdr
	_      uint32
	_      uint32
}

const burst = 32

// messages are burst datagrams of size bytes that share one buffer, or have room for one each.
func messages(size int) *[burst]mmsg {
	var m [burst]mmsg
	for i := range m {
		b := make([]byte, 2048)
		m[i].header = unix.Msghdr{Iov: &unix.Iovec{Base: &b[0], Len: uint64(size)}, Iovlen: 1}
	}
	return &m
}

// callPackets sends; the server counts.
func callPackets(to netip.Addr, length time.Duration) int {
	fd := socket(unix.SOCK_DGRAM)
	connect(fd, sockaddr(to))
	unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	m := messages(18)
	start := time.Now()
	for time.Since(start) < length {
		unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(m)), burst, 0, 0, 0)
	}
	call("close", unix.SYS_CLOSE, fd, 0, 0)
	return 0
}

// servePackets counts what arrives, and says how much it was when it is asked and nothing is left.
func servePackets() {
	fd := listening(unix.SOCK_DGRAM)
	unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	fmt.Println("ready")
	m, n := messages(2048), 0
	polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: 0, Events: unix.POLLIN}}
	for {
		k, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(m)), burst, unix.MSG_DONTWAIT, 0, 0)
		if errno == 0 {
			n += int(k)
			continue
		}
		if unix.Poll(polled, -1); polled[0].Revents == 0 && polled[1].Revents != 0 {
			if k, _ := unix.Read(0, octet[:]); k <= 0 {
				return
			}
			fmt.Println(n)
			n = 0
		}
	}
}

func accept(fd uintptr) uintptr {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, fd, 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if errno == 0 {
			return n
		}
	}
}
