package leasesql

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// fellBehind handles a database that has forgotten revisions of its own epoch: a node of a cluster that lags, for a while; or one that was
// restored from a copy. Then the epoch is renewed.
func (k *keeper) fellBehind(st state) error {
	if k.behind.IsZero() {
		k.behind = time.Now()
		k.s.log.Warn("database went back to an earlier revision", "was", k.at.String(), "is", st.String())
	}
	if time.Since(k.behind) < patience {
		return fault.Unavailablef("the database is at revision %v, but was at %v: waiting for it to catch up", st.Revision, k.at.Revision)
	}
	k.renew = true
	return fault.Unavailablef("the database was restored to an earlier revision: reading it anew")
}

// grace is for how long after a loss, a restoration or a jump of the clock no lease is taken from its host, however long ago it seems to have been
// renewed: hosts that are there renew meanwhile.
const grace = 10 * time.Minute

// remember takes over what an older ledger had and a lost or restored database has not, as freed just now: its hosts may be there, and ask it back, so
// it is given out last.
func (k *keeper) remember(old *lease.Ledger, now int64) {
	for e := range old.All() {
		if e.State != lease.Free {
			e.State, e.FreedAt = lease.Free, now
		}
		if have, ok := k.ledger.At(e.Subnet); !ok || have.State == lease.Free && have.FreedAt < e.FreedAt {
			e.Changed = have.Changed
			k.ledger.Set(e)
		}
	}
}

// discard removes entries of silk_leases that cannot be read: the comparison that follows makes them anew from subnets, where that holds something.
func (k *keeper) discard(ctx context.Context, keys []string) error {
	k.s.log.Error("table silk_leases held what cannot be read: it was removed", "count", len(keys), "first", keys[0])
	if _, err := k.moveGrants(ctx, allGrants); err != nil {
		return err
	}
	for part := range slices.Chunk(keys, chunk) {
		among, args := sqldb.Among(k.s.db.Dialect(), "overlay_subnet", part)
		if _, err := k.s.db.Exec(ctx, "DELETE FROM silk_leases WHERE "+among, args...); err != nil {
			return fmt.Errorf("remove unreadable entries: %w", err)
		}
	}
	for _, key := range keys {
		if p, err := netip.ParsePrefix(key); err == nil {
			k.ledger.Forget(p)
		}
	}
	return nil
}
