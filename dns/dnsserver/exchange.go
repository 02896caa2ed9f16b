package dnsserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

var errNoAnswer = errors.New("not an answer to the question")

// exchange asks one resolver, by udp and, if its answer is cut short, by tcp. Each question has a number and a source port of chance (RFC
// 5452), and only an answer from the resolver's address with both, and the same question, is taken.
func (f *forwarder) exchange(ctx context.Context, to netip.AddrPort, q *query) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	ask := f.message(q)
	resp, err := overUDP(ctx, to, ask, q.question)
	if err != nil || resp[2]&(flagTC>>8) == 0 {
		return resp, err
	}
	if whole, err := overTCP(ctx, to, ask, q.question); err == nil {
		return whole, nil
	}
	return resp, nil // better than nothing: the client may try tcp itself
}

// message writes the question for a resolver. Of the client's options none is passed on: they are between it and us (RFC 6891 section
// 6.1.1).
func (f *forwarder) message(q *query) []byte {
	b := make([]byte, headerSize, headerSize+len(q.question)+optSize)
	rand.Read(b[:2])
	binary.BigEndian.PutUint16(b[2:], flagRD|q.flags&(flagAD|flagCD))
	b[5] = 1
	b = append(b, q.question...)
	if q.edns {
		b[11] = 1
		b = append(b, 0, 0, typeOPT, byte(f.size>>8), byte(f.size), 0, 0, 0, 0, 0, 0)
		if q.do {
			b[len(b)-4] = flagDO >> 8
		}
	}
	return b
}

// dial connects to a resolver; the connection is closed when ctx ends. done gives up what that takes.
func dial(ctx context.Context, network string, to netip.AddrPort) (c net.Conn, done func(), err error) {
	c, err = (&net.Dialer{}).DialContext(ctx, network, to.String())
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return c, func() { stop(); c.Close() }, nil
}

func overUDP(ctx context.Context, to netip.AddrPort, ask, question []byte) ([]byte, error) {
	c, done, err := dial(ctx, "udp", to) // connected: the kernel takes packets from there alone
	if err != nil {
		return nil, err
	}
	defer done()
	if _, err := c.Write(ask); err != nil {
		return nil, err
	}
	b := make([]byte, maxUDP)
	for {
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		if resp := b[:n]; matches(resp, ask, question) {
			if !wellFormed(resp) {
				return nil, errNoAnswer
			}
			return resp, nil
		}
	}
}

func overTCP(ctx context.Context, to netip.AddrPort, ask, question []byte) ([]byte, error) {
	c, done, err := dial(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	defer done()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(ask))), ask...)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	if !matches(b, ask, question) || !wellFormed(b) {
		return nil, fmt.Errorf("by tcp: %w", errNoAnswer)
	}
	return b, nil
}

// matches reports whether resp answers what was asked. Some servers write names in lower case.
func matches(resp, ask, question []byte) bool {
	if len(resp) < headerSize || !bytes.Equal(resp[:2], ask[:2]) {
		return false
	}
	flags := binary.BigEndian.Uint16(resp[2:])
	if flags&flagQR == 0 || flags&maskOpcode != 0 {
		return false
	}
	end := headerSize + len(question)
	return binary.BigEndian.Uint16(resp[4:]) == 1 && len(resp) >= end && sameQuestion(resp[headerSize:end], question)
}

// sameQuestion compares but for the case of letters in the name. A length byte is below 64, where no letter is.
func sameQuestion(a, b []byte) bool {
	fixed := len(a) - 4
	if !bytes.Equal(a[fixed:], b[fixed:]) {
		return false
	}
	for i := range a[:fixed] {
		if small(a[i]) != small(b[i]) {
			return false
		}
	}
	return true
}

func small(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}
