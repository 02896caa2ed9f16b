package policysql

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
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

// schema is the name under which the steps of this package's tables are recorded.
const schema = "policy"

// micros is an expression for the time of the statement in microseconds since 1970, by the clock of the database.
var micros = map[string]string{
	sqldb.SQLite:   "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
	sqldb.Postgres: "floor(extract(epoch from statement_timestamp()) * 1000000)::bigint",
	sqldb.MySQL:    "(CAST(UNIX_TIMESTAMP() AS SIGNED) * 1000000 + MICROSECOND(NOW(6)))", // a time with a fraction would be ambiguous when summer ends
}

// state is the row of silk_policy_revision, with the time of the database when it was read.
type state struct {
	revision.Revision
	pruned   uint64
	stamp    int64
	imported int64
	micros   int64
	read     time.Time // not before micros
}

// now returns the time of the database in microseconds, or a little less.
func (st state) now() int64 { return st.micros + time.Since(st.read).Microseconds() }

// readState returns the revision. No revision is fault.NotFound.
func readState(ctx context.Context, q sqldb.Querier) (st state, err error) {
	err = q.QueryRow(ctx, "SELECT epoch, counter, pruned, stamp, imported_at, "+micros[q.Dialect().Name]+" FROM silk_policy_revision WHERE id = 1").
		Scan(&st.Epoch, &st.Counter, &st.pruned, &st.stamp, &st.imported, &st.micros)
	if err != nil {
		return state{}, fmt.Errorf("read revision: %w", err)
	}
	st.read = time.Now()
	return st, nil
}

// storedGroup is a row of silk_policy_groups.
type storedGroup struct {
	identity.Tagged        // who has the tag, or had it last, if that is known
	free            bool   // nobody has it
	freedAt         int64  // since when
	assigned        uint64 // counter when it was given to the group
	bad             bool   // the name cannot be read
}

// storedRow is a row of silk_policies.
type storedRow struct {
	source, destination identity.Tag
	protocol            policy.Protocol
	ports               policy.Ports
	gone                bool
	changed             uint64
}

// stored is what one statement read.
type stored struct {
	state
	groups  []storedGroup
	rows    []storedRow // by counter
	invalid []string    // rows that cannot be read
}

// maxCounter is more than any counter.
const maxCounter = 1<<63 - 1

