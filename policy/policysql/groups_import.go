package policysql

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/secgroup"
)

// importGroups takes over the table security_groups of a deployed policy-server, once, if there are no groups yet. Without that table there
// is nothing to do. Its groups follow Cloud Controller, as they did.
func (g *SecurityGroups) importGroups(ctx context.Context, source sqldb.Querier, d *deployed) (int, error) {
	rows, err := d.readSecurityGroups(ctx, source)
	if sqldb.IsMissing(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the deployed policy-server's security groups: %w", err)
	}
	taken := 0
	_, err = g.write(ctx, func(v *groupView) (groupChange, error) {
		taken = 0
		for _, r := range rows {
			if i, ok := v.byGUID[r.GUID]; ok && v.rows[i].Record.Equal(r.Record) {
				taken++
			}
		}
		if len(v.rows) > 0 {
			if taken < len(rows) {
				d.skip("%d security groups: there are others already", len(rows)-taken)
			}
			return groupChange{}, nil
		}
		taken = len(rows)
		return groupChange{put: rows}, nil
	})
	return taken, err
}

// readSecurityGroups reads the table. What cannot be read of it is left out and told.
func (d *deployed) readSecurityGroups(ctx context.Context, q sqldb.Querier) ([]groupRow, error) {
	text := "text"
	if q.Dialect().Name == sqldb.MySQL {
		text = "char"
	}
	rows, err := q.Query(ctx, "SELECT id, guid, name, rules, staging_default, running_default, CAST(staging_spaces AS "+text+"), CAST(running_spaces AS "+text+") FROM security_groups ORDER BY id")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []groupRow
	for rows.Next() {
		var id int64
		var guid, name, rules, staging, running sql.NullString
		var sd, rd sql.NullBool
		if err := rows.Scan(&id, &guid, &name, &rules, &sd, &rd, &staging, &running); err != nil {
			return nil, sqldb.Failure(err)
		}
		r := groupRow{id: id, Kept: secgroup.Kept{CloudController: true}}
		r.Record = secgroup.Record{GUID: guid.String, Name: name.String, StagingDefault: sd.Bool, RunningDefault: rd.Bool}
		if id < 1 || id >= 1<<idBits {
			d.skip("security group %d (%.100q): its number is out of range", id, guid.String)
			continue
		}
		if err := r.readDeployed(rules.String, staging.String, running.String); err != nil {
			d.skip("security group %d (%.100q): %v", id, guid.String, err)
			continue
		}
		all = append(all, r)
	}
	return all, sqldb.Failure(rows.Err())
}

func (r *groupRow) readDeployed(rules, staging, running string) error {
	for _, l := range []struct {
		text string
		into *[]string
	}{{staging, &r.StagingSpaces}, {running, &r.RunningSpaces}} {
		if l.text == "" { // the column is NULL
			continue
		}
		if err := json.Unmarshal([]byte(l.text), l.into); err != nil {
			return fmt.Errorf("spaces %.100q: %w", l.text, err)
		}
	}
	var err error
	if strings.TrimSpace(rules) == "" {
		rules = "[]"
	}
	if r.Rules, _, err = secgroup.Normalize([]byte(rules)); err != nil {
		return err
	}
	r.tidy()
	return r.Validate()
}
