package cni

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// network is what an ADD needs to know about the host.
type network struct {
	subnet  netip.Prefix // this host's
	overlay netip.Prefix // the whole range, zero when not told
	mtu     int
	vtep    string
	status  string // of our own daemon: ready, degraded, starting, fenced; "" when an earlier release or a file told
	reason  string
}

// ours reports whether our own daemon told, which also keeps the address translation right.
func (n network) ours() bool { return n.status != "" }

// daemonTimeout bounds the question to the daemon, which answers from memory.
const daemonTimeout = 5 * time.Second

// inquiry is what discover has to wait for; nil when the configuration names a file.
type inquiry struct {
	*question
	to  netip.AddrPort
	at  time.Time // when it was asked
	err error
}

// inquire asks the daemon, if that is who knows. Our own tells whoever connects to the socket beside its port. Earlier releases
// have no such socket, and give every path of their endpoint the same answer, of which ours has more.
func (c *call) inquire() *inquiry {
	if c.cfg.SubnetFile != "" {
		return nil
	}
	i := &inquiry{at: time.Now(), to: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(c.cfg.DaemonPort))}
	if i.question, i.err = listen(c.cfg.DaemonPort, daemonTimeout); i.err != nil {
		i.question, i.err = ask(i.to, "/v1/network", daemonTimeout)
	}
	return i
}

// discover finds out about the host.
func (c *call) discover(i *inquiry) (network, error) {
	var n network
	var err error
	if i == nil {
		n, err = readSubnetFile(c.cfg.SubnetFile)
	} else {
		n, err = i.network()
	}
	if err != nil {
		return n, err
	}
	if c.cfg.MTU != 0 {
		n.mtu = c.cfg.MTU
	}
	if n.vtep == "" {
		n.vtep = "silk-vtep"
	}
	return n, nil
}

// network waits for the daemon's answer.
func (i *inquiry) network() (network, error) {
	bad := func(err error, hint string) (network, error) {
		return network{}, &failure{code: codeTryAgain, msg: "discover network info", err: fmt.Errorf("ask silk-daemon: %w", err), hint: hint}
	}
	err := i.err
	var body []byte
	if err == nil {
		body, err = i.answer()
	}
	if err != nil {
		return bad(err, "see whether silk-daemon runs and listens on "+i.to.String())
	}
	n, err := parseNetwork(body)
	if err != nil {
		return bad(err, "see what listens on "+i.to.String())
	}
	return n, nil
}

// drop gives up waiting.
func (i *inquiry) drop() {
	if i != nil && i.err == nil {
		i.conn.Close()
	}
}

