package nft

import (
	"context"
	"encoding/binary"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Stats reads the counters. Reasons that nothing was refused for are there with 0.
func (t *Table) Stats(ctx context.Context) (Stats, error) {
	if err := ctx.Err(); err != nil {
		return Stats{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Stats{Refused: map[Reason]uint64{}, Owned: t.owned}
	if t.last != nil {
		s.Elements = t.last.elements()
	}
	for _, r := range refusals {
		s.Refused[r.reason] = 0
	}
	unlogged := int64(0)
	err := (&state{meanwhile: t.heard.hear}).dump(t.nf, "counters", unix.NFT_MSG_GETOBJ, func() {}, func(m kernel.Message) error {
		name, packets := parseCounter(m.Body)
		if _, ours := s.Refused[Reason(name)]; ours {
			s.Refused[Reason(name)] = packets
		}
		switch name {
		case countDenied, countUDP:
			unlogged += int64(packets)
		case countDeniedSent, countUDPSent:
			unlogged -= int64(packets)
		}
		return nil
	})
	s.Unlogged = uint64(max(unlogged, 0)) // they are not read at one instant
	return s, err
}

// parseCounter reads a named counter.
func parseCounter(body []byte) (name string, packets uint64) {
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_OBJ_NAME:
			name = kernel.Text(v)
		case unix.NFTA_OBJ_DATA:
			for t, v := range kernel.Attrs(v) {
				if t == unix.NFTA_COUNTER_PACKETS && len(v) == 8 {
					packets = binary.BigEndian.Uint64(v)
				}
			}
		}
	}
	return name, packets
}
