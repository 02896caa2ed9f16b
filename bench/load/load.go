// Package load puts load on our servers that costs little beside what is measured: clients that write requests and read answers over TLS with as little
// as HTTP/1.1 allows.
//
// It is no HTTP client for anything else: it knows answers with a Content-Length only.
package load

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Client is one connection to a server, for one goroutine at a time. It writes requests and reads answers with as little as HTTP/1.1 allows, so that
// on a small machine the load costs little beside what is measured.
type Client struct {
	conn *tls.Conn
	r    *bufio.Reader
	out  []byte
	body []byte

	header string
}

// Dial connects to a server at host:port.
func Dial(ctx context.Context, addr string, tc *tls.Config) (*Client, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: tc}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &Client{conn: c.(*tls.Conn), r: bufio.NewReaderSize(c, 4<<10)}, nil
}

// Close ends the connection.
func (c *Client) Close() { c.conn.Close() }

// Header is sent with every request: lines that each end in \r\n.
func (c *Client) Header(lines string) { c.header = lines }

// Send writes one request.
func (c *Client) Send(method, path, body string) error {
	b := append(c.out[:0], method...)
	b = append(b, ' ')
	b = append(b, path...)
	b = append(b, " HTTP/1.1\r\nHost: silk\r\n"...)
	b = append(b, c.header...)
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	c.out = append(b, body...)
	_, err := c.conn.Write(c.out)
	return err
}

// Receive reads one answer; its body is valid until the next one.
func (c *Client) Receive() (status int, body []byte, err error) {
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return 0, nil, err
	}
	if len(line) < 12 {
		return 0, nil, fmt.Errorf("answer begins with %q", line)
	}
	if status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return 0, nil, err
	}
	length := -1
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return 0, nil, err
		}
		if len(line) <= 2 {
			break
		}
		if v, ok := strings.CutPrefix(string(line), "Content-Length: "); ok {
			if length, err = strconv.Atoi(textproto.TrimString(v)); err != nil {
				return 0, nil, err
			}
		}
	}
	if length < 0 {
		return 0, nil, errors.New("answer has no Content-Length")
	}
	if cap(c.body) < length {
		c.body = make([]byte, length)
	}
	body = c.body[:length]
	_, err = io.ReadFull(c.r, body)
	return status, body, err
}

// Call is Send and Receive; an answer that is not 200 is an error.
func (c *Client) Call(method, path, body string) ([]byte, error) {
	if err := c.Send(method, path, body); err != nil {
		return nil, err
	}
	status, b, err := c.Receive()
	if err == nil && status != 200 {
		err = fmt.Errorf("%s %s %s: %d %s", method, path, body, status, b)
	}
	return b, err
}

// Load is several clients of one server.
type Load struct{ Clients []*Client }

// DialAll connects n clients, a few at a time, and lets each do then: a connection that sends nothing is soon closed.
func DialAll(ctx context.Context, addr string, tc *tls.Config, n int, then func(c *Client) error) (*Load, error) {
	l := &Load{Clients: make([]*Client, n)}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for w := range errs {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				c, err := Dial(ctx, addr, tc)
				if err == nil {
					l.Clients[i] = c
					err = then(c)
				}
				if err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Close ends all connections.
func (l *Load) Close() {
	for _, c := range l.Clients {
		if c != nil {
			c.Close()
		}
	}
}

// Each calls do for 0 to n-1, spread over the clients.
func (l *Load) Each(n int, do func(c *Client, i int) error) error {
	var next atomic.Int64
	return l.All(func(_ int, c *Client) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= n {
				return nil
			}
			if err := do(c, i); err != nil {
				return err
			}
		}
	})
}

// During calls do on all clients, over and over for d, and returns calls per second. k counts the calls of one client.
func (l *Load) During(d time.Duration, do func(c *Client, who, k int) error) (float64, error) {
	start := time.Now()
	var calls atomic.Int64
	err := l.All(func(who int, c *Client) error {
		k := 0
		for ; time.Since(start) < d; k++ {
			if err := do(c, who, k); err != nil {
				return err
			}
		}
		calls.Add(int64(k))
		return nil
	})
	return float64(calls.Load()) / time.Since(start).Seconds(), err
}

// All calls f with all clients at once.
func (l *Load) All(f func(who int, c *Client) error) error {
	errs := make([]error, len(l.Clients))
	var wg sync.WaitGroup
	for i, c := range l.Clients {
		wg.Go(func() { errs[i] = f(i, c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
