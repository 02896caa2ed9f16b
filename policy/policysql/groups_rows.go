package policysql

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

//go:embed groups
var groupMigrations embed.FS

func groupMigrationFiles() fs.FS {
	f, err := fs.Sub(groupMigrations, "groups")
	if err != nil {
		panic(err) // the directory is part of the binary
	}
	return f
}

// groupSchema is the name under which the steps of the tables of security groups are recorded.
const groupSchema = "secgroup"

// groupState is the row of silk_security_revision, with the epoch of policies.
type groupState struct {
	revision.Revision
	digest   string
	next     int64
	stamp    string // of Cloud Controller
	imported int64
	any      bool // readGroupState: there are groups
}

// groupRow is a row of silk_security_groups.
type groupRow struct {
	secgroup.Kept
	id      int64
	changed uint64
	digest  secgroup.Digest
}

// readGroupState returns the revision. No revision is fault.NotFound.
func readGroupState(ctx context.Context, q sqldb.Querier) (st groupState, err error) {
	var some int
	err = q.QueryRow(ctx, `SELECT p.epoch, g.counter, g.digest, g.next_id, g.cc_stamp, g.imported_at, CASE WHEN EXISTS (SELECT 1 FROM silk_security_groups) THEN 1 ELSE 0 END
		FROM silk_security_revision g, silk_policy_revision p WHERE g.id = 1 AND p.id = 1`).Scan(&st.Epoch, &st.Counter, &st.digest, &st.next, &st.stamp, &st.imported, &some)
	if err != nil {
		return groupState{}, fmt.Errorf("read revision of security groups: %w", err)
	}
	st.any = some == 1
	return st, nil
}

// storedGroups is what one statement read.
type storedGroups struct {
	groupState
	ids     []int64    // of all rows, sorted
	rows    []groupRow // that changed
	invalid []string   // rows that cannot be read
	bad     map[string]int64
}

