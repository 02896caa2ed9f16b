package kernel

import "testing"

func FuzzFlowEnd(f *testing.F) {
	var b Batch
	b.Add(ctDelete, 0, ctHeader)
	for _, tuple := range []uint16{ctaTupleOrig, ctaTupleReply} {
		b.Nest(tuple, func() {
			b.Nest(ctaTupleIP, func() { b.Attr(ctaIPv4Src, []byte{10, 0, 0, 1}) })
			b.Nest(ctaTupleProto, func() {
				b.Attr(ctaProtoNum, []byte{1})
				b.Attr(ctaICMPID, []byte{1, 2})
				b.Attr(ctaICMPType, []byte{8})
			})
		})
	}
	b.Nest(ctaCountersOrig, func() { b.Attr(ctaPackets, make([]byte, 8)) })
	b.Nest(ctaTimestamp, func() { b.Attr(ctaBegun, []byte{0, 1, 2, 3, 4, 5, 6, 7}) })
	b.Nest(ctaProtoInfo, func() { b.Nest(ctaTCP, func() { b.Attr(ctaTCPState, []byte{7}) }) })
	f.Add(b.Bytes()[16:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, ok := parseFlowEnd(b); ok {
			(FlowTimeouts{}).LastPacket(e)
		}
	})
}

func FuzzLoggedPacket(f *testing.F) {
	var b Batch
	b.Add(logPacket, 0, []byte{2, 0, 0x12, 0x5c})
	b.String(logPrefix, "silk ok c2c ")
	b.Attr(logMark, []byte{0, 0, 0, 7})
	b.Attr(logSeq, []byte{0, 0, 0, 1})
	b.Attr(logPayload, []byte{0x45, 0})
	f.Add(b.Bytes()[16:])
	f.Fuzz(func(t *testing.T, b []byte) { parseLogged(b, Text) })
}
