package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
)

const (
	probeTime = time.Second // for a connection, and for a request and its answer
	dials     = 64          // connections being made at once
	asks      = 2           // requests at once: more would measure how they get in each other's way
)

// turns bounds how much of a measurement happens at once.
type turns struct{ dial, ask chan struct{} }

func newTurns() turns { return turns{make(chan struct{}, dials), make(chan struct{}, asks)} }

// measure lets every attached container ask every other one for its name, over HTTP from within its namespace.
func (s *supervisor) measure(ctx context.Context, containers []Container) []Path {
	var attached []Container
	for _, c := range containers {
		if c.Address.IsValid() {
			attached = append(attached, c)
		}
	}
	paths := make([]Path, 0, len(attached)*max(len(attached)-1, 0))
	for _, from := range attached {
		for _, to := range attached {
			if from.Name != to.Name {
				paths = append(paths, Path{From: from.Name, To: to.Name})
			}
		}
	}
	t := newTurns()
	var wg sync.WaitGroup
	for i, from := range attached {
		wg.Go(func() {
			mine := paths[i*(len(attached)-1) : (i+1)*(len(attached)-1)]
			if err := s.measureFrom(ctx, from, attached, mine, t); err != nil {
				for k := range mine {
					if !mine[k].OK && mine[k].Error == "" {
						mine[k].Error = err.Error()
					}
				}
			}
		})
	}
	wg.Wait()
	return paths
}

func (s *supervisor) measureFrom(ctx context.Context, from Container, all []Container, paths []Path, t turns) error {
	addrs := map[string]netip.Addr{}
	for _, c := range all {
		addrs[c.Name] = c.Address
	}
	return s.fromContainer(from, func(ns *kernel.NS) error {
		var wg sync.WaitGroup
		for k := range paths {
			p := &paths[k]
			wg.Go(func() {
				var err error
				if p.Time, err = t.probe(ctx, ns, netip.AddrPortFrom(addrs[p.To], HTTPPort), p.To); err != nil {
					p.Error = err.Error()
				}
				p.OK = err == nil
			})
		}
		wg.Wait()
		return nil
	})
}

// fromContainer calls fn with the network namespace of a container.
func (s *supervisor) fromContainer(c Container, fn func(*kernel.NS) error) error {
	n, err := s.node(c.Host)
	if err != nil {
		return err
	}
	var ns *kernel.NS
	err = n.use(func(sp *space) error {
		return sp.do(func() (err error) { ns, err = kernel.OpenNS(netnsPath(c.Name)); return err })
	})
	if err != nil {
		return err
	}
	defer ns.Close()
	return fn(ns)
}

// probe asks the responder at addr for its name, on a connection from within ns, and returns how long the answer took.
func (t turns) probe(ctx context.Context, ns *kernel.NS, addr netip.AddrPort, name string) (time.Duration, error) {
	c, err := t.connect(ctx, ns, addr.String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	t.ask <- struct{}{}
	defer func() { <-t.ask }()
	begun := time.Now()
	c.SetDeadline(begun.Add(probeTime))
	fmt.Fprintf(c, "GET / HTTP/1.0\r\nHost: %s\r\n\r\n", name)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err != nil {
		return 0, err
	}
	took := time.Since(begun)
	if got := strings.TrimSpace(string(b)); got != name {
		return 0, fmt.Errorf("%v answers as %q, expected %q", addr, got, name)
	}
	return took, nil
}

func (t turns) connect(ctx context.Context, ns *kernel.NS, addr string) (c net.Conn, err error) {
	t.dial <- struct{}{}
	defer func() { <-t.dial }()
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	err = ns.Do(func() error {
		for patience := probeTime / 8; ; patience *= 2 { // the kernel repeats a first packet that is lost, as in a network that is still forming, after a second only
			d := net.Dialer{Timeout: patience}
			if c, err = d.DialContext(ctx, "tcp", addr); err == nil || !os.IsTimeout(err) || ctx.Err() != nil {
				return err
			}
		}
	})
	return c, err
}
