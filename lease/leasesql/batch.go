package leasesql

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/batch"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

type (
	queue = batch.Queue[question, lease.Verdict]
	call  = batch.Call[question, lease.Verdict]
)

// question is what callers ask.
type question struct {
	lease.Request
	verify bool // no request: see to it that what is known is the database's newest
}

func newQueue() *queue {
	return batch.New[question, lease.Verdict](batch.Limits[question]{Calls: maxBatch, Wait: longestGather}, errEnded)
}

const longestGather = 2 * time.Millisecond

// serve answers calls.
func (k *keeper) serve(ctx context.Context, calls []*call) {
	var requests []lease.Request
	var asked []*call
	var verify []*call
	for _, c := range calls {
		if c.Question.verify {
			verify = append(verify, c)
			continue
		}
		requests, asked = append(requests, c.Question.Request), append(asked, c)
	}
	if len(verify) > 0 {
		err := k.poll(ctx)
		for _, c := range verify {
			c.Answer(lease.Verdict{}, err)
		}
	}
	if len(requests) == 0 {
		return
	}
	verdicts, err := k.judge(ctx, requests)
	if err != nil && len(requests) > 1 && !unavailable(err) && ctx.Err() == nil {
		k.s.log.Error("batch failed: its requests are tried one by one", "requests", len(requests), "error", err)
		k.serveEach(ctx, requests, asked)
		return
	}
	if ctx.Err() != nil {
		err = errEnded
	}
	for i, c := range asked {
		if err != nil {
			c.Answer(lease.Verdict{}, ours(err))
		} else {
			c.Answer(verdicts[i], verdicts[i].Err)
		}
	}
}

// serveEach is serve for requests of which one makes the others fail. Once the database is away, those that are left are told so.
func (k *keeper) serveEach(ctx context.Context, requests []lease.Request, asked []*call) {
	var away error
	for i, c := range asked {
		v, err := []lease.Verdict{{}}, away
		if err == nil && c.Left() {
			continue
		}
		if err == nil {
			v, err = k.judge(ctx, requests[i:i+1])
		}
		if unavailable(err) {
			away = err
		}
		if err != nil {
			c.Answer(lease.Verdict{}, ours(err))
		} else {
			c.Answer(v[0], v[0].Err)
		}
	}
}

// ours gives a failure of the store or its database no kind but Unavailable or none: a verdict on the request is something else, and to be told one by
// mistake would end a host's lease.
func ours(err error) error {
	if err == nil || unavailable(err) || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.New(fault.Internal, err)
}

// errForeign means that the table subnets has changed behind our back.
var errForeign = errors.New("table subnets holds what is not known yet")

// judge decides requests. It starts over after it has learnt what others did to the tables.
func (k *keeper) judge(ctx context.Context, requests []lease.Request) ([]lease.Verdict, error) {
	ctx, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	verdicts := make([]lease.Verdict, len(requests))
	var b basis
	for tries := 0; ; tries++ {
		err := k.s.db.Again(ctx, func(n int) error {
			if b.synced = n > 0; b.synced {
				if err := k.sync(ctx); err != nil {
					return err
				}
			}
			return k.attempt(ctx, requests, verdicts, b)
		})
		learn := k.learn
		switch {
		case err == nil:
			return verdicts, nil
		case errors.Is(err, errForeign):
		case sqldb.IsDuplicate(err) && !b.doubted:
			b.doubted = true // a row that is in silk_leases only will be overwritten
			continue
		case sqldb.IsDuplicate(err) && (tries < 4 || len(requests) == 1):
			learn = k.learnObstacle
		case missing(err):
			learn = k.mend
		default:
			return nil, err
		}
		if tries == 9 {
			return nil, fmt.Errorf("gave up after %d attempts: %w", tries+1, err)
		}
		if err := learn(ctx); err != nil {
			return nil, err
		}
		b.learnt = true
	}
}

// basis is what is known of how far the ledger can be trusted.
type basis struct {
	synced  bool // it has just been brought to the database's revision
	learnt  bool // it has just been compared with subnets
	doubted bool // a row was there that it does not know of, in subnets or in silk_leases
}

