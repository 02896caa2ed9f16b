package lease_test

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

// twin is a registry as one would write it without a thought for speed: it looks at every row and every member of the pool.
type twin struct {
	pool  lease.Pool
	t     lease.Terms
	rows  []lease.Row
	freed map[netip.Prefix]int64
	next  int64
}

func (w *twin) of(h netip.Addr) *lease.Row {
	for i := range w.rows {
		if w.rows[i].Lease.Underlay == h {
			return &w.rows[i]
		}
	}
	return nil
}

func (w *twin) overlaps(p netip.Prefix) bool {
	return slices.ContainsFunc(w.rows, func(r lease.Row) bool { return r.Lease.Subnet.Overlaps(p) })
}

func (w *twin) drop(id int64) {
	i := slices.IndexFunc(w.rows, func(r lease.Row) bool { return r.ID == id })
	w.freed[w.rows[i].Lease.Subnet] = w.t.Now
	w.rows = slices.Delete(w.rows, i, i+1)
}

func (w *twin) add(l lease.Lease) {
	w.next++
	delete(w.freed, l.Subnet)
	w.rows = append(w.rows, lease.Row{ID: w.next, Lease: l, RenewedAt: w.t.Now})
}

// mayGive says whether a subnet is one of those that a host may be given now.
func (w *twin) mayGive(k lease.Kind, p netip.Prefix) error {
	kind, _, member := w.pool.Index(p)
	if !member || kind != k {
		return fmt.Errorf("%v is no %v of the pool", p, k)
	}
	var neverUsed, free bool
	oldest := int64(1 << 62)
	for i := range w.pool.Size(k) {
		m := w.pool.At(k, i)
		if w.overlaps(m) {
			continue
		}
		free = true
		at, was := w.freed[m]
		neverUsed = neverUsed || !was
		if was {
			oldest = min(oldest, at)
		}
	}
	at, was := w.freed[p]
	switch {
	case w.overlaps(p) && free:
		return fmt.Errorf("%v is held, and others are free", p)
	case w.overlaps(p):
		i := slices.IndexFunc(w.rows, func(r lease.Row) bool { return r.Lease.Subnet == p })
		if i < 0 || !w.t.Expired(w.rows[i]) {
			return fmt.Errorf("%v is held and has not expired", p)
		}
		for _, r := range w.rows {
			if kind, _, member := w.pool.Index(r.Lease.Subnet); member && kind == k && w.t.Expired(r) && r.RenewedAt < w.rows[i].RenewedAt {
				return fmt.Errorf("%v expired after %v", p, r.Lease.Subnet)
			}
		}
	case was && neverUsed:
		return fmt.Errorf("%v was used before, and others were not", p)
	case was && at != oldest:
		return fmt.Errorf("%v was freed at %d, another at %d", p, at, oldest)
	}
	return nil
}

func (w *twin) canGive(k lease.Kind) bool {
	for i := range w.pool.Size(k) {
		p := w.pool.At(k, i)
		if !w.overlaps(p) || w.mayGive(k, p) == nil {
			return true
		}
	}
	return false
}

// apply does to the twin what Decide says, and checks that it may be said.
func (w *twin) apply(q lease.Request, v lease.Verdict) error {
	row := w.of(q.Lease.Underlay)
	switch q.Op {
	case lease.Release:
		if row != nil {
			w.drop(row.ID)
		}
		return v.Err
	case lease.Renew:
		legal := row != nil && row.Lease == q.Lease || row == nil && q.Lease.Validate() == nil && w.pool.Contains(q.Lease.Subnet) && !w.overlaps(q.Lease.Subnet)
		if legal != (v.Err == nil) || !legal && !errors.Is(v.Err, fault.Conflict) {
			return fmt.Errorf("legal %v, verdict %w", legal, v.Err)
		}
		if row != nil && legal && (w.t.Now-row.RenewedAt >= w.t.Fresh || w.t.Expired(*row)) {
			row.RenewedAt = w.t.Now
		} else if row == nil && legal {
			w.add(q.Lease)
		}
		return nil
	}
	if row != nil && w.pool.Contains(row.Lease.Subnet) {
		if v.Err != nil || v.Lease != row.Lease {
			return fmt.Errorf("has %v, verdict %v %w", row.Lease, v.Lease, v.Err)
		}
		if w.t.Now-row.RenewedAt >= w.t.Fresh || w.t.Expired(*row) {
			row.RenewedAt = w.t.Now
		}
		return nil
	}
	if v.Err != nil {
		if !errors.Is(v.Err, fault.Exhausted) || w.canGive(q.Kind) {
			return fmt.Errorf("there is something to give, verdict %w", v.Err)
		}
		return nil
	}
	if err := w.mayGive(q.Kind, v.Lease.Subnet); err != nil {
		return err
	}
	if row != nil {
		w.drop(row.ID)
	}
	if i := slices.IndexFunc(w.rows, func(r lease.Row) bool { return r.Lease.Subnet == v.Lease.Subnet }); i >= 0 {
		w.drop(w.rows[i].ID)
	}
	w.add(v.Lease)
	return nil
}

