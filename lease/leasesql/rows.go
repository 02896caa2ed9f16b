package leasesql

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

//go:embed migrations
var migrations embed.FS

func migrationFiles() fs.FS {
	f, err := fs.Sub(migrations, "migrations")
	if err != nil {
		panic(err) // the directory is part of the binary
	}
	return f
}

// chunk is how many rows one statement handles at most: SQLite and PostgreSQL limit the number of arguments.
const chunk = 256

// state is the row of silk_lease_revision with the time of the database.
type state struct {
	lease.Revision
	pruned uint64
	now    int64

	damaged []string // keys of entries that cannot be read; they are not among those that were
}

// readChanges returns the revision and, in one statement and so of the same moment, every entry that changed after a counter (-1: all), by
// counter. No revision is fault.NotFound.
func readChanges(ctx context.Context, q sqldb.Querier, after int64) (state, []lease.Entry, error) {
	rows, err := q.Query(ctx, `SELECT r.epoch, r.counter, r.pruned, `+q.Dialect().Now+`, l.overlay_subnet, l.underlay_ip, l.overlay_hwaddr, l.state, l.freed_at, l.changed
		FROM silk_lease_revision r LEFT JOIN `+records(q.Dialect())+` l ON l.changed > ? WHERE r.id = 1`, after)
	if err != nil {
		return state{}, nil, fmt.Errorf("read revision: %w", err)
	}
	defer rows.Close()
	var st state
	var entries []lease.Entry
	for rows.Next() {
		var subnet, host, mac sql.NullString
		var how, freed, changed sql.NullInt64
		if err := rows.Scan(&st.Epoch, &st.Counter, &st.pruned, &st.now, &subnet, &host, &mac, &how, &freed, &changed); err != nil {
			return state{}, nil, fmt.Errorf("read revision: %w", sqldb.Failure(err))
		}
		if !subnet.Valid {
			continue
		}
		l, err := parse(host.String, subnet.String, mac.String)
		if err != nil {
			st.damaged = append(st.damaged, subnet.String)
			continue
		}
		entries = append(entries, lease.Entry{Lease: l, State: lease.State(how.Int64), FreedAt: freed.Int64, Changed: uint64(changed.Int64)})
	}
	if err := rows.Err(); err != nil {
		return state{}, nil, fmt.Errorf("read revision: %w", sqldb.Failure(err))
	}
	if st.Epoch == "" {
		return state{}, nil, fault.NotFoundf("table silk_lease_revision is empty")
	}
	slices.SortFunc(entries, func(a, b lease.Entry) int { return cmp.Compare(a.Changed, b.Changed) })
	return st, entries, nil
}

// parse reads a row. What Acquire or Renew of any controller could not have made is an error.
func parse(host, subnet, mac string) (lease.Lease, error) {
	h, err := netip.ParseAddr(host)
	if err != nil || !h.Is4() {
		return lease.Lease{}, fault.Invalidf("underlay address %q: expected an IPv4 address", host)
	}
	p, err := netip.ParsePrefix(subnet)
	if err != nil || !p.Addr().Is4() || p != p.Masked() {
		return lease.Lease{}, fault.Invalidf("overlay subnet %q: expected an IPv4 network", subnet)
	}
	m, err := lease.ParseMAC(mac)
	if err != nil {
		return lease.Lease{}, err
	}
	return lease.Lease{Underlay: h, Subnet: p, MAC: m}, nil
}

const rowColumns = "SELECT id, underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at, "