// answer is what the daemon says.
type answer struct {
	Subnet  string `json:"overlay_subnet"`
	Overlay string `json:"overlay_network"`
	MTU     int    `json:"mtu"`
	VTEP    string `json:"vtep"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
}

// parseNetwork reads the daemon's answer.
func parseNetwork(body []byte) (network, error) {
	var a answer
	if !a.plain(body) {
		a = answer{}
		if err := json.Unmarshal(body, &a); err != nil {
			return network{}, fault.Invalidf("answer is not what was expected: %w", err)
		}
	}
	n := network{mtu: a.MTU, vtep: a.VTEP, status: a.Status, reason: a.Reason}
	if n.status == statusStarting || n.status == statusFenced {
		return n, nil // it may tell nothing else
	}
	var err error
	if n.subnet, err = parseHostSubnet(a.Subnet); err != nil {
		return network{}, err
	}
	if a.Overlay != "" {
		if n.overlay, err = parseSubnet(a.Overlay); err != nil {
			return network{}, err
		}
	}
	if n.mtu < minMTU || n.mtu > maxMTU {
		return network{}, fault.Invalidf("mtu %d: expected %d to %d", n.mtu, minMTU, maxMTU)
	}
	return n, nil
}

// Statuses of our daemon that forbid new containers.
const (
	statusStarting = "starting"
	statusFenced   = "fenced"
)

// parseSubnet reads an IPv4 network; host bits are passed over.
func parseSubnet(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() {
		return netip.Prefix{}, fault.Invalidf("subnet %q: expected an IPv4 network such as 10.255.30.0/24", s)
	}
	return p.Masked(), nil
}

// notForHosts are ranges that no container can have an address of.
var notForHosts = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
}

// parseHostSubnet reads the subnet that containers get their addresses from.
func parseHostSubnet(s string) (netip.Prefix, error) {
	p, err := parseSubnet(s)
	if err != nil {
		return p, err
	}
	if p.Bits() < 8 || slices.ContainsFunc(notForHosts, p.Overlaps) {
		return netip.Prefix{}, fault.Invalidf("subnet %v cannot be one host's: expected a network such as 10.255.30.0/24", p)
	}
	return p, nil
}

// readSubnetFile reads a file of shell variables as flannel writes it: FLANNEL_SUBNET and FLANNEL_MTU, and FLANNEL_NETWORK if
// it is there.
func readSubnetFile(path string) (network, error) {
	bad := func(err error) (network, error) {
		return network{}, &failure{code: codeTryAgain, msg: "discover network info", err: err, hint: "subnetFile must have lines FLANNEL_SUBNET=a.b.c.d/n and FLANNEL_MTU=n"}
	}
	f, err := os.Open(path)
	if err != nil {
		return bad(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAnswer))
	if err != nil {
		return bad(err)
	}
	n, err := parseSubnetFile(string(b))
	if err != nil {
		return bad(fmt.Errorf("%s: %w", path, err))
	}
	return n, nil
}

func parseSubnetFile(text string) (network, error) {
	var n network
	var err error
	for line := range strings.SplitSeq(text, "\n") {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "FLANNEL_SUBNET":
			n.subnet, err = parseHostSubnet(value)
		case "FLANNEL_NETWORK":
			n.overlay, err = parseSubnet(value)
		case "FLANNEL_MTU":
			if n.mtu, err = strconv.Atoi(value); err == nil && (n.mtu < minMTU || n.mtu > maxMTU) {
				err = fault.Invalidf("mtu %d: expected %d to %d", n.mtu, minMTU, maxMTU)
			}
		}
		if err != nil {
			return network{}, fmt.Errorf("%s: %w", key, err)
		}
	}
	if !n.subnet.IsValid() || n.mtu == 0 {
		return network{}, fault.Invalidf("FLANNEL_SUBNET or FLANNEL_MTU is missing")
	}
	return n, nil
}

// maxAnswer bounds what is read from the daemon, the policy agent and a subnet file, in bytes.
const maxAnswer = 64 << 10

// question is what a server on this host has been asked.
type question struct {
	conn  *kernel.File
	until time.Time
	plain bool // the answer comes without HTTP, up to the end of the connection
}

// listen connects to the socket beside a port, where our daemon says what it has to say without being asked.
func listen(port int, timeout time.Duration) (*question, error) {
	conn, err := kernel.DialBeside(port, timeout)
	if err != nil {
		return nil, err
	}
	return &question{conn, time.Now().Add(timeout), true}, nil
}

// ask sends a GET request. One request to a loopback address needs none of net/http, which would double the time
// that the plugin takes to start; and while the server thinks, the plugin may do something else.
func ask(to netip.AddrPort, path string, timeout time.Duration) (*question, error) {
	conn, err := kernel.DialLoopback(to, timeout)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte("GET " + path + " HTTP/1.1\r\nHost: " + to.String() + "\r\nUser-Agent: silk-cni\r\nConnection: close\r\n\r\n")); err != nil {
		conn.Close()
		return nil, err
	}
	return &question{conn, time.Now().Add(timeout), false}, nil
}

// Read reads what the server answers until the time is up.
func (q *question) Read(p []byte) (int, error) {
	if time.Now().After(q.until) {
		return 0, os.ErrDeadlineExceeded
	}
	n, err := q.conn.Read(p)
	if errors.Is(err, syscall.EAGAIN) {
		err = os.ErrDeadlineExceeded
	}
	return n, err
}

// answer returns the body of the answer, which must be 200.
func (q *question) answer() ([]byte, error) {
	defer q.conn.Close()
	r := io.LimitReader(q, maxAnswer)
	if !q.plain {
		return readAnswer(r)
	}
	body, err := io.ReadAll(r)
	if err == nil && len(body) == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return body, nil
}

// readAnswer reads an HTTP/1.x answer and returns its body.
func readAnswer(r io.Reader) ([]byte, error) {
	br := bufio.NewReader(r)
	status, err := readLine(br)
	if err != nil {
		return nil, err
	}
	proto, rest, _ := strings.Cut(status, " ")
	code, text, _ := strings.Cut(rest, " ")
	if !strings.HasPrefix(proto, "HTTP/1.") || len(code) != 3 {
		return nil, fault.Invalidf("answer %.40q is not HTTP", status)
	}
	length, chunked := int64(-1), false
	for {
		line, err := readLine(br)
		if err != nil {
			return nil, err
		}
		if line == "" {
			break
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch {
		case strings.EqualFold(name, "Content-Length"):
			if length, err = strconv.ParseInt(value, 10, 64); err != nil || length < 0 {
				return nil, fault.Invalidf("answer has a Content-Length of %.40q", value)
			}
		case strings.EqualFold(name, "Transfer-Encoding"):
			chunked = strings.EqualFold(value, "chunked")
		}
	}
	body, err := readBody(br, length, chunked)
	if err != nil {
		return nil, err
	}
	if code != "200" {
		return nil, fault.Unavailablef("status %s %s: %.200s", code, text, bytes.TrimSpace(body))
	}
	return body, nil
}

func readLine(br *bufio.Reader) (string, error) {
	line, err := br.ReadString('\n')
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return "", fmt.Errorf("read answer: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// readBody reads a body whose end is told by its length, by chunks, or by the end of the connection.
func readBody(br *bufio.Reader, length int64, chunked bool) ([]byte, error) {
	if !chunked {
		if length < 0 {
			return io.ReadAll(br)
		}
		if length > maxAnswer {
			return nil, fault.Invalidf("answer of %d bytes: expected at most %d", length, maxAnswer)
		}
		body := make([]byte, length)
		_, err := io.ReadFull(br, body)
		return body, err
	}
	var body []byte
	for {
		line, err := readLine(br)
		if err != nil {
			return nil, err
		}
		text, _, _ := strings.Cut(line, ";")
		n, err := strconv.ParseUint(strings.TrimSpace(text), 16, 32)
		if err != nil || n > maxAnswer {
			return nil, fault.Invalidf("answer has a chunk of length %.40q", text)
		}
		if n == 0 {
			return body, nil
		}
		chunk := make([]byte, n)
		if _, err := io.ReadFull(br, chunk); err != nil {
			return nil, fmt.Errorf("read answer: %w", err)
		}
		body = append(body, chunk...)
		if _, err := readLine(br); err != nil {
			return nil, err
		}
	}
}
