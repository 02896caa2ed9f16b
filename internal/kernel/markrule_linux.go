package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// MarkRule is a routing rule that looks at the marks of packets.
type MarkRule struct{ Priority, Mark, Mask uint32 }

// String returns the rule as ip writes it.
func (r MarkRule) String() string {
	return fmt.Sprintf("%d: fwmark 0x%x/0x%x", r.Priority, r.Mark, r.Mask)
}

// MarkRules returns the IPv4 routing rules that look at any of the bits of a packet's mark. c is an rtnetlink socket.
func (c *Conn) MarkRules(bits uint32) ([]MarkRule, error) {
	h := make([]byte, unix.SizeofRtMsg) // a fib_rule_hdr is as long
	h[0] = unix.AF_INET
	var b Batch
	b.Add(unix.RTM_GETRULE, 0, h)
	var rules []MarkRule
	err := c.Dump(&b, func() { rules = nil }, func(m Message) error {
		if r, ok := ParseMarkRule(m.Body); ok && r.Mask&bits != 0 {
			rules = append(rules, r)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list routing rules: %w", err)
	}
	return rules, nil
}

// ParseMarkRule reads a fib_rule_hdr. It is ok for a rule that looks at marks.
func ParseMarkRule(b []byte) (r MarkRule, ok bool) {
	if len(b) < unix.SizeofRtMsg {
		return MarkRule{}, false
	}
	r.Mask = ^uint32(0)
	for t, v := range Attrs(b[unix.SizeofRtMsg:]) {
		switch t {
		case unix.FRA_PRIORITY:
			r.Priority = Uint32(v)
		case unix.FRA_FWMARK:
			r.Mark, ok = Uint32(v), true
		case unix.FRA_FWMASK:
			r.Mask = Uint32(v)
		}
	}
	return r, ok
}
