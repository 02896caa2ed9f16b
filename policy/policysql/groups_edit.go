package policysql

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

const (
	maxSecurityGroups = 20000
	maxRules          = 12 << 20 // of the text of a group's rules, in bytes: what the deployed tables hold
)

// judge reports, as fault.Invalid, a record of people that cannot be kept, and puts its rules into the one form in which they are.
func judge(r *secgroup.Record) error {
	if err := r.Validate(); err != nil {
		return err
	}
	rules, err := secgroup.CloudController.Parse([]byte(r.Rules))
	if err != nil {
		return err
	}
	if r.Rules = secgroup.Format(rules); len(r.Rules) > maxRules {
		return fault.Invalidf("rules have %d bytes: expected at most %d; make several groups", len(r.Rules), maxRules)
	}
	return nil
}

// Create implements secgroup.Book. Exhausted: there are 20,000 groups.
func (g *SecurityGroups) Create(ctx context.Context, r secgroup.Record) (secgroup.Kept, error) {
	if r.GUID == "" {
		r.GUID = newGUID()
	}
	if err := judge(&r); err != nil {
		return secgroup.Kept{}, fmt.Errorf("create security group: %w", err)
	}
	made := groupRow{Kept: secgroup.Kept{Record: r}}
	made.tidy()
	_, err := g.write(ctx, func(v *groupView) (groupChange, error) {
		if _, ok := v.byGUID[r.GUID]; ok {
			return groupChange{}, fault.Conflictf("there is a security group with guid %q", r.GUID)
		}
		if err := v.nameIsFree(r.Name, r.GUID); err != nil {
			return groupChange{}, err
		}
		if len(v.rows) >= maxSecurityGroups {
			return groupChange{}, fault.Exhaustedf("there are %d security groups: expected at most %d", len(v.rows), maxSecurityGroups)
		}
		made.id = v.next
		c := groupChange{put: []groupRow{made}}
		c.replaceBad(v)
		return c, nil
	})
	if err != nil {
		return secgroup.Kept{}, fmt.Errorf("create security group: %w", err)
	}
	return made.Kept, nil
}

func (v *groupView) nameIsFree(name, guid string) error {
	for _, r := range v.rows {
		if r.Name == name && r.GUID != guid {
			return fault.Conflictf("there is a security group with name %q, its guid is %s", name, r.GUID)
		}
	}
	return nil
}

// replaceBad removes rows that cannot be read and have the GUID of one that is stored.
func (c *groupChange) replaceBad(v *groupView) {
	for _, r := range c.put {
		if id, ok := v.bad[r.GUID]; ok && id != r.id {
			c.remove = append(c.remove, id)
		}
	}
}

// Change implements secgroup.Book.
func (g *SecurityGroups) Change(ctx context.Context, guid string, change secgroup.Change) (secgroup.Kept, error) {
	var now secgroup.Kept
	_, err := g.write(ctx, func(v *groupView) (groupChange, error) {
		i, ok := v.byGUID[guid]
		if !ok {
			return groupChange{}, notThere(guid)
		}
		r := v.rows[i]
		was := r.Record
		change.Apply(&r.Record)
		if foreign := r.Record; r.CloudController && g.s.cfg.CloudController {
			if foreign.Members = was.Members; !foreign.Equal(was) {
				return groupChange{}, managed(was.Name)
			}
			if err := r.Validate(); err != nil {
				return groupChange{}, err
			}
		} else if err := judge(&r.Record); err != nil {
			return groupChange{}, err
		}
		if r.tidy(); r.Name != was.Name {
			if err := v.nameIsFree(r.Name, guid); err != nil {
				return groupChange{}, err
			}
		}
		if now = r.Kept; r.Record.Equal(was) {
			return groupChange{}, nil
		}
		return groupChange{put: []groupRow{r}}, nil
	})
	if err != nil {
		return secgroup.Kept{}, fmt.Errorf("change security group: %w", err)
	}
	return now, nil
}

func notThere(guid string) error {
	return fault.NotFoundf("there is no security group with guid %.60q", guid)
}

func managed(name string) error {
	return fault.Conflictf("security group %q follows Cloud Controller: change it there (cf update-security-group, cf bind-security-group); only policy groups are bound here", name)
}

// Delete implements secgroup.Book.
func (g *SecurityGroups) Delete(ctx context.Context, guid string) error {
	_, err := g.write(ctx, func(v *groupView) (groupChange, error) {
		i, ok := v.byGUID[guid]
		switch {
		case !ok:
			return groupChange{}, notThere(guid)
		case v.rows[i].CloudController && g.s.cfg.CloudController:
			return groupChange{}, managed(v.rows[i].Name)
		}
		return groupChange{remove: []int64{v.rows[i].id}}, nil
	})
	if err != nil {
		return fmt.Errorf("delete security group: %w", err)
	}
	return nil
}