// readGroups returns the revision and, in one statement and so of the same moment, which groups there are and those that changed after a
// counter (-1: all). No revision is fault.NotFound.
func readGroups(ctx context.Context, q sqldb.Querier, after int64) (*storedGroups, error) {
	rows, err := q.Query(ctx, `SELECT 0, g.counter, g.next_id, g.imported_at, 0, p.epoch, g.digest, g.cc_stamp, '', '', '' FROM silk_security_revision g, silk_policy_revision p
			WHERE g.id = 1 AND p.id = 1
		UNION ALL SELECT 1, id, 0, 0, 0, '', '', '', '', '', '' FROM silk_security_groups
		UNION ALL SELECT 2, id, defaults, kept, changed, guid, name, rules, staging_spaces, running_spaces, members FROM silk_security_groups WHERE changed > ?`, after)
	if err != nil {
		return nil, fmt.Errorf("read security groups: %w", err)
	}
	defer rows.Close()
	s := &storedGroups{bad: map[string]int64{}}
	for rows.Next() {
		var what, a, b, c, d int64
		var t [6]string
		if err := rows.Scan(&what, &a, &b, &c, &d, &t[0], &t[1], &t[2], &t[3], &t[4], &t[5]); err != nil {
			return nil, fmt.Errorf("read security groups: %w", sqldb.Failure(err))
		}
		switch what {
		case 0:
			s.groupState = groupState{Revision: revision.Revision{Epoch: t[0], Counter: uint64(a)}, digest: t[1], next: b, stamp: t[2], imported: c}
		case 1:
			s.ids = append(s.ids, a)
		default:
			r, err := newGroupRow(a, b, c, d, t)
			if err != nil {
				s.bad[t[0]] = a
				s.invalid = append(s.invalid, fmt.Sprintf("security group %d (%.100q): %v", a, t[0], err))
				continue
			}
			s.rows = append(s.rows, r)
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read security groups: %w", sqldb.Failure(err))
	}
	if s.Epoch == "" {
		return nil, fault.NotFoundf("table silk_security_revision is empty")
	}
	slices.Sort(s.ids)
	slices.SortFunc(s.rows, func(a, b groupRow) int { return cmp.Compare(a.id, b.id) })
	return s, nil
}

// The bits of the column defaults.
const (
	stagingDefault = 1
	runningDefault = 2
)

func newGroupRow(id, defaults, kept, changed int64, t [6]string) (groupRow, error) {
	r := groupRow{id: id, changed: uint64(changed), Kept: secgroup.Kept{CloudController: kept == 1}}
	r.Record = secgroup.Record{GUID: t[0], Name: t[1], Rules: t[2], StagingDefault: defaults&stagingDefault != 0, RunningDefault: defaults&runningDefault != 0}
	for _, l := range []struct {
		text string
		into any
	}{{t[3], &r.StagingSpaces}, {t[4], &r.RunningSpaces}, {t[5], &r.Members}} {
		if err := json.Unmarshal([]byte(l.text), l.into); err != nil {
			return r, fmt.Errorf("list %.100q: %w", l.text, err)
		}
	}
	r.tidy()
	r.digest = r.Record.Digest()
	return r, r.Validate()
}

// tidy sorts lists, and makes empty ones nil, so that equal records are equal.
func (r *groupRow) tidy() {
	r.StagingSpaces, r.RunningSpaces, r.Members = distinctTexts(r.StagingSpaces), distinctTexts(r.RunningSpaces), distinctTexts(r.Members)
}

func distinctTexts[T ~string](list []T) []T {
	if len(list) == 0 {
		return nil
	}
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

// listText writes a list as JSON.
func listText[T ~string](list []T) string {
	if len(list) == 0 {
		return "[]"
	}
	b, err := json.Marshal(list)
	if err != nil {
		panic(err) // texts can be written
	}
	return string(b)
}

var upsertSecurityGroups = upsert{"silk_security_groups", "id", []string{"guid", "name", "rules", "defaults", "staging_spaces", "running_spaces", "members", "kept", "changed"}}

// groupChange is what a write comes to.
type groupChange struct {
	put    []groupRow
	remove []int64
	stamp  *string // of Cloud Controller; nil: as it was
	holder string  // who must still be the one who follows Cloud Controller; empty: anybody may write this
}

func (c groupChange) empty() bool { return len(c.put)+len(c.remove) == 0 && c.stamp == nil }

// series returns the statements that store a change, after which all groups have a digest.
func (c groupChange) series(d sqldb.Dialect, from, to groupState) []sqldb.Statement {
	w := &series{dialect: d}
	if c.holder != "" { // so that one who was asleep does not store what it read long ago
		w.add(1, "UPDATE silk_security_syncer SET holder = holder WHERE id = 1 AND holder = ? AND until_at > "+micros[d.Name], c.holder)
	}
	portions(c.remove, func(part []int64) {
		args := make([]any, len(part))
		for i, id := range part {
			args[i] = id
		}
		w.add(int64(len(part)), "DELETE FROM silk_security_groups WHERE id IN "+sqldb.Marks(1, len(part)), args...)
	})
	for _, r := range c.put { // one a statement, since their texts may be long
		defaults, kept := 0, 0
		if r.StagingDefault {
			defaults |= stagingDefault
		}
		if r.RunningDefault {
			defaults |= runningDefault
		}
		if r.CloudController {
			kept = 1
		}
		w.add(sqldb.Any, upsertSecurityGroups.text(d, 1), r.id, r.GUID, r.Name, r.Rules, defaults, listText(r.StagingSpaces), listText(r.RunningSpaces), listText[identity.Group](r.Members), kept,
			int64(to.Counter))
	}
	w.add(1, "UPDATE silk_security_revision SET counter = ?, digest = ?, next_id = ?, cc_stamp = ?, imported_at = ? WHERE id = 1 AND counter = ? AND digest = ? AND cc_stamp = ?",
		int64(to.Counter), to.digest, to.next, to.stamp, to.imported, int64(from.Counter), from.digest, from.stamp)
	return w.list
}
