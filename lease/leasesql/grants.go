package leasesql

import (
	"context"
	"fmt"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// Where the engine takes lists, a batch of leases on subnets that were never used before is recorded by one row of silk_lease_grants, which costs a ninth of
// that many rows of silk_leases. The keeper moves what is there to silk_leases when it has time. Whoever reads the records reads both.

// records is what to select from for all records. What silk_leases says holds if it was said later.
func records(d sqldb.Dialect) string {
	if !d.Arrays {
		return "silk_leases"
	}
	return `(SELECT overlay_subnet, underlay_ip, overlay_hwaddr, row_id, state, freed_at, changed FROM silk_leases UNION ALL
		SELECT r.subnet, COALESCE(r.host, ''), COALESCE(r.mac, ''), COALESCE(r.id, 0), 0, 0, g.counter FROM silk_lease_grants g, ` + granted + ` AND NOT EXISTS
			(SELECT 1 FROM silk_leases o WHERE o.overlay_subnet = r.subnet AND o.changed > g.counter))`
}

// granted are the leases of a row g of silk_lease_grants.
const granted = "unnest(g.subnets, g.hosts, g.macs, g.ids) AS r (subnet, host, mac, id) WHERE r.subnet IS NOT NULL"

// grant adds rows to subnets, of which silk_leases has no records, and one to silk_lease_grants.
func (w *series) grant(leases []lease.Lease, counter uint64) {
	hosts, subnets, macs := columns(leases)
	w.last = &sqldb.Statement{Want: 1,
		With: newRows(w.dialect),
		Text: `INSERT INTO silk_lease_grants (counter, subnets, hosts, macs, ids)
			SELECT ?::bigint, array_agg(overlay_subnet), array_agg(underlay_ip), array_agg(overlay_hwaddr), array_agg(id) FROM new`,
		Args: []any{hosts, subnets, macs, int64(counter)},
	}
}

// fewest is how many leases a grant is worth its row and the move for. someGrants is how many rows of silk_lease_grants are moved at a time, while requests may come
// in; allGrants is more than there are.
const fewest, someGrants, allGrants = 4, 32, 1 << 30

// moveGrants moves the oldest grants to silk_leases, up to limit, and returns how many there were. It is one statement, so that two stores cannot move the same one.
func (k *keeper) moveGrants(ctx context.Context, limit int) (moved int, err error) {
	d := k.s.db.Dialect()
	if !d.Arrays {
		return 0, nil
	}
	err = k.s.db.Again(ctx, func(int) error {
		return k.s.db.QueryRow(ctx, `WITH g AS (DELETE FROM silk_lease_grants WHERE counter IN (SELECT counter FROM silk_lease_grants ORDER BY counter LIMIT ?) RETURNING *),
			moved AS (`+intoLeases+`SELECT DISTINCT ON (r.subnet) r.subnet, COALESCE(r.host, ''), COALESCE(r.mac, ''), COALESCE(r.id, 0), 0, 0, g.counter FROM g, `+granted+`
			ORDER BY r.subnet, g.counter DESC`+d.Upsert(keyColumn, otherColumns...)+" WHERE silk_leases.changed < excluded.changed) SELECT COUNT(*) FROM g", limit).Scan(&moved)
	})
	if err != nil {
		return 0, fmt.Errorf("move grants: %w", err)
	}
	return moved, nil
}

// moveSome moves grants until there are none, or somebody waits.
func (k *keeper) moveSome(ctx context.Context) error {
	for {
		moved, err := k.moveGrants(ctx, someGrants)
		if err != nil || moved < someGrants || k.s.calls.Waiting() > 0 {
			return err
		}
	}
}
