package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_log.h; x/sys/unix has no names for them.
const (
	logPacket, logConfig = unix.NFNL_SUBSYS_ULOG << 8, unix.NFNL_SUBSYS_ULOG<<8 | 1 // NFULNL_MSG_*

	logCfgCommand, logCfgMode, logCfgBuffer, logCfgTimeout, logCfgThreshold, logCfgFlags = 1, 2, 3, 4, 5, 6 // NFULA_CFG_*

	logBind, logCopyPacket, logNumbered = 1, 2, 1 // NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET, NFULNL_CFG_F_SEQ

	logMark, logIn, logOut, logPayload, logPrefix, logSeq = 2, 4, 5, 9, 10, 12 // NFULA_*
)

// The kernel gathers packets until so many are there or so much time has passed, and sends them at once: nobody is woken for each.
const (
	logGather  = 50       // packets
	logWait    = 5        // hundredths of a second
	logPackets = 16 << 10 // bytes of one datagram
)

// LoggedPacket is a packet that a rule logged.
type LoggedPacket struct {
	Prefix  string
	Mark    uint32
	In, Out uint32 // numbers of the devices, 0 for none
	Data    []byte // from the network header on, as much as the rule says; valid until the next Read
}

// PacketLog receives what rules of a namespace log to one NFLOG group. It never holds a packet up: what it does not read in time
// is lost and counted. Read is not to be called twice at a time; Close and Lost may be called at any time.
type PacketLog struct {
	e    *events
	next uint32 // number of the next packet
	lost atomic.Uint64

	prefixes map[string]string // there are few: no string is made for each packet
}

// OpenPacketLog listens to a group in ns, nil for the calling thread's namespace. Conflict: somebody else does.
func OpenPacketLog(ns *NS, group uint16) (*PacketLog, error) {
	c, err := dial(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	var b Batch
	config := func(attr uint16, value ...byte) {
		b.Add(logConfig, 0, []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(group >> 8), byte(group)})
		b.Attr(attr, value)
	}
	config(logCfgCommand, logBind)
	config(logCfgMode, 0, 0, 0xff, 0xff, logCopyPacket, 0) // as much as rules say: struct nfulnl_msg_config_mode
	config(logCfgBuffer, binary.BigEndian.AppendUint32(nil, logPackets)...)
	config(logCfgTimeout, binary.BigEndian.AppendUint32(nil, logWait)...)
	config(logCfgThreshold, binary.BigEndian.AppendUint32(nil, logGather)...)
	config(logCfgFlags, 0, logNumbered)
	refused, err := c.Do(&b)
	for _, r := range refused {
		if errors.Is(r, unix.EBUSY) || errors.Is(r, unix.EPERM) {
			err = fault.Conflictf("another process listens in this network namespace, or CAP_NET_ADMIN is missing: %w", r)
			break
		}
		err = errors.Join(err, r)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("listen to NFLOG group %d: %w", group, err)
	}
	e, err := newEvents(c.release())
	if err != nil {
		return nil, err
	}
	return &PacketLog{e: e, prefixes: map[string]string{}}, nil
}

// Close ends a Read with os.ErrClosed. Packets pass as before; nothing is logged any more.
func (p *PacketLog) Close() error { return p.e.Close() }

// Lost returns how many packets were logged but not read, for lack of room.
func (p *PacketLog) Lost() uint64 { return p.lost.Load() }

// Read waits for logged packets and calls each for those that are there.
func (p *PacketLog) Read(each func(LoggedPacket)) error {
	return p.e.read(func(m Message) {
		if m.Type != logPacket {
			return
		}
		l, seq, numbered := parseLogged(m.Body, p.prefix)
		if numbered {
			if gap := seq - p.next; gap < 1<<31 {
				p.lost.Add(uint64(gap))
				p.next = seq + 1
			}
		}
		each(l)
	})
}

// maxPrefixes bounds how many prefixes are remembered.
const maxPrefixes = 4096

func (p *PacketLog) prefix(b []byte) string {
	if s, ok := p.prefixes[string(b)]; ok { // does not allocate
		return s
	}
	if len(p.prefixes) >= maxPrefixes {
		clear(p.prefixes)
	}
	s := Text(b)
	p.prefixes[string(b)] = s
	return s
}

// parseLogged reads a logged packet. text makes strings.
func parseLogged(body []byte, text func([]byte) string) (l LoggedPacket, seq uint32, numbered bool) {
	for t, v := range Attrs(body[min(4, len(body)):]) { // after a nfgenmsg
		switch t {
		case logPrefix:
			l.Prefix = text(v)
		case logPayload:
			l.Data = v
		case logMark, logIn, logOut, logSeq:
			if len(v) != 4 {
				continue
			}
			switch n := binary.BigEndian.Uint32(v); t {
			case logMark:
				l.Mark = n
			case logIn:
				l.In = n
			case logOut:
				l.Out = n
			case logSeq:
				seq, numbered = n, true
			}
		}
	}
	return l, seq, numbered
}
