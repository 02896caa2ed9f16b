package lease

import (
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// Row is a lease as a registry's store keeps it.
type Row struct {
	ID        int64 // of the store, never used twice
	Lease     Lease // of a row that cannot be read, what of Underlay and Subnet is known
	RenewedAt int64 // seconds since 1970 by the registry's clock
	Invalid   bool  // the row cannot be read as a lease
}

// Op is what a host asks of a registry.
type Op uint8

// The operations.
const (
	Acquire Op = iota
	Renew
	Release
)

// Request is one call of Registry.Acquire, Renew or Release.
type Request struct {
	Op    Op
	Lease Lease // for Renew; only Underlay for the others
	Kind  Kind  // for Acquire
}

// Verdict answers a Request. Lease is set for an Acquire that succeeded.
type Verdict struct {
	Lease Lease
	Err   error
}

// Terms are what decisions depend on besides the leases. All are seconds.
type Terms struct {
	Now        int64 // since 1970, by the registry's clock
	Expiration int64 // age at which a lease has expired
	Fresh      int64 // age below which a renewal need not be written
}

// Expired reports whether the row's lease has ended. No time that a row may hold makes it overflow.
func (t Terms) Expired(r Row) bool { return r.RenewedAt <= t.Now-t.Expiration }

// due reports whether a renewal of the row is to be written: it is not young any more, or it was renewed in the future. The second is what remains of a
// clock that was ahead and has been put right; a lease that kept such a time would outlive its host by as much.
func (t Terms) due(r Row) bool {
	age := t.Now - r.RenewedAt
	return age >= t.Fresh || age < -t.Fresh-1
}

// Settle judges a request that leaves everything as it is but, perhaps, the time of the last renewal: the renewal of a lease that holds,
// or the acquisition of one that is held already. row is what the host has, nil for nothing. settled is false for every other request, which is for
// Decide.
func (t Terms) Settle(p Pool, q Request, row *Row) (v Verdict, touch, settled bool) {
	if row == nil || row.Invalid || t.Expired(*row) {
		return Verdict{}, false, false
	}
	touch = t.due(*row)
	switch {
	case q.Op == Renew && q.Lease == row.Lease:
		return Verdict{}, touch, true
	case q.Op == Renew:
		return mismatch(), false, true
	case q.Op == Acquire && p.Contains(row.Lease.Subnet):
		return Verdict{Lease: row.Lease}, touch, true
	}
	return Verdict{}, false, false
}

func mismatch() Verdict { return Verdict{Err: fault.Conflictf("lease mismatch")} }

// Decision says what a series of requests comes to: first the deletions, then the insertions.
type Decision struct {
	Verdicts []Verdict // one per request
	Touch    []int64   // rows whose last renewal becomes now
	Delete   []int64   // rows to delete
	Reclaim  []int64   // rows to delete provided that they are still expired
	Insert   []Lease   // rows to add, renewed now
	Short    [2]int    // by kind: requests that found nothing and might have been served by more of the expired rows
}

// decider is the state of one Decide.
type decider struct {
	g       *Ledger
	t       Terms
	rows    map[netip.Addr]*holding
	expired [2][]Row // by kind
	d       Decision
}

// holding is what a host has while requests are judged.
type holding struct {
	Row
	gone      bool
	added     bool // not in the store yet
	touched   bool
	reclaimed bool
}

// Decide judges requests in their order, each in the light of those before it. rows is what the store has for the hosts that they name, and agrees
// with g; expired lists expired rows, the oldest first, that may be given to others when nothing else is left. Changes are made
// to g, after g.Begin, and g.Changes lists them; the caller stores those together with the decision, or calls g.Rollback.
func Decide(g *Ledger, t Terms, rows, expired []Row, requests []Request) Decision {
	x := &decider{g: g, t: t, rows: make(map[netip.Addr]*holding, len(rows))}
	for _, r := range expired {
		if k, _, member := g.pool.Index(r.Lease.Subnet); member && !r.Invalid {
			x.expired[k] = append(x.expired[k], r)
		}
	}
	order := make([]*holding, 0, len(rows)+len(requests))
	for _, list := range [][]Row{rows, expired} {
		for _, r := range list {
			if x.rows[r.Lease.Underlay] == nil {
				h := &holding{Row: r}
				x.rows[r.Lease.Underlay] = h
				order = append(order, h)
			}
		}
	}
	g.Begin()
	x.d.Verdicts = make([]Verdict, len(requests))
	for i, q := range requests {
		before := x.rows[q.Lease.Underlay]
		x.d.Verdicts[i] = x.judge(q, before)
		if after := x.rows[q.Lease.Underlay]; after != before {
			order = append(order, after)
		}
	}
	for _, h := range order {
		switch {
		case h.added && !h.gone:
			x.d.Insert = append(x.d.Insert, h.Lease)
		case h.added:
		case h.reclaimed:
			x.d.Reclaim = append(x.d.Reclaim, h.ID)
		case h.gone:
			x.d.Delete = append(x.d.Delete, h.ID)
		case h.touched:
			x.d.Touch = append(x.d.Touch, h.ID)
		}
	}
	return x.d
}

func (x *decider) judge(q Request, h *holding) Verdict {
	if h != nil && h.gone {
		h = nil
	}
	switch q.Op {
	case Acquire:
		return x.acquire(q, h)
	case Renew:
		return x.renew(q, h)
	}
	if h != nil {
		x.remove(h)
	}
	return Verdict{}
}

func (x *decider) acquire(q Request, h *holding) Verdict {
	host := q.Lease.Underlay
	if !host.Is4() || !usable(host) {
		return Verdict{Err: fault.Invalidf("invalid ipv4 address: %s", addrText(host))}
	}
	if h != nil && !h.Invalid && x.g.pool.Contains(h.Lease.Subnet) {
		x.keep(h)
		return Verdict{Lease: h.Lease}
	}
	subnet, ok := x.g.choose(q.Kind, host)
	if !ok {
		if subnet, ok = x.reclaim(q.Kind); !ok {
			x.d.Short[q.Kind]++
			return Verdict{Err: fault.Exhaustedf("no lease available")}
		}
	}
	if h != nil {
		x.remove(h) // of a network that is no longer ours
	}
	return Verdict{Lease: x.add(host, subnet)}
}

func (x *decider) renew(q Request, h *holding) Verdict {
	l := q.Lease
	if h != nil {
		if h.Invalid || h.Lease != l {
			return mismatch()
		}
		x.keep(h)
		return Verdict{}
	}
	if err := l.Validate(); err != nil {
		return Verdict{Err: fault.New(fault.Conflict, err)}
	}
	if !l.Underlay.Is4() || !x.g.pool.Contains(l.Subnet) {
		return Verdict{Err: fault.Conflictf("subnet %v is not one of those cut from %v: expected a block of /%d or an address of the first block",
			l.Subnet, x.g.pool.network, x.g.pool.bits)}
	}
	if other, taken := x.g.Overlaps(l.Subnet); taken {
		return Verdict{Err: fault.Conflictf("subnet %v overlaps %v, which host %v holds", l.Subnet, other.Subnet, other.Underlay)}
	}
	x.add(l.Underlay, l.Subnet)
	return Verdict{}
}

// keep renews what a host has.
func (x *decider) keep(h *holding) {
	if x.t.due(h.Row) || x.t.Expired(h.Row) {
		h.touched, h.RenewedAt = true, x.t.Now
	}
	if e, ok := x.g.At(h.Lease.Subnet); ok && e.State != Active {
		x.g.Set(Entry{Lease: h.Lease, State: Active})
	}
}

func (x *decider) add(host netip.Addr, subnet netip.Prefix) Lease {
	l := Lease{Underlay: host, Subnet: subnet, MAC: MACOf(subnet)}
	x.rows[host] = &holding{Row: Row{Lease: l, RenewedAt: x.t.Now}, added: true}
	x.g.Set(Entry{Lease: l, State: Active})
	return l
}

func (x *decider) remove(h *holding) {
	h.gone = true
	if !h.Invalid {
		x.g.Set(Entry{Lease: h.Lease, State: Free, FreedAt: x.t.Now})
	}
}

// reclaim takes the oldest expired lease of a kind from its host.
func (x *decider) reclaim(k Kind) (netip.Prefix, bool) {
	for len(x.expired[k]) > 0 {
		r := x.expired[k][0]
		x.expired[k] = x.expired[k][1:]
		h := x.rows[r.Lease.Underlay]
		if h.ID == r.ID && !h.gone && x.t.Expired(h.Row) && !x.shared(r.Lease.Subnet) {
			x.remove(h)
			h.reclaimed = true
			return r.Lease.Subnet, true
		}
	}
	return netip.Prefix{}, false
}

// shared reports whether a held subnet overlaps something else that is held, so that it is not safe to give out even when its host is gone.
func (x *decider) shared(subnet netip.Prefix) bool {
	e, _ := x.g.At(subnet)
	x.g.Set(Entry{Lease: e.Lease, State: Free, FreedAt: e.FreedAt})
	_, taken := x.g.Overlaps(subnet)
	x.g.Set(e)
	return taken
}