// TestDecideAgreesWithDumbTwin walks at random through batches of requests, with transactions that fail, foreign rows and leases that expire.
func TestDecideAgreesWithDumbTwin(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { walk(t, rand.New(rand.NewPCG(7, seed))) })
	}
}

func walk(t *testing.T, rnd *rand.Rand) {
	pool, err := lease.NewPool(netip.MustParsePrefix("10.255.0.0/25"), 29) // 15 blocks, 7 addresses
	if err != nil {
		t.Fatal(err)
	}
	w := &twin{pool: pool, t: lease.Terms{Now: 1000, Expiration: 100, Fresh: 5}, freed: map[netip.Prefix]int64{}}
	g := lease.NewLedger(pool)
	store := map[int64]lease.Row{} // what a database would hold
	next := int64(0)
	for step := range 120 {
		w.t.Now += rnd.Int64N(15)
		if rnd.IntN(6) == 0 { // a controller of another network's pool
			l := of(fmt.Sprintf("10.9.9.%d", rnd.IntN(4)), []string{"10.255.0.64/27", "10.255.0.32/28", "10.1.0.0/24", "10.255.0.26/32"}[rnd.IntN(4)])
			if w.of(l.Underlay) == nil && !w.overlaps(l.Subnet) {
				w.add(l)
				store[w.next] = w.rows[len(w.rows)-1]
			}
		}
		next = w.next
		lease.Difference(g, w.t, w.rows)
		g.Commit(uint64(2*step + 1))
		var requests []lease.Request
		for range 1 + rnd.IntN(6) {
			h := netip.AddrFrom4([4]byte{10, 9, 9, byte(rnd.IntN(30))})
			l := lease.Lease{Underlay: h}
			op := lease.Op(rnd.IntN(3))
			if r := w.of(h); op == lease.Renew && r != nil && rnd.IntN(3) > 0 {
				l = r.Lease
			} else if op == lease.Renew {
				k := lease.Kind(rnd.IntN(2))
				l.Subnet = pool.At(k, rnd.Uint64N(pool.Size(k)))
				l.MAC = lease.MACOf(l.Subnet)
			}
			requests = append(requests, lease.Request{Op: op, Lease: l, Kind: lease.Kind(rnd.IntN(2))})
		}
		expired := slices.DeleteFunc(slices.Clone(w.rows), func(r lease.Row) bool { return !w.t.Expired(r) })
		slices.SortStableFunc(expired, func(a, b lease.Row) int { return cmp.Compare(a.RenewedAt, b.RenewedAt) })
		rows := slices.Clone(w.rows)
		d := lease.Decide(g, w.t, rows, expired, requests)
		if rnd.IntN(3) == 0 { // the transaction fails and is tried again
			g.Rollback()
			if again := lease.Decide(g, w.t, rows, expired, requests); !slices.EqualFunc(again.Verdicts, d.Verdicts, func(a, b lease.Verdict) bool {
				return a.Lease == b.Lease && fault.Of(a.Err) == fault.Of(b.Err)
			}) {
				t.Fatalf("step %d: other verdicts after a rollback: %v, were %v", step, again.Verdicts, d.Verdicts)
			} else {
				d = again
			}
		}
		g.Commit(uint64(2*step + 2))
		for i, q := range requests {
			if err := w.apply(q, d.Verdicts[i]); err != nil {
				t.Fatalf("step %d, request %d %+v: %v\nrows %v\nfreed %v", step, i, q, err, w.rows, w.freed)
			}
		}
		for _, id := range append(d.Delete, d.Reclaim...) {
			delete(store, id)
		}
		for _, id := range d.Touch {
			r := store[id]
			r.RenewedAt = w.t.Now
			store[id] = r
		}
		for _, l := range d.Insert {
			next++
			store[next+1<<32] = lease.Row{Lease: l, RenewedAt: w.t.Now}
		}
		same(t, step, w, store)
		// Number what was inserted as the twin does.
		store = map[int64]lease.Row{}
		for _, r := range w.rows {
			store[r.ID] = r
		}
		checkLedger(t, step, w, g)
	}
}

