package kernel

import "testing"

func FuzzFlow(f *testing.F) {
	var b Batch
	b.Add(ctGet, 0, ctHeader)
	b.Nest(ctaTupleOrig, func() { b.Nest(ctaTupleIP, func() { b.Attr(ctaIPv4Src, []byte{10, 0, 0, 1}) }) })
	b.Attr(ctaMark, []byte{0, 0, 0, 7})
	f.Add(b.Bytes()[16:])
	f.Fuzz(func(t *testing.T, b []byte) {
		parseFlow(b)
		answered(b)
	})
}