// learn finds out what others did.
func (k *keeper) learn(ctx context.Context) error {
	_, err := k.reconcile(ctx)
	return err
}

// learnObstacle finds out why a row could not be inserted. When it is no lease of another host that stands in its way, but a row that cannot be
// read, or one with a hardware address that is not its subnet's, then the subnet is left alone for some time.
func (k *keeper) learnObstacle(ctx context.Context) error {
	was := k.at.Revision
	learnt, err := k.reconcile(ctx)
	if err == nil && !learnt && k.at.Revision == was && len(k.insert) == 1 {
		k.s.log.Warn("subnet cannot be given out: another row of table subnets stands in its way", "subnet", k.insert[0])
		k.ledger.Block(k.insert[0])
	}
	return err
}

// attempt decides requests once. Most leave everything as it is: those are settled by one look at the rows of their hosts. The others are judged by the
// ledger, which need not be at the database's revision, since commit finds that out.
func (k *keeper) attempt(ctx context.Context, requests []lease.Request, verdicts []lease.Verdict, b basis) error {
	hosts := k.hostsToRead(requests)
	var rows []lease.Row
	var now int64
	if len(hosts) > 0 {
		var err error
		if rows, now, err = readHosts(ctx, k.s.db, hosts); err != nil {
			return err
		}
	}
	t, w := k.terms(cmp.Or(now, k.at.now)), &series{dialect: k.s.db.Dialect()}
	open, touch := k.settle(t, rows, requests, verdicts)
	if open {
		switch {
		case k.agrees(rows, hosts):
		case b.synced:
			return errForeign
		default:
			return sqldb.Stale()
		}
		d, err := k.decide(ctx, t, rows, requests)
		if err != nil {
			return err
		}
		if !b.synced && slices.ContainsFunc(d.Verdicts, refused) && len(k.ledger.Changes()) == 0 {
			k.ledger.Rollback()
			return sqldb.Stale() // nothing will be stored that proves the ledger right, and a refusal is too grave to be out of date
		}
		if !b.learnt && slices.ContainsFunc(d.Verdicts, refused) {
			k.ledger.Rollback()
			if err := k.confirm(ctx, requests, d.Verdicts); err != nil {
				return err
			}
			if d, err = k.decide(ctx, t, rows, requests); err != nil {
				return err
			}
		}
		copy(verdicts, d.Verdicts)
		w.remove(d.Delete)
		w.reclaim(d.Reclaim, t.Expiration)
		w.insert(d.Insert, k.at.Counter+1, !b.doubted && !k.ledger.Reused())
		touch = d.Touch
	}
	before := len(w.list)
	w.touch(touch)
	after := len(w.list)
	counts, err := k.commit(ctx, w, k.at.Epoch)
	if err != nil {
		return err
	}
	met := int64(0)
	for _, n := range counts[before:after] {
		met += n
	}
	if met != int64(len(touch)) {
		return sqldb.Stale() // a lease was taken from its host just before it was renewed: that host must hear of it
	}
	return nil
}

// refused reports whether a verdict says that something is taken.
func refused(v lease.Verdict) bool {
	return errors.Is(v.Err, fault.Conflict) || errors.Is(v.Err, fault.Exhausted)
}

// confirm looks whether what the refused requests ran into is still there: controllers of the earlier kind free subnets without a word.
func (k *keeper) confirm(ctx context.Context, requests []lease.Request, verdicts []lease.Verdict) error {
	var hosts []netip.Addr
	full := false
	for i, v := range verdicts {
		switch l := requests[i].Lease; {
		case errors.Is(v.Err, fault.Exhausted):
			full = true
		case errors.Is(v.Err, fault.Conflict) && l.Subnet.IsValid():
			hosts = append(hosts, l.Underlay)
			if e, held := k.ledger.Overlaps(l.Subnet); held && e.Underlay.IsValid() {
				hosts = append(hosts, e.Underlay)
			}
		}
	}
	for part := range slices.Chunk(hosts, chunk) {
		if rows, _, err := readHosts(ctx, k.s.db, part); err != nil {
			return err
		} else if !k.agrees(rows, part) {
			return errForeign
		}
	}
	if !full {
		return nil
	}
	if b, err := readBalance(ctx, k.s.db, seconds(k.s.cfg.Expiration)); err != nil {
		return err
	} else if b != k.rest {
		return errForeign
	}
	return nil
}

