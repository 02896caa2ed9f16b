package garden

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// inUse is what the host does with TCP ports by itself.
type inUse struct {
	listens     map[int]bool
	low, high   int // the kernel gives programs ports from here to here
	reservedSet map[int]bool
}

// local reports whether the kernel may give the port to a program of the host that asks for any.
func (u inUse) local(p int) bool { return p >= u.low && p <= u.high && !u.reservedSet[p] }

// hostPorts asks the kernel, in the network namespace of the calling thread.
func hostPorts() (inUse, error) {
	u := inUse{listens: map[int]bool{}, reservedSet: map[int]bool{}}
	for _, path := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) { // no IPv6
			continue
		}
		if err != nil {
			return u, fmt.Errorf("list listening sockets: %w", err)
		}
		err = readListening(f, u.listens)
		f.Close()
		if err != nil {
			return u, fmt.Errorf("list listening sockets: %w", err)
		}
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return u, fmt.Errorf("read the range of local ports: %w", err)
	}
	if _, err := fmt.Sscan(string(b), &u.low, &u.high); err != nil {
		return u, fmt.Errorf("read the range of local ports: %w", err)
	}
	if b, err = os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports"); err != nil {
		return u, fmt.Errorf("read the reserved ports: %w", err)
	}
	u.reservedSet, err = parsePortList(strings.TrimSpace(string(b)))
	if err != nil {
		return u, fmt.Errorf("read the reserved ports: %w", err)
	}
	return u, nil
}

// States of a socket in /proc/net/tcp, include/net/tcp_states.h.
const (
	stateClosed    = 7 // one that stops listening at the moment
	stateListening = 10
)

// readListening adds the ports of sockets that listen. The kernel lists these first (net/ipv4/tcp_ipv4.c, tcp_get_idx): with the first that is
// connected it is done, and need not go through what may be a hundred thousand.
func readListening(r io.Reader, ports map[int]bool) error {
	s := bufio.NewScanner(r)
	for first := true; s.Scan(); first = false {
		f := strings.Fields(s.Text())
		if first || len(f) < 4 {
			continue
		}
		state, err := strconv.ParseUint(f[3], 16, 8)
		if err != nil {
			return fmt.Errorf("state %q of a socket", f[3])
		}
		if state != stateListening {
			if state == stateClosed {
				continue
			}
			return nil
		}
		_, text, _ := strings.Cut(f[1], ":")
		port, err := strconv.ParseUint(text, 16, 16)
		if err != nil {
			return fmt.Errorf("address %q of a socket", f[1])
		}
		ports[int(port)] = true
	}
	return s.Err()
}

// parsePortList reads a list such as 8080,9000-9010.
func parsePortList(s string) (map[int]bool, error) {
	ports := map[int]bool{}
	if s == "" {
		return ports, nil
	}
	for item := range strings.SplitSeq(s, ",") {
		low, high, ranged := strings.Cut(item, "-")
		if !ranged {
			high = low
		}
		a, err1 := strconv.ParseUint(low, 10, 16)
		b, err2 := strconv.ParseUint(high, 10, 16)
		if err1 != nil || err2 != nil || a > b {
			return nil, fmt.Errorf("ports %q", item)
		}
		for p := a; p <= b; p++ {
			ports[int(p)] = true
		}
	}
	return ports, nil
}
