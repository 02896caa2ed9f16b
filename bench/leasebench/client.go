package leasebench

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

// client is one connection to a controller. It writes requests and reads answers with as little as HTTP/1.1 allows, so that
// on a small machine the load costs little beside what is measured.
type client struct {
	conn *tls.Conn
	r    *bufio.Reader
	out  []byte
	body []byte
}

func dial(ctx context.Context, addr string, tc *tls.Config) (*client, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: tc}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{conn: c.(*tls.Conn), r: bufio.NewReaderSize(c, 4<<10)}, nil
}

func (c *client) close() { c.conn.Close() }

// send writes one request.
func (c *client) send(method, path, body string) error {
	b := append(c.out[:0], method...)
	b = append(b, ' ')
	b = append(b, path...)
	b = append(b, " HTTP/1.1\r\nHost: silk\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	c.out = append(b, body...)
	_, err := c.conn.Write(c.out)
	return err
}

// receive reads one answer; its body is valid until the next one.
func (c *client) receive() (status int, body []byte, err error) {
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

// call is send and receive; an answer that is not 200 is an error.
func (c *client) call(method, path, body string) ([]byte, error) {
	if err := c.send(method, path, body); err != nil {
		return nil, err
	}
	status, b, err := c.receive()
	if err == nil && status != 200 {
		err = fmt.Errorf("%s %s %s: %d %s", method, path, body, status, b)
	}
	return b, err
}

// load is several clients of one controller.
type load struct{ clients []*client }

// dialAll connects n clients, a few at a time, and lets each do then: a connection that sends nothing is soon closed.
func dialAll(ctx context.Context, addr string, tc *tls.Config, n int, then func(c *client) error) (*load, error) {
	l := &load{clients: make([]*client, n)}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for w := range errs {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				c, err := dial(ctx, addr, tc)
				if err == nil {
					l.clients[i] = c
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
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *load) close() {
	for _, c := range l.clients {
		if c != nil {
			c.close()
		}
	}
}

// each calls do for 0 to n-1, spread over the clients.
func (l *load) each(n int, do func(c *client, i int) error) error {
	var next atomic.Int64
	return l.all(func(_ int, c *client) error {
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

// during calls do on all clients, over and over for d, and returns calls per second. k counts the calls of one client.
func (l *load) during(d time.Duration, do func(c *client, who, k int) error) (float64, error) {
	start := time.Now()
	var calls atomic.Int64
	err := l.all(func(who int, c *client) error {
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

func (l *load) all(f func(who int, c *client) error) error {
	errs := make([]error, len(l.clients))
	var wg sync.WaitGroup
	for i, c := range l.clients {
		wg.Go(func() { errs[i] = f(i, c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
