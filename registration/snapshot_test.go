package registration_test

import (
	"bytes"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

var everywhere = registration.Ranges{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

func encode(t testing.TB, table *registration.Table, taken, clock time.Time) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := table.Encode(&b, taken, clock); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func randomTable(seed uint64, n int, now time.Time) (*registration.Table, twin) {
	r := rand.New(rand.NewPCG(seed, 6))
	table, w := registration.NewTable(), twin{}
	for range n {
		reg := randomRegistration(r, now.Add(-time.Duration(r.IntN(1000))*time.Second))
		table.Register(reg)
		w.register(reg)
	}
	return table, w
}

func TestSnapshot(t *testing.T) {
	table, w := randomTable(1, 500, at(0))
	b := encode(t, table, at(7), at(0))
	again, taken, err := registration.Decode(bytes.NewReader(b), registration.Limits{}, everywhere, at(5000))
	if err != nil || !taken.Equal(at(7)) {
		t.Fatal(taken, err)
	}
	if other, _ := randomTable(1, 500, at(0)); !bytes.Equal(b, encode(t, other, at(7), at(0))) {
		t.Error("equal tables make different snapshots")
	}
	if !bytes.Equal(encode(t, again, at(7), at(5000)), b) {
		t.Error("a snapshot of what a snapshot was read into is another")
	}
	for i := range w { // by a clock that is 5000 s later, they are as old
		w[i].Seen = w[i].Seen.Add(5000 * sec)
	}
	same(t, again, w)
}

// TestSnapshotLeavesOut: ranges and limits may be others when a snapshot is read.
func TestSnapshotLeavesOut(t *testing.T) {
	table, _ := randomTable(2, 500, at(0))
	b := encode(t, table, at(0), at(0))
	one := registration.Ranges{netip.MustParsePrefix("10.255.0.4/32")}
	got, _, err := registration.Decode(bytes.NewReader(b), registration.Limits{Registrations: 7}, one, at(0))
	if err != nil {
		t.Fatal(err)
	}
	if _, n := got.Len(); n != 7 {
		t.Errorf("%d registrations were read, want 7", n)
	}
	for _, list := range got.All() {
		for _, r := range list {
			if !one.Contains(r.Address) {
				t.Errorf("%v was read", r)
			}
		}
	}
}

// TestSnapshotThatIsNotWhole: whatever is cut, changed or added, none of it is used.
func TestSnapshotThatIsNotWhole(t *testing.T) {
	table, _ := randomTable(3, 12, at(0))
	b := encode(t, table, at(0), at(0))
	refused := func(what string, b []byte) {
		t.Helper()
		if got, _, err := registration.Decode(bytes.NewReader(b), registration.Limits{}, everywhere, at(0)); !errors.Is(err, fault.Invalid) || got != nil {
			t.Errorf("%s: %v, want it to be Invalid", what, err)
		}
	}
	for i := range b {
		refused("cut short", b[:i])
		other := slices.Clone(b)
		other[i] ^= 1 << (i * 5 % 8)
		refused("one bit changed", other)
	}
	refused("more at the end", append(slices.Clone(b), 0))
	refused("twice", slices.Concat(b, b))
	refused("foreign", []byte(`{"names":{}}`))
	refused("empty", nil)
	gap := slices.Clone(b)
	copy(gap[len(gap)/2:], make([]byte, 64)) // blocks that never reached the disk
	refused("a hole", gap)
	sealed := func(body string) []byte {
		b := []byte(body)
		s := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
		return append(b, byte(s>>24), byte(s>>16), byte(s>>8), byte(s))
	}
	if _, _, err := registration.Decode(bytes.NewReader(sealed("silk names 1\n\x00\x00\x00")), registration.Limits{}, everywhere, at(0)); err != nil {
		t.Errorf("an empty snapshot: %v", err)
	}
	for what, body := range map[string]string{
		"another version": "silk names 2\n\x00\x00\x00", "upper case": "silk names 1\n\x00\x01A\x01\x04\x0a\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01",
		"no registrations": "silk names 1\n\x00\x01a\x00\x00\x00", "another count": "silk names 1\n\x00\x00\x01", "long name": "silk names 1\n\x00\xff\xff\xff\xff\x0f",
		"address of 5 bytes": "silk names 1\n\x00\x01a\x01\x05", "number without end": "silk names 1\n" + strings.Repeat("\xff", 20),
	} {
		refused(what, sealed(body))
	}
}

func TestSnapshotSaysWhatWentWrong(t *testing.T) {
	table, _ := randomTable(3, 4000, at(0))
	r, w := io.Pipe()
	r.CloseWithError(io.ErrShortWrite)
	if err := table.Encode(w, at(0), at(0)); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("a snapshot that cannot be written: %v", err)
	}
	if _, _, err := registration.Decode(r, registration.Limits{}, everywhere, at(0)); !errors.Is(err, io.ErrClosedPipe) || errors.Is(err, fault.Invalid) {
		t.Errorf("a snapshot that cannot be read: %v", err)
	}
}

// TestSnapshotTakesLittleMemory: to write one takes the names, to read one what the table takes.
func TestSnapshotTakesLittleMemory(t *testing.T) {
	table := fill(t, 100_000, 1)
	took := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := table.Encode(io.Discard, at(0), at(0)); err != nil {
				b.Fatal(err)
			}
		}
	})
	t.Logf("a snapshot of 100,000 names takes %v, %d bytes, %d allocations", time.Duration(took.NsPerOp()), took.AllocedBytesPerOp(), took.AllocsPerOp())
	if took.AllocedBytesPerOp() > 4<<20 {
		t.Errorf("to write a snapshot of 100,000 names allocates %d bytes", took.AllocedBytesPerOp())
	}
}