// readRows returns the rows of subnets that the end of the statement selects, and the time of the database, 0 if there are none.
func readRows(ctx context.Context, q sqldb.Querier, end string, args ...any) (all []lease.Row, now int64, err error) {
	rows, err := q.Query(ctx, rowColumns+q.Dialect().Now+" FROM subnets "+end, args...)
	if err != nil {
		return nil, 0, fmt.Errorf("read leases: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var r lease.Row
		var host, subnet, mac string
		if err := rows.Scan(&r.ID, &host, &subnet, &mac, &r.RenewedAt, &now); err != nil {
			return nil, 0, fmt.Errorf("read leases: %w", sqldb.Failure(err))
		}
		if r.Lease, err = parse(host, subnet, mac); err != nil {
			h, _ := netip.ParseAddr(host)
			p, _ := netip.ParsePrefix(subnet)
			r.Invalid, r.Lease = true, lease.Lease{Underlay: h, Subnet: p.Masked()}
		}
		all = append(all, r)
	}
	if err := rows.Err(); err != nil {
		return nil, 0, fmt.Errorf("read leases: %w", sqldb.Failure(err))
	}
	return all, now, nil
}

// readHosts returns the rows of hosts.
func readHosts(ctx context.Context, q sqldb.Querier, hosts []netip.Addr) ([]lease.Row, int64, error) {
	texts := make([]string, len(hosts))
	for i, h := range hosts {
		texts[i] = h.String()
	}
	among, args := sqldb.Among(q.Dialect(), "underlay_ip", texts)
	return readRows(ctx, q, "WHERE "+among, args...)
}

// readExpired returns the oldest expired rows of both kinds, at most limit of each.
func readExpired(ctx context.Context, q sqldb.Querier, expiration int64, limit int) ([]lease.Row, error) {
	var all []lease.Row
	for _, like := range []string{"LIKE", "NOT LIKE"} {
		rows, _, err := readRows(ctx, q, "WHERE last_renewed_at <= "+q.Dialect().Now+" - ? AND overlay_subnet "+like+
			" '%/32' ORDER BY last_renewed_at, id LIMIT ?", expiration, limit)
		if err != nil {
			return nil, err
		}
		all = append(all, rows...)
	}
	return all, nil
}

// series is the statements of one transaction.
type series struct {
	dialect  sqldb.Dialect
	list     []sqldb.Statement
	recorded map[netip.Prefix]bool // subnets of which record need not say any more that they are active
	last     *sqldb.Statement      // what advance makes a part of its statement
}

func (w *series) add(want int64, text string, args ...any) {
	w.list = append(w.list, sqldb.Statement{Text: text, Args: args, Want: want})
}

// remove deletes rows of subnets. One that is there no more, because another controller deleted it, makes no difference.
func (w *series) remove(ids []int64) {
	for part := range slices.Chunk(ids, chunk) {
		among, args := sqldb.Among(w.dialect, "id", part)
		w.add(sqldb.Any, "DELETE FROM subnets WHERE "+among, args...)
	}
}

// reclaim deletes rows of subnets, each of which must still be expired.
func (w *series) reclaim(ids []int64, expiration int64) {
	for part := range slices.Chunk(ids, chunk) {
		among, args := sqldb.Among(w.dialect, "id", part)
		w.add(int64(len(part)), "DELETE FROM subnets WHERE "+among+" AND last_renewed_at <= "+w.dialect.Now+" - ?", append(args, expiration)...)
	}
}

// insert adds rows to subnets, renewed now. Where the engine can, it also records them in silk_leases, as active at a revision's counter, and both are done by
// the statement of advance. unused says that silk_leases has no row for any of the subnets: should it have one, then that is a duplicate.
func (w *series) insert(leases []lease.Lease, counter uint64, unused bool) {
	if w.dialect.Arrays && len(leases) > 0 {
		w.insertRecorded(leases, counter, unused)
		return
	}
	group := "(?, ?, ?, " + w.dialect.Now + ")"
	for part := range slices.Chunk(leases, chunk) {
		args := make([]any, 0, 3*len(part))
		for _, l := range part {
			args = append(args, l.Underlay.String(), l.Subnet.String(), l.MAC.String())
		}
		w.add(int64(len(part)), intoSubnets+"VALUES "+strings.Repeat(group+", ", len(part)-1)+group, args...)
	}
}

func (w *series) insertRecorded(leases []lease.Lease, counter uint64, unused bool) {
	w.recorded = make(map[netip.Prefix]bool, len(leases))
	for _, l := range leases {
		w.recorded[l.Subnet] = true
	}
	end := ""
	switch {
	case unused && len(leases) >= fewest:
		w.grant(leases, counter)
		return
	case !unused:
		end = w.dialect.Upsert(keyColumn, otherColumns...)
	}
	hosts, subnets, macs := columns(leases)
	w.last = &sqldb.Statement{Want: int64(len(leases)),
		With: newRows(w.dialect),
		Text: intoLeases + "SELECT overlay_subnet, underlay_ip, overlay_hwaddr, id, 0, 0, ?::bigint FROM new" + end,
		Args: []any{hosts, subnets, macs, int64(counter)},
	}
}

// newRows inserts rows into subnets, given as three lists, and calls them new.
func newRows(d sqldb.Dialect) string {
	return "new AS (" + intoSubnets + "SELECT host, subnet, mac, " + d.Now + " FROM unnest(?::text[], ?::text[], ?::text[]) AS l (host, subnet, mac)" +
		" RETURNING overlay_subnet, underlay_ip, overlay_hwaddr, id)"
}

// columns returns leases as three lists of texts, in the form of array arguments.
func columns(leases []lease.Lease) (hosts, subnets, macs string) {
	h, s, m := make([]string, len(leases)), make([]string, len(leases)), make([]string, len(leases))
	for i, l := range leases {
		h[i], s[i], m[i] = l.Underlay.String(), l.Subnet.String(), l.MAC.String()
	}
	return sqldb.Array(h), sqldb.Array(s), sqldb.Array(m)
}

// touch renews rows of subnets.
func (w *series) touch(ids []int64) {
	for part := range slices.Chunk(ids, chunk) {
		among, args := sqldb.Among(w.dialect, "id", part)
		w.add(sqldb.Any, "UPDATE subnets SET last_renewed_at = "+w.dialect.Now+" WHERE "+among, args...)
	}
}

const (
	intoSubnets = "INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) "
	intoLeases  = "INSERT INTO silk_leases (overlay_subnet, underlay_ip, overlay_hwaddr, row_id, state, freed_at, changed) "
	keyColumn   = "overlay_subnet"
)

var otherColumns = []string{"underlay_ip", "overlay_hwaddr", "row_id", "state", "freed_at", "changed"}

// record stores what became of subnets at a revision's counter.
func (w *series) record(changes []lease.Entry, counter uint64) {
	end := w.dialect.Upsert(keyColumn, otherColumns...)
	for part := range slices.Chunk(changes, chunk) {
		held := map[lease.State][]string{}
		var freed []any
		for _, e := range part {
			if e.State == lease.Free {
				freed = append(freed, e.Subnet.String(), e.Underlay.String(), e.MAC.String(), e.FreedAt, int64(counter))
			} else if e.State != lease.Active || !w.recorded[e.Subnet] {
				held[e.State] = append(held[e.State], e.Subnet.String())
			}
		}
		if len(freed) > 0 {
			group := fmt.Sprintf("(?, ?, ?, 0, %d, ?, ?)", lease.Free)
			w.add(sqldb.Any, intoLeases+"VALUES "+strings.Repeat(group+", ", len(freed)/5-1)+group+end, freed...)
		}
		for _, st := range []lease.State{lease.Active, lease.Expired} {
			if len(held[st]) == 0 {
				continue
			}
			among, args := sqldb.Among(w.dialect, "overlay_subnet", held[st])
			want := int64(len(held[st]))
			if w.dialect.Name == sqldb.MySQL { // which counts a row that was overwritten twice
				want = sqldb.Any
			}
			w.add(want, intoLeases+fmt.Sprintf("SELECT overlay_subnet, underlay_ip, overlay_hwaddr, id, %d, 0, ? FROM subnets WHERE %s", st, among)+end,
				append([]any{int64(counter)}, args...)...)
		}
	}
}

// advance moves the revision from what it was read as by one, to epoch. It is the last statement of its transaction.
func (w *series) advance(from state, epoch string, pruned uint64) {
	w.add(1, "UPDATE silk_lease_revision SET counter = ?, epoch = ?, pruned = ? WHERE id = 1 AND epoch = ? AND counter = ?",
		int64(from.Counter+1), epoch, int64(pruned), from.Epoch, int64(from.Counter))
	w.list[len(w.list)-1].First = w.last
}

// balance is what subnets has more than silk_leases in: rows, the sum of their numbers, and the same of active rows. As row numbers are
// never used twice, an unchanged balance means unchanged rows.
type balance struct{ rows, ids, active, activeIDs int64 }

func readBalance(ctx context.Context, q sqldb.Querier, expiration int64) (b balance, err error) {
	live := "last_renewed_at > " + q.Dialect().Now + " - ?"
	sum := func(e string) string { return "COALESCE(SUM(" + e + "), 0)" }
	err = q.QueryRow(ctx, `SELECT s.n - l.n, s.ids - l.ids, s.active - l.active, s.active_ids - l.active_ids FROM
		(SELECT COUNT(*) AS n, `+sum("id")+` AS ids, `+sum("CASE WHEN "+live+" THEN 1 ELSE 0 END")+` AS active, `+sum("CASE WHEN "+live+" THEN id ELSE 0 END")+` AS active_ids FROM subnets) s,
		(SELECT COUNT(*) AS n, `+sum("row_id")+` AS ids, `+sum("CASE WHEN state = 0 THEN 1 ELSE 0 END")+` AS active, `+sum("CASE WHEN state = 0 THEN row_id ELSE 0 END")+` AS active_ids
			FROM `+records(q.Dialect())+` r WHERE state < 2) l`, expiration, expiration).Scan(&b.rows, &b.ids, &b.active, &b.activeIDs)
	if err != nil {
		return balance{}, fmt.Errorf("compare leases: %w", err)
	}
	return b, nil
}