// hostsToRead returns the hosts whose rows matter. Those of which nothing is known, and which want a lease, are not among them, unless
// they have a row that cannot be read: should they have another, then the insertion of another one fails.
func (k *keeper) hostsToRead(requests []lease.Request) []netip.Addr {
	seen := make(map[netip.Addr]bool, len(requests))
	hosts := make([]netip.Addr, 0, len(requests))
	unread := map[netip.Addr]bool{}
	for _, l := range k.unread {
		unread[l.Underlay] = true
	}
	for _, q := range requests {
		h := q.Lease.Underlay
		if _, known := k.ledger.Of(h); seen[h] || !known && !unread[h] && q.Op != lease.Release {
			continue
		}
		seen[h] = true
		hosts = append(hosts, h)
	}
	return hosts
}

// settle puts the verdicts on requests in their places and returns the rows to renew, provided that no request changes anything else; open says that
// one does.
func (k *keeper) settle(t lease.Terms, rows []lease.Row, requests []lease.Request, verdicts []lease.Verdict) (open bool, touch []int64) {
	byHost := make(map[netip.Addr]*lease.Row, len(rows))
	for i := range rows {
		byHost[rows[i].Lease.Underlay] = &rows[i]
	}
	touched := map[int64]bool{}
	for i, q := range requests {
		row := byHost[q.Lease.Underlay]
		v, write, ok := t.Settle(k.s.cfg.Pool, q, row)
		if !ok {
			return true, nil
		}
		if write && !touched[row.ID] {
			touched[row.ID] = true
			touch = append(touch, row.ID)
		}
		verdicts[i] = v
	}
	return false, touch
}

// decide judges requests by the ledger. Leases that have expired are given to others only when it has been made known that they did, and not all at once
// for a reason that has nothing to do with their hosts.
func (k *keeper) decide(ctx context.Context, t lease.Terms, rows []lease.Row, requests []lease.Request) (lease.Decision, error) {
	d := lease.Decide(k.ledger, t, rows, nil, requests)
	for limit := 2 * maxBatch; d.Short != [2]int{} && time.Now().After(k.grace); limit *= 8 {
		expired, err := readExpired(ctx, k.s.db, t.Expiration, limit)
		if err != nil {
			k.ledger.Rollback()
			return lease.Decision{}, err
		}
		k.ledger.Rollback()
		if !k.agrees(expired, nil) || slices.ContainsFunc(expired, k.unknown) {
			return lease.Decision{}, errForeign
		}
		d = lease.Decide(k.ledger, t, rows, expired, requests)
		if len(expired) < limit {
			break
		}
	}
	k.insert = k.insert[:0]
	for _, l := range d.Insert {
		k.insert = append(k.insert, l.Subnet)
	}
	return d, nil
}

// unknown reports whether an expired row is an active lease to the ledger.
func (k *keeper) unknown(r lease.Row) bool {
	e, ok := k.ledger.At(r.Lease.Subnet)
	return ok && !r.Invalid && e.State == lease.Active
}

// agrees reports whether rows, and the lack of a row for hosts, are what the ledger has.
func (k *keeper) agrees(rows []lease.Row, hosts []netip.Addr) bool {
	there := make(map[netip.Addr]bool, len(rows))
	for _, r := range rows {
		if r.Invalid {
			continue
		}
		there[r.Lease.Underlay] = true
		if e, ok := k.ledger.Of(r.Lease.Underlay); !ok || e.Lease != r.Lease {
			return false
		}
	}
	for _, h := range hosts {
		if _, ok := k.ledger.Of(h); ok && !there[h] {
			return false
		}
	}
	return true
}
