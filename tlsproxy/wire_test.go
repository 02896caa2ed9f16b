package tlsproxy

import (
	"math/rand/v2"
	"testing"
)

// TestNoReadGoesBeyondARecord, whatever the pieces are in which it is read.
func TestNoReadGoesBeyondARecord(t *testing.T) {
	var stream []byte
	ends := map[int]bool{0: true} // of headers and of records
	for _, n := range []int{1, 0, 512, 16401, 0, 65535, 3} {
		stream = append(stream, 23, 3, 3, byte(n>>8), byte(n))
		ends[len(stream)] = true
		stream = append(stream, make([]byte, n)...)
		ends[len(stream)] = true
	}
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var f frame
		for at := 0; at < len(stream); {
			n := f.within(1 + rng.IntN(len(stream)-at))
			if n < 1 {
				t.Fatalf("no progress at %d", at)
			}
			for i := at + 1; i < at+n; i++ {
				if ends[i] {
					t.Fatalf("a read of %d bytes at %d goes beyond %d", n, at, i)
				}
			}
			f.pass(stream[at : at+n])
			at += n
		}
		if f.have != 0 || f.left != 0 {
			t.Fatalf("after whole records: %+v", f)
		}
	}
}