// same compares the rows that a store has with the twin's.
func same(t *testing.T, step int, w *twin, store map[int64]lease.Row) {
	t.Helper()
	flat := func(rows []lease.Row) []string {
		var all []string
		for _, r := range rows {
			all = append(all, fmt.Sprint(r.Lease, r.RenewedAt))
		}
		slices.Sort(all)
		return all
	}
	var stored []lease.Row
	for _, r := range store {
		stored = append(stored, r)
	}
	if diff := gocmp.Diff(flat(w.rows), flat(stored), cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("step %d: the store's rows differ (-twin +store):\n%s", step, diff)
	}
}

func checkLedger(t *testing.T, step int, w *twin, g *lease.Ledger) {
	t.Helper()
	held := map[lease.Kind]uint64{}
	for _, r := range w.rows {
		e, ok := g.Of(r.Lease.Underlay)
		if !ok || e.Lease != r.Lease {
			t.Fatalf("step %d: the ledger has %v, %v for %v", step, e, ok, r.Lease)
		}
		if k, _, member := w.pool.Index(r.Lease.Subnet); member {
			held[k]++
		}
	}
	for p, at := range w.freed {
		if e, ok := g.At(p); !ok || e.State != lease.Free || e.FreedAt != at {
			t.Fatalf("step %d: the ledger has %+v for %v, which was freed at %d", step, e, p, at)
		}
	}
	if g.Held(lease.Block) != held[lease.Block] || g.Held(lease.Single) != held[lease.Single] {
		t.Fatalf("step %d: the ledger counts %d blocks and %d addresses, want %v", step, g.Held(lease.Block), g.Held(lease.Single), held)
	}
}

// TestChoosingDoesNotLookAtThePool fills a pool of 65,535 blocks and more; a search through it for each would take minutes.
func TestChoosingDoesNotLookAtThePool(t *testing.T) {
	pool, err := lease.NewPool(netip.MustParsePrefix("10.0.0.0/8"), 24)
	if err != nil {
		t.Fatal(err)
	}
	g := lease.NewLedger(pool)
	t0 := lease.Terms{Now: 1000, Expiration: 1000, Fresh: 10}
	for i := range 65535 {
		q := lease.Request{Op: lease.Acquire, Lease: lease.Lease{Underlay: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})}}
		if d := lease.Decide(g, t0, nil, nil, []lease.Request{q}); d.Verdicts[0].Err != nil || len(d.Insert) != 1 {
			t.Fatalf("host %d: %+v", i, d)
		}
		g.Commit(uint64(i))
	}
	d := lease.Decide(g, t0, nil, nil, []lease.Request{{Op: lease.Acquire, Lease: lease.Lease{Underlay: netip.MustParseAddr("172.17.0.0")}}})
	if !errors.Is(d.Verdicts[0].Err, fault.Exhausted) || d.Short[lease.Block] != 1 {
		t.Errorf("one more: %+v", d)
	}
}

// TestHostsAreSpread has new hosts come to a registry that lost its data, before the others have renewed what they had.
func TestHostsAreSpread(t *testing.T) {
	pool, err := lease.NewPool(netip.MustParsePrefix("10.255.0.0/16"), 24)
	if err != nil {
		t.Fatal(err)
	}
	give := func(g *lease.Ledger, i int) netip.Prefix {
		q := lease.Request{Op: lease.Acquire, Lease: lease.Lease{Underlay: netip.AddrFrom4([4]byte{10, 0, 16, byte(i)})}}
		d := lease.Decide(g, lease.Terms{Now: 1, Expiration: 1}, nil, nil, []lease.Request{q})
		g.Commit(1)
		return d.Verdicts[0].Lease.Subnet
	}
	before, collisions := lease.NewLedger(pool), 0
	for i := range 20 {
		give(before, i)
	}
	for i := 20; i < 40; i++ {
		if e, ok := before.At(give(lease.NewLedger(pool), i)); ok && e.State == lease.Active {
			collisions++
		}
	}
	if collisions > 6 { // 20 of 255 are taken: 1 or 2 are to be expected
		t.Errorf("%d of 20 new hosts would take what others had", collisions)
	}
}

func TestImplausible(t *testing.T) {
	for _, c := range []struct {
		lost, active int
		want         bool
	}{{8, 8, false}, {9, 9, true}, {3, 12, false}, {4, 12, true}, {0, 100, false}} {
		if got := lease.Implausible(c.lost, c.active); got != c.want {
			t.Errorf("Implausible(%d, %d) = %v", c.lost, c.active, got)
		}
	}
}
