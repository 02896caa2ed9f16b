package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// DialNetfilter opens a netfilter netlink socket in ns, nil for the calling thread's namespace. Dump and Get work on it
// as on an rtnetlink socket; changes to nftables go through Transact.
func DialNetfilter(ns *NS) (*Conn, error) { return dial(ns, unix.NETLINK_NETFILTER) }

// NFTables returns the type of an nftables message (NFT_MSG_*).
func NFTables(msg uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | msg }

// NFGen returns an nfgenmsg: the family (NFPROTO_*) of the table that a request is about.
func NFGen(family uint8) []byte { return []byte{family, unix.NFNETLINK_V0, 0, 0} }

// nfBatch returns the message that begins or ends a transaction on nftables.
func nfBatch(typ uint16, seq uint32, attrs []byte) []byte {
	h := ne.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+4+len(attrs)))
	h = ne.AppendUint16(h, typ)
	h = ne.AppendUint16(h, unix.NLM_F_REQUEST)
	h = ne.AppendUint32(h, seq)
	h = ne.AppendUint32(h, 0)
	h = append(h, unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES)
	return append(h, attrs...)
}

// ErrGeneration is a transaction refused because nftables changed since the generation it was based on.
var ErrGeneration = errors.New("nftables changed meanwhile")

// Transact carries out all requests of b, made of nftables messages, or none of them. With a generation other than 0 (see
// Generation) it does so only if nothing in nftables has changed since, and fails with ErrGeneration otherwise. A refusal
// is a *RequestError for the first request that was refused. The whole batch must fit the socket buffer: some 100 KiB.
func (c *Conn) Transact(b *Batch, generation uint32) error {
	if b.Len() == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b.finish()
	var gen []byte
	if generation != 0 {
		gen = binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, generation)
		ne.PutUint16(gen, 8)
		ne.PutUint16(gen[2:], unix.NFNL_BATCH_GENID)
	}
	begin := c.seq + 1
	c.seq += uint32(b.Len()) + 2
	last := c.seq - 1
	buf := nfBatch(unix.NFNL_MSG_BATCH_BEGIN, begin, gen)
	head := len(buf)
	buf = append(buf, b.buf...)
	for i, o := range b.offs {
		o += head
		ne.PutUint32(buf[o+8:], begin+1+uint32(i))
		fl := ne.Uint16(buf[o+6:]) &^ unix.NLM_F_ACK
		if i == b.Len()-1 {
			fl |= unix.NLM_F_ACK
		}
		ne.PutUint16(buf[o+6:], fl)
	}
	buf = append(buf, nfBatch(unix.NFNL_MSG_BATCH_END, c.seq, nil)...)
	if err := unix.Sendto(c.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netfilter: %w", err)
	}
	return c.verdict(begin, last)
}

// errBatch ends a conversation when the transaction as a whole was refused: then nothing else is answered.
var errBatch = errors.New("transaction refused")

func (c *Conn) verdict(begin, last uint32) error {
	var failed *RequestError
	whole := false
	err := c.receive(begin, last, func(typ, _ uint16, seq uint32, body []byte) error {
		if typ != unix.NLMSG_ERROR {
			return nil
		}
		e := requestError(body, 0)
		if e == nil {
			return nil
		}
		if e.Index = int(seq-begin) - 1; failed == nil {
			failed = e
		}
		if seq == begin {
			whole = true
			return errBatch
		}
		return nil
	})
	switch {
	case whole && errors.Is(failed, unix.ERESTART):
		return ErrGeneration
	case failed != nil:
		return failed
	}
	return err
}

// Generation returns the number of the current state of nftables in the socket's namespace. It changes with every
// transaction, whoever made it.
func (c *Conn) Generation() (uint32, error) {
	var b Batch
	b.Add(NFTables(unix.NFT_MSG_GETGEN), 0, NFGen(unix.AF_UNSPEC))
	var gen uint32
	err := c.Get(&b, func(m Message) error {
		if len(m.Body) < 4 {
			return nil
		}
		for t, v := range Attrs(m.Body[4:]) {
			if t == unix.NFTA_GEN_ID && len(v) == 4 {
				gen = binary.BigEndian.Uint32(v)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of nftables: %w", err)
	}
	return gen, nil
}