// Replacement is all groups that Cloud Controller has.
type Replacement struct {
	Groups []secgroup.Record // without members, in Cloud Controller's order; each GUID once
	Keep   []string          // GUIDs of others that it has but that could not be read: they stay as they are
	Stamp  string            // of the list, in Cloud Controller's words, at most 64 bytes
	Holder string            // who must hold the lease at that moment; see Hold
}

// Replaced is what a Replacement came to.
type Replaced struct {
	Revision                revision.Revision
	Added, Changed, Removed int
}

// Replace makes the groups that follow Cloud Controller those of a list, which must be complete, in one transaction that writes only what
// differs. Groups of people stay, and so do the members of all. Denied: somebody else follows Cloud Controller by now.
func (g *SecurityGroups) Replace(ctx context.Context, all Replacement) (Replaced, error) {
	for _, r := range all.Groups {
		if err := r.Validate(); err != nil {
			return Replaced{}, fmt.Errorf("replace security groups: %w", err)
		}
	}
	var did Replaced
	at, err := g.write(ctx, func(v *groupView) (groupChange, error) {
		if err := g.holds(ctx, all.Holder); err != nil {
			return groupChange{}, err
		}
		var c groupChange
		c, did = v.replace(all)
		return c, nil
	})
	if err != nil {
		return Replaced{}, fmt.Errorf("replace security groups: %w", err)
	}
	did.Revision = at
	return did, nil
}

// replace returns what a list differs in.
func (v *groupView) replace(all Replacement) (c groupChange, did Replaced) {
	c.holder = all.Holder
	if v.stamp != all.Stamp {
		c.stamp = &all.Stamp
	}
	there := make(map[string]bool, len(all.Groups)+len(all.Keep))
	for _, guid := range all.Keep {
		there[guid] = true
	}
	next := v.next
	for _, r := range all.Groups {
		there[r.GUID] = true
		row := groupRow{Kept: secgroup.Kept{Record: r, CloudController: true}}
		i, ok := v.byGUID[r.GUID]
		if ok {
			row.id, row.Members = v.rows[i].id, v.rows[i].Members
			if row.tidy(); row.Record.Equal(v.rows[i].Record) && v.rows[i].CloudController {
				continue
			}
			did.Changed++
		} else {
			row.id = next
			next++
			did.Added++
		}
		c.put = append(c.put, row)
	}
	for _, r := range v.rows {
		if r.CloudController && !there[r.GUID] {
			c.remove = append(c.remove, r.id)
			did.Removed++
		}
	}
	c.replaceBad(v)
	return c, did
}

// Stamp returns that of the last Replacement, empty if there was none or what it left is in doubt.
func (g *SecurityGroups) Stamp(ctx context.Context) (string, error) {
	st, err := readGroupState(ctx, g.s.db)
	return st.stamp, err
}

// maxLease is longer than any lease that Hold gives: one that ends later was given by a clock that has gone back since.
const maxLease = 2 * time.Minute

// Hold makes holder, for a time by the database's clock, the one that follows Cloud Controller, unless another one is. It is called again
// before that time is over. It reports whether it is.
func (g *SecurityGroups) Hold(ctx context.Context, holder string, lease time.Duration) (bool, error) {
	now := micros[g.s.db.Dialect().Name]
	var n int64
	err := g.s.db.Again(ctx, func(int) (err error) {
		n, err = g.s.db.Exec(ctx, "UPDATE silk_security_syncer SET holder = ?, until_at = "+now+" + ? WHERE id = 1 AND (holder = ? OR until_at < "+now+" OR until_at > "+now+" + ?)",
			holder, min(lease, maxLease).Microseconds(), holder, maxLease.Microseconds())
		return err
	})
	if err != nil {
		return false, fmt.Errorf("hold the lease of who follows cloud controller: %w", err)
	}
	return n == 1, nil
}

// holds fails with fault.Denied unless holder has the lease.
func (g *SecurityGroups) holds(ctx context.Context, holder string) error {
	var n int
	err := g.s.db.QueryRow(ctx, "SELECT id FROM silk_security_syncer WHERE id = 1 AND holder = ? AND until_at > "+micros[g.s.db.Dialect().Name], holder).Scan(&n)
	if errors.Is(err, fault.NotFound) {
		return fault.Deniedf("another policy-server follows cloud controller by now")
	}
	return err
}

// LetGo ends what Hold began.
func (g *SecurityGroups) LetGo(ctx context.Context, holder string) error {
	_, err := g.s.db.Exec(ctx, "UPDATE silk_security_syncer SET until_at = 0 WHERE id = 1 AND holder = ?", holder)
	return err
}

// newGUID returns a random UUID (RFC 9562, version 4).
func newGUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