// read returns the revision and, in one statement and so of the same moment, everything that changed after a counter (-1: all). No revision is fault.NotFound.
func read(ctx context.Context, q sqldb.Querier, after int64) (*stored, error) {
	rows, err := q.Query(ctx, `SELECT 0, counter, pruned, stamp, imported_at, `+micros[q.Dialect().Name]+`, 0, epoch, '' FROM silk_policy_revision WHERE id = 1
		UNION ALL SELECT 1, tag, freed_at, assigned, CASE WHEN name IS NULL THEN 1 ELSE 0 END, 0, 0, COALESCE(name, former), kind FROM silk_policy_groups WHERE changed > ?
		UNION ALL SELECT 2, source_tag, destination_tag, changed, protocol * 2 + gone, first_port, last_port, NULL, '' FROM silk_policies WHERE changed > ?`, after, after)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	defer rows.Close()
	s := &stored{}
	for rows.Next() {
		var what, a, b, c, d, e, f int64
		var name, kind sql.NullString
		if err := rows.Scan(&what, &a, &b, &c, &d, &e, &f, &name, &kind); err != nil {
			return nil, fmt.Errorf("read policies: %w", sqldb.Failure(err))
		}
		switch what {
		case 0:
			s.state = state{Revision: revision.Revision{Epoch: name.String, Counter: uint64(a)}, pruned: uint64(b), stamp: c, imported: d, micros: e}
		case 1:
			s.addGroup(a, b, c, d == 1, name.String, kind.String)
		default:
			s.addRow(a, b, c, d, e, f)
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read policies: %w", sqldb.Failure(err))
	}
	if s.Epoch == "" {
		return nil, fault.NotFoundf("table silk_policy_revision is empty")
	}
	s.state.read = time.Now()
	slices.SortStableFunc(s.rows, func(a, b storedRow) int { return cmp.Compare(a.changed, b.changed) })
	return s, nil
}

// kinds are those of nearly all groups, which share them in memory.
var kinds = map[string]string{identity.App: identity.App, identity.Router: identity.Router}

func (s *stored) addGroup(tag, freedAt, assigned int64, free bool, name, kind string) {
	if tag < 1 || tag > int64(identity.MaxTag) {
		s.invalid = append(s.invalid, fmt.Sprintf("group %.100q: tag %d is none", name, tag))
		return
	}
	g := storedGroup{Tagged: identity.Tagged{Group: identity.Group(name), Tag: identity.Tag(tag), Kind: cmp.Or(kinds[kind], kind)}, free: free,
		freedAt: max(freedAt, 1), assigned: uint64(assigned)}
	if err := g.Group.Validate(); err != nil {
		if g.Group, g.bad = "", true; !free {
			s.invalid = append(s.invalid, fmt.Sprintf("tag %v: %v", g.Tag, err))
		}
	}
	s.groups = append(s.groups, g)
}

func (s *stored) addRow(source, destination, changed, how, first, last int64) {
	tags := func(t int64) bool { return t >= 1 && t <= int64(identity.MaxTag) }
	protocol := how / 2
	if !tags(source) || !tags(destination) || protocol != int64(policy.TCP) && protocol != int64(policy.UDP) || first < 1 || last < first || last > 65535 {
		if how%2 == 0 {
			s.invalid = append(s.invalid, fmt.Sprintf("policy from tag %d to tag %d, protocol %d, ports %d to %d: out of range", source, destination, protocol, first, last))
		}
		return
	}
	s.rows = append(s.rows, storedRow{source: identity.Tag(source), destination: identity.Tag(destination), protocol: policy.Protocol(protocol),
		ports: policy.Ports{First: uint16(first), Last: uint16(last)}, gone: how%2 == 1, changed: uint64(changed)})
}

// series is the statements of one transaction.
type series struct {
	dialect sqldb.Dialect
	list    []sqldb.Statement
}

func (w *series) add(want int64, text string, args ...any) {
	w.list = append(w.list, sqldb.Statement{Text: text, Args: args, Want: want})
}

// chunk is how many rows one statement handles at most: SQLite and PostgreSQL limit the number of arguments.
const chunk = 256

// portions cuts a list into parts whose lengths are powers of two, chunk at most, so that lists of all lengths need only few different statements.
func portions[T any](list []T, f func(part []T)) {
	for size := chunk; len(list) > 0; {
		if len(list) < size {
			size /= 2
			continue
		}
		f(list[:size])
		list = list[size:]
	}
}

var (
	upsertGroups = upsert{"silk_policy_groups", "tag", []string{"name", "former", "kind", "freed_at", "assigned", "changed"}}
	upsertRows   = upsert{"silk_policies", "source_tag, destination_tag, protocol, first_port, last_port", []string{"gone", "changed"}}
	upsertHosts  = upsert{"silk_policy_hosts", "host", []string{"server", "claimed_at"}}
	upsertServer = upsert{"silk_policy_servers", "id", []string{"epoch", "seen", "low", "reporting", "silent", "behind", "lagging", "deployed_at", "beat_at"}}
)

// upsert is an insert that overwrites rows which are there.
type upsert struct {
	table, key string
	others     []string
}

func (u upsert) text(d sqldb.Dialect, rows int) string {
	keys := strings.Count(u.key, ",") + 1
	return "INSERT INTO " + u.table + " (" + u.key + ", " + strings.Join(u.others, ", ") + ") VALUES " + sqldb.Marks(rows, keys+len(u.others)) + d.Upsert(u.key, u.others...)
}

// put stores rows by an upsert. args returns the values of one.
func put[T any](w *series, u upsert, list []T, args func(v T) []any) {
	portions(list, func(part []T) {
		var all []any
		for _, v := range part {
			all = append(all, args(v)...)
		}
		w.add(sqldb.Any, u.text(w.dialect, len(part)), all...)
	})
}

// record stores a change at a counter; tags are freed at a time.
func (w *series) record(c change, counter uint64, now int64) {
	portions(c.freed, func(part []*group) {
		args := []any{now, int64(counter)}
		for _, g := range part {
			args = append(args, int64(g.Tag))
		}
		w.add(int64(len(part)), "UPDATE silk_policy_groups SET former = name, name = NULL, freed_at = ?, changed = ? WHERE name IS NOT NULL AND tag IN "+
			sqldb.Marks(1, len(part)), args...)
	})
	put(w, upsertGroups, c.tagged, func(g *group) []any {
		return []any{int64(g.Tag), string(g.Group), "", g.Kind, int64(0), int64(counter), int64(counter)}
	})
	gone := int64(1)
	values := func(r row) []any {
		return []any{int64(r.source.Tag), int64(r.destination.Tag), int64(r.protocol), int64(r.ports.First), int64(r.ports.Last), gone, int64(counter)}
	}
	put(w, upsertRows, c.remove, values)
	gone = 0
	put(w, upsertRows, c.add, values)
}

// free makes tags known as free.
func (w *series) free(tags []freedTag, counter uint64) {
	put(w, upsertGroups, tags, func(t freedTag) []any {
		return []any{int64(t.tag), sql.NullString{}, "", "", t.at, int64(counter), int64(counter)}
	})
}

// advance moves the revision from what it was read as to the next. It is the last statement of its transaction.
func (w *series) advance(from, to state) {
	w.add(1, "UPDATE silk_policy_revision SET counter = ?, epoch = ?, pruned = ?, stamp = ?, imported_at = ? WHERE id = 1 AND epoch = ? AND counter = ?",
		int64(to.Counter), to.Epoch, int64(to.pruned), to.stamp, to.imported, from.Epoch, int64(from.Counter))
}

// next returns the state after one change more: the counter grows by one, the stamp by a microsecond at least.
func (st state) next() state {
	to := st
	to.Counter++
	to.stamp = max(st.stamp/1000+1, st.now()) * 1000
	return to
}
