package registration_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

func addrOf(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

func uuid(i, kind int) string {
	return fmt.Sprintf("%08x-d9cb-469f-a165-%012x", uint32(i)*2654435761, i*16+kind)
}

// large is registration i of a large deployment, where each name has n addresses.
func large(i, n int, seen time.Time) registration.Registration {
	return registration.Registration{
		Name: registration.Name(fmt.Sprintf("app-%05d.apps.internal", i/n)), Address: addrOf(i), Index: i % n, Port: 8080,
		Endpoint: uuid(i, 1), Group: uuid(i/n, 2), Zone: fmt.Sprintf("z%d", i%3), Seen: seen,
	}
}

func fill(tb testing.TB, names, n int) *registration.Table {
	table, now := registration.NewTable(), time.Unix(1_000_000, 0)
	for i := range names * n {
		if isNew, err := table.Add(large(i, n, now)); !isNew || err != nil {
			tb.Fatal(i, isNew, err)
		}
	}
	return table
}

// TestLookupAllocatesNothing: a DNS server asks a hundred thousand times a second.
func TestLookupAllocatesNothing(t *testing.T) {
	table := fill(t, 1000, 2)
	table.Register(reg("*.web.apps.internal", "10.255.0.4", -1))
	dst := make([]netip.Addr, 0, 8)
	for _, name := range []string{"app-00007.apps.internal", "1.app-00007.apps.internal", "a.b.web.apps.internal", "apps.internal", "none.apps.internal", "5.none.apps.internal", strings.Repeat("a.", 126) + "a"} {
		b := []byte(name)
		if n := testing.AllocsPerRun(100, func() { dst, _ = table.AppendAddrs(dst[:0], b) }); n != 0 {
			t.Errorf("%s: a lookup allocates %v times", name, n)
		}
	}
}

// TestRefreshAllocatesNothing: each of a hundred thousand names is told of every 20 seconds.
func TestRefreshAllocatesNothing(t *testing.T) {
	table := fill(t, 1000, 2)
	turn, r := table.Turn(), large(77, 2, time.Unix(2_000_000, 0))
	if n := testing.AllocsPerRun(100, func() { table.Register(r) }); n != 0 {
		t.Errorf("to refresh allocates %v times", n)
	}
	if list, _ := table.Lookup(r.Name); table.Turn() != turn || list[1] != r {
		t.Errorf("after it was refreshed there is %+v, want %+v and the turn of before", list, r)
	}
	r.Port = 9090
	if table.Register(r); table.Turn() == turn {
		t.Error("another port does not change the turn")
	}
}

// TestMemory: what 100,000 names take, and that Size does not say less.
func TestMemory(t *testing.T) {
	for _, n := range []int{1, 2} {
		before := heap()
		table := fill(t, 100_000, n)
		took := int(heap() - before)
		t.Logf("100,000 names of %d addresses take %.1f MiB, Size says %.1f", n, float64(took)/(1<<20), float64(table.Size())/(1<<20))
		if limit := (15 + 20*n) << 20; took > limit {
			t.Errorf("100,000 names of %d addresses take %d bytes, want at most %d", n, took, limit)
		}
		if table.Size() < took*9/10 {
			t.Errorf("the table says that it takes %d bytes, it takes %d", table.Size(), took)
		}
		runtime.KeepAlive(table)
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestLimits(t *testing.T) {
	refused := func(table *registration.Table, r registration.Registration, want fault.Kind) {
		t.Helper()
		size := table.Size()
		names, all := table.Len()
		isNew, err := table.Add(r)
		if n, a := table.Len(); isNew || fault.Of(err) != want || n != names || a != all || table.Size() != size {
			t.Errorf("%.40s: %v, %v, want %v and a table as before", r.Name, isNew, err, want)
		}
	}
	table := registration.NewTableOf(registration.Limits{PerName: 2, Registrations: 3})
	for _, r := range []registration.Registration{reg("a.b", "10.0.0.1", 0), reg("a.b", "10.0.0.2", 0), reg("c", "10.0.0.1", 0)} {
		if _, err := table.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	refused(table, reg("a.b", "10.0.0.3", 0), fault.Exhausted)
	refused(table, reg("d.e", "10.0.0.3", 0), fault.Exhausted)
	if table.Standing([]byte("e")) != registration.Absent {
		t.Error("a name above one that was refused is there")
	}
	if isNew, err := table.Add(reg("a.b", "10.0.0.2", 7)); isNew || err != nil {
		t.Errorf("what is in a full table cannot be refreshed: %v", err)
	}
	table.Unregister("c", netip.MustParseAddr("10.0.0.1"))
	if isNew, err := table.Add(reg("d.e", "::ffff:10.0.0.3", 0)); !isNew || err != nil {
		t.Errorf("room that was left is not used: %v", err)
	}
	for _, r := range []registration.Registration{{}, {Name: "a"}, reg("a", "fe80::1%eth0", 0), {Name: "a", Address: addrOf(1), Zone: strings.Repeat("z", registration.MaxText+1)}} {
		refused(table, r, fault.Invalid)
	}
}

// TestASourceCannotFillTheMemory: names of a hundred parts, each of which counts.
func TestASourceCannotFillTheMemory(t *testing.T) {
	before := heap()
	table := registration.NewTableOf(registration.Limits{Bytes: 8 << 20})
	var err error
	for i := 0; err == nil; i++ {
		_, err = table.Add(registration.Registration{
			Name: registration.Name(fmt.Sprintf("%s%d", strings.Repeat("a"+string(rune('a'+i%26))+".", 80), i)), Address: addrOf(i),
			Endpoint: strings.Repeat("e", 200), Group: strings.Repeat("g", 200), Zone: strings.Repeat("z", 200),
		})
	}
	if took := heap() - before; !errors.Is(err, fault.Exhausted) || took > 12<<20 {
		t.Errorf("a table of at most 8 MiB takes %d bytes, and says %v", took, err)
	}
	runtime.KeepAlive(table)
}

// TestARefreshKeepsToTheLimit: what is there stays fresh in a full table, but grows no more.
func TestARefreshKeepsToTheLimit(t *testing.T) {
	const limit = 1 << 20
	table := registration.NewTableOf(registration.Limits{Bytes: limit})
	n := 0
	for {
		if _, err := table.Add(registration.Registration{Name: registration.Name(fmt.Sprint("a", n)), Address: addrOf(n)}); err != nil {
			break
		}
		n++
	}
	seen := time.Unix(1000, 0)
	refused := 0
	for i := range n {
		r := registration.Registration{Name: registration.Name(fmt.Sprint("a", i)), Address: addrOf(i), Group: strings.Repeat("g", registration.MaxText), Port: 80, Seen: seen}
		switch isNew, err := table.Add(r); {
		case isNew || err != nil && !errors.Is(err, fault.Exhausted):
			t.Fatal(isNew, err)
		case err != nil:
			refused++
		}
		if list, _ := table.Lookup(r.Name); len(list) != 1 || !list[0].Seen.Equal(seen) || list[0].Port != 80 {
			t.Fatalf("what was refreshed is %+v", list)
		}
	}
	if refused == 0 || table.Size() > limit {
		t.Errorf("%d of %d refreshments were refused, the table takes %d bytes, want at most %d", refused, n, table.Size(), limit)
	}
	if names, _ := table.Len(); table.Prune(seen) != 0 || names != n {
		t.Error("names are gone")
	}
}

// TestManyNamesOfOneAddress: a gateway has the names of all that is behind it. To take them away must not take longer for each the more there are.
func TestManyNamesOfOneAddress(t *testing.T) {
	const n = 100_000
	table, old, now := registration.NewTable(), time.Unix(1000, 0), time.Unix(2000, 0)
	gateway := addrOf(1)
	var left []registration.Name
	began := processor(t)
	for i := range n {
		r := registration.Registration{Name: registration.Name(fmt.Sprintf("a%06d.apps.internal", i)), Address: gateway, Seen: old}
		if i%1000 == 0 {
			r.Seen = now
			left = append(left, r.Name)
		}
		for _, a := range []netip.Addr{gateway, addrOf(2 + i)} {
			if r.Address = a; !table.Register(r) {
				t.Fatalf("%s at %v is not new", r.Name, a)
			}
		}
	}
	if got := table.Prune(now); got != 2*(n-len(left)) {
		t.Errorf("%d pruned, want %d", got, 2*(n-len(left)))
	}
	if took := processor(t) - began; took > 15*time.Second {
		t.Errorf("took %v of the processor", took)
	}
	if got := table.NamesOf(gateway); !slices.Equal(got, left) {
		t.Errorf("%d names are left, want the %d that were seen now, in the order in which they came", len(got), len(left))
	}
	for _, name := range left {
		if !table.Unregister(name, gateway) {
			t.Errorf("%s was not there", name)
		}
	}
	if got := table.NamesOf(gateway); len(got) != 0 {
		t.Errorf("%q are left", got)
	}
}

// processor returns how much time of the processor the process has taken.
func processor(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestReadersAndWriters: a name that stays is found at any instant, with the names above it, while others around it come and go.
func TestReadersAndWriters(t *testing.T) {
	table, w := registration.NewTable(), reg("stays.a.b", "10.255.9.9", -1)
	w.Seen = time.Unix(1<<32, 0)
	table.Register(w)
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	for k := range uint64(2) {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(k, 1))
			for i := range 3000 {
				reg := randomRegistration(r, time.Unix(int64(i), 0))
				reg.Name += ".a.b"
				table.Register(reg)
				table.Register(w)
				if i%100 == 0 {
					table.Prune(time.Unix(int64(i), 0))
				}
			}
		})
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if list, ok := table.Lookup("stays.a.b"); !ok || len(list) != 1 || list[0] != w {
					t.Errorf("the name that stays has %v", list)
					return
				}
				if st := table.Standing([]byte("b")); st != registration.Above {
					t.Errorf("the name above the one that stays is %v", st)
					return
				}
				for range table.All() {
					table.NamesOf(addrOf(1))
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}

func BenchmarkAppendAddrs(b *testing.B) {
	table := fill(b, 100_000, 1)
	names := make([][]byte, 1<<12)
	for i := range names {
		names[i] = fmt.Appendf(nil, "app-%05d.apps.internal", i*24)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		dst := make([]netip.Addr, 0, 8)
		for i := 0; pb.Next(); i++ {
			var st registration.Standing
			if dst, st = table.AppendAddrs(dst[:0], names[i%len(names)]); st != registration.Present {
				b.Error(st)
				return
			}
		}
	})
}

func BenchmarkRefresh(b *testing.B) {
	table, now := fill(b, 100_000, 1), time.Unix(2_000_000, 0)
	list := make([]registration.Registration, 1<<12)
	for i := range list {
		list[i] = large(i*24, 1, now)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		table.Register(list[i%len(list)])
	}
}
