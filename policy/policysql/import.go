package policysql

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// Imported is the outcome of Import.
type Imported struct {
	Policies, Groups int      // that were taken over, or are there already
	SecurityGroups   int      // likewise
	Skipped          int      // rows that were left out
	Reasons          []string // why, at most 100
	Revision         revision.Revision
}

// Import takes over the policies and tags of a deployed policy-server's tables, in one transaction. The zero Config means the store's own database. Rows that
// are no valid policies or groups are left out and named. It can be done once, and before anything else was stored: fault.Conflict, unless
// everything is there already as it should be, and when a deployed server
// writes meanwhile. It works without Run; running stores follow within a second.
func (s *Store) Import(ctx context.Context, from sqldb.Config) (Imported, error) {
	source := s.db
	if from != (sqldb.Config{}) {
		var err error
		if source, err = sqldb.Open(ctx, from); err != nil {
			return Imported{}, err
		}
		defer source.Close()
	}
	d, err := readDeployed(ctx, source)
	if sqldb.IsMissing(err) {
		return Imported{}, fault.New(fault.NotFound, fmt.Errorf("the database has no tables of a deployed policy-server: %w", err))
	}
	if err != nil {
		return Imported{}, fmt.Errorf("read the deployed policy-server's tables: %w", err)
	}
	var head revision.Revision
	err = s.db.Again(ctx, func(int) error {
		st, err := read(ctx, s.db, -1)
		if err != nil {
			return err
		}
		head, err = s.takeOver(ctx, st, d)
		return err
	})
	if err != nil {
		return Imported{}, fmt.Errorf("import policies: %w", err)
	}
	n, err := s.groups.importGroups(ctx, source, d)
	if err != nil {
		return Imported{}, fmt.Errorf("import security groups: %w", err)
	}
	return Imported{Policies: len(d.rows), Groups: len(d.groups), SecurityGroups: n, Skipped: d.skipped, Reasons: d.reasons, Revision: head}, nil
}

// takeOver stores what was read, unless it is there already.
func (s *Store) takeOver(ctx context.Context, st *stored, d *deployed) (revision.Revision, error) {
	if st.holds(d) && (st.imported != 0 || len(d.groups) > 0) {
		return st.Revision, nil
	}
	live := slices.ContainsFunc(st.rows, func(r storedRow) bool { return !r.gone })
	switch {
	case st.imported != 0:
		return revision.Revision{}, fault.Conflictf("policies were imported before, and differ by now: import is for an empty store")
	case live || len(st.groups) > 0:
		return revision.Revision{}, fault.Conflictf("the store has policies or tags already: import is for an empty store")
	}
	to := st.next()
	to.imported, to.stamp = max(st.now(), 1), max(to.stamp, (d.updated/1000+1)*1000)
	w := &series{dialect: s.db.Dialect()}
	w.record(change{tagged: d.groups, add: d.rows}, to.Counter, st.now())
	w.advance(st.state, to)
	_, err := s.db.Atomic(ctx, w.list)
	return to.Revision, err
}

// holds reports whether everything of d is there.
func (s *stored) holds(d *deployed) bool {
	tags, rows := map[identity.Tagged]bool{}, map[storedRow]bool{}
	for _, g := range s.groups {
		tags[g.Tagged] = !g.free
	}
	for _, r := range s.rows {
		r.changed = 0
		rows[r] = true
	}
	for _, g := range d.groups {
		if !tags[g.Tagged] {
			return false
		}
	}
	for _, r := range d.rows {
		if !rows[storedRow{source: r.source.Tag, destination: r.destination.Tag, protocol: r.protocol, ports: r.ports}] {
			return false
		}
	}
	return true
}

// deployed is what the tables of a deployed policy-server hold.
type deployed struct {
	groups  []*group
	rows    []row
	updated int64 // nanoseconds since 1970
	skipped int
	reasons []string
}

func (d *deployed) skip(format string, args ...any) {
	d.skipped++
	if len(d.reasons) < maxNames {
		d.reasons = append(d.reasons, fmt.Sprintf(format, args...))
	}
}

// readDeployed reads the tables groups, destinations, policies and policies_info, one after the other. What others write meanwhile could give a policy to the
// group that had a tag before: then it is fault.Conflict.
func readDeployed(ctx context.Context, q sqldb.Querier) (*deployed, error) {
	d, again := &deployed{}, &deployed{}
	byID := map[int64]*group{}
	err := d.readUpdated(ctx, q)
	if err == nil {
		err = d.readGroups(ctx, q, byID)
	}
	if err == nil {
		err = d.readPolicies(ctx, q, byID)
	}
	if err == nil {
		err = again.readGroups(ctx, q, map[int64]*group{})
	}
	if err == nil {
		err = again.readUpdated(ctx, q)
	}
	if err != nil {
		return nil, err
	}
	if d.updated != again.updated || !slices.EqualFunc(d.groups, again.groups, func(a, b *group) bool { return a.Tagged == b.Tagged }) {
		return nil, fault.Conflictf("a deployed policy-server wrote meanwhile: stop it first")
	}
	return d, nil
}

