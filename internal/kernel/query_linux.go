package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Answer is what the kernel says to one request of a Query: a message, or a refusal.
type Answer struct {
	Message
	Err *RequestError
}

// Query sends the requests in b, each of which asks for a single object, at once and returns an answer for each. The
// second result is a failure of the conversation itself.
func (c *Conn) Query(b *Batch) ([]Answer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b.finish()
	base := c.seq + 1
	for i, o := range b.offs {
		ne.PutUint32(b.buf[o+8:], base+uint32(i))
		ne.PutUint16(b.buf[o+6:], ne.Uint16(b.buf[o+6:])|unix.NLM_F_ACK)
	}
	c.seq += uint32(len(b.offs))
	if err := unix.Sendto(c.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send to netlink: %w", err)
	}
	answers := make([]Answer, len(b.offs))
	err := c.receive(base, c.seq, func(typ, _ uint16, seq uint32, body []byte) error {
		i := int(seq - base)
		switch {
		case i < 0 || i >= len(answers):
		case typ == unix.NLMSG_ERROR:
			answers[i].Err = requestError(body, i)
		default:
			answers[i].Message = Message{Type: typ, Body: append([]byte(nil), body...)}
		}
		return nil
	})
	return answers, err
}