// quoted is a name that MySQL reserves.
func quoted(d sqldb.Dialect, name string) string {
	if d.Name == sqldb.MySQL {
		return "`" + name + "`"
	}
	return `"` + name + `"`
}

func (d *deployed) readGroups(ctx context.Context, q sqldb.Querier, byID map[int64]*group) error {
	rows, err := q.Query(ctx, "SELECT id, guid, type FROM "+quoted(q.Dialect(), "groups")+" WHERE guid IS NOT NULL ORDER BY id")
	if err != nil {
		return err
	}
	defer rows.Close()
	seen := map[identity.Group]bool{}
	for rows.Next() {
		var id int64
		var guid, kind sql.NullString
		if err := rows.Scan(&id, &guid, &kind); err != nil {
			return sqldb.Failure(err)
		}
		g := newGroup(identity.Tagged{Group: identity.Group(guid.String), Tag: identity.Tag(id), Kind: cmp.Or(kind.String, identity.App)})
		err := g.Group.Validate()
		switch {
		case id < 1 || id > int64(identity.MaxTag):
			d.skip("group %d (%.100q): its number is no tag", id, guid.String)
		case err != nil:
			d.skip("group %d: %v", id, err)
		case identity.Group(g.Kind).Validate() != nil:
			d.skip("group %d (%.100q): type %.100q is none", id, guid.String, kind.String)
		case seen[g.Group]:
			d.skip("group %d (%.100q): another has the same guid", id, guid.String)
		default:
			seen[g.Group], byID[id] = true, g
			d.groups = append(d.groups, g)
		}
	}
	return sqldb.Failure(rows.Err())
}

func (d *deployed) readPolicies(ctx context.Context, q sqldb.Querier, byID map[int64]*group) error {
	rows, err := q.Query(ctx, `SELECT p.id, p.group_id, d.group_id, d.protocol, d.start_port, d.end_port FROM policies p
		LEFT JOIN destinations d ON d.id = p.destination_id ORDER BY p.id`)
	if err != nil {
		return err
	}
	defer rows.Close()
	seen := map[row]bool{}
	for rows.Next() {
		var id int64
		var from, to, first, last sql.NullInt64
		var protocol sql.NullString
		if err := rows.Scan(&id, &from, &to, &protocol, &first, &last); err != nil {
			return sqldb.Failure(err)
		}
		r := newRow(byID[from.Int64], byID[to.Int64], policy.Ports{}, 0)
		var perr error
		r.protocol, perr = policy.ParseProtocol(protocol.String)
		switch {
		case r.source == nil:
			d.skip("policy %d: its source, group %d, is missing", id, from.Int64)
		case r.destination == nil:
			d.skip("policy %d: its destination, group %d, is missing", id, to.Int64)
		case r.source.Kind != identity.App || r.destination.Kind != identity.App:
			d.skip("policy %d: a group of it is of another type than %q", id, identity.App)
		case perr != nil:
			d.skip("policy %d: %v", id, perr)
		case first.Int64 < 1 || last.Int64 < first.Int64 || last.Int64 > 65535:
			d.skip("policy %d: ports %d to %d are no range within 1-65535", id, first.Int64, last.Int64)
		default:
			if r.ports = (policy.Ports{First: uint16(first.Int64), Last: uint16(last.Int64)}); !seen[r] {
				seen[r] = true
				d.rows = append(d.rows, r)
			}
		}
	}
	return sqldb.Failure(rows.Err())
}

// readUpdated reads the stamp as the deployed server does: whatever the time zone, the value is taken for UTC. Without one it is 0.
func (d *deployed) readUpdated(ctx context.Context, q sqldb.Querier) error {
	var v any
	err := q.QueryRow(ctx, "SELECT last_updated FROM policies_info ORDER BY id LIMIT 1").Scan(&v)
	if errors.Is(err, fault.NotFound) || sqldb.IsMissing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	switch v := v.(type) {
	case time.Time:
		d.updated = stampOf(v)
	case []byte:
		d.updated, err = parseStamp(string(v))
	case string:
		d.updated, err = parseStamp(v)
	}
	if err != nil {
		d.skip("%v", err)
	}
	return nil
}

// stampOf returns the nanoseconds that a clock with v's face shows in UTC; 0 for what has no such number.
func stampOf(v time.Time) int64 {
	v = time.Date(v.Year(), v.Month(), v.Day(), v.Hour(), v.Minute(), v.Second(), v.Nanosecond(), time.UTC)
	if v.Year() < 1970 || v.Year() > 2200 {
		return 0
	}
	return v.UnixNano()
}

// parseStamp reads a time as databases write it: "2026-01-02 03:04:05.123456", with or without a fraction, a T or a zone.
func parseStamp(s string) (int64, error) {
	text := strings.Replace(s, "T", " ", 1)
	if len(text) > len(time.DateTime) {
		if i := strings.IndexAny(text[len(time.DateTime):], "Z+- "); i >= 0 {
			text = text[:len(time.DateTime)+i]
		}
	}
	t, err := time.Parse(time.DateTime, text)
	if err != nil {
		return 0, fault.Invalidf("policies_info.last_updated %.40q: expected a time", s)
	}
	return stampOf(t), nil
}
