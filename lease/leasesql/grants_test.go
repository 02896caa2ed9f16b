package leasesql_test

import (
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// count is how many rows of a table there are, -1 if that cannot be told.
func count(t testing.TB, db *sqldb.DB, from string) (n int) {
	if err := db.QueryRow(t.Context(), "SELECT COUNT(*) FROM "+from).Scan(&n); err != nil {
		return -1
	}
	return n
}

// TestGrantsAreRecords gives leases out and takes some back while they are recorded as grants only. Every store lists the same, also one that begins then, and when the
// grants have become records, that change nothing.
func TestGrantsAreRecords(t *testing.T) {
	cfg := testkit.Database(t, sqldb.Postgres)
	s, other, raw := open(t, config(cfg, wide(t))), open(t, config(cfg, wide(t))), connect(t, cfg)
	held := fillAtOnce(t, s, 60)
	if grants, records := count(t, raw, "silk_lease_grants"), count(t, raw, "silk_leases"); grants+records > 59 {
		t.Fatalf("%d grants and %d records of 60 leases, want some to be of several leases", grants, records)
	}
	for _, l := range held[:20] {
		if err := s.Release(t.Context(), l.Underlay); err != nil {
			t.Fatal(err)
		}
	}
	held = held[20:]
	lease.Sort(held)
	same := func(when string) {
		t.Helper()
		for i, x := range []interface {
			Must(testing.TB) *lease.Snapshot
		}{s, other, open(t, config(cfg, wide(t)))} {
			leasetest.Eventually(t, when+", a store lists all leases and no other", func() bool { return slices.Equal(x.Must(t).Leases, held) })
			if i == 1 { // watchers see a revision up to showGap later
				leasetest.Eventually(t, when+", a watcher is told of all leases", func() bool {
					u, err := other.Watch(t.Context(), lease.Revision{})
					return err == nil && u.Count == len(held)
				})
			}
		}
	}
	same("with grants")
	leasetest.Eventually(t, "the grants are records", func() bool { return count(t, raw, "silk_lease_grants") == 0 })
	if n := count(t, raw, "silk_leases"); n != 60 {
		t.Errorf("%d records, want one for each subnet that was ever used: 60", n)
	}
	if n := count(t, raw, "silk_leases WHERE state = 2"); n != 20 {
		t.Errorf("%d records of free subnets, want 20", n)
	}
	epoch := s.Must(t).Revision.Epoch
	same("without grants")
	if now := s.Must(t).Revision.Epoch; now != epoch {
		t.Errorf("the epoch is %s, was %s: the records were not what they should be", now, epoch)
	}
}

// TestUnreadableGrantHarmsNobody puts garbage into grants. No host is told that its lease is lost, and the garbage goes.
func TestUnreadableGrantHarmsNobody(t *testing.T) {
	cfg := testkit.Database(t, sqldb.Postgres)
	raw := connect(t, cfg)
	s := open(t, config(cfg, wide(t)))
	held := fillAtOnce(t, s, 3)
	exec(t, raw, `INSERT INTO silk_lease_grants (counter, subnets, hosts, macs, ids)
		SELECT counter + 1, '{garbage,NULL,10.255.9.0/24}', '{fd00::1}', '{x,y,z,ee}', '{}' FROM silk_lease_revision`)
	exec(t, raw, "UPDATE silk_lease_revision SET counter = counter + 1")
	harmsNobody(t, s, cfg, held, func() bool {
		return count(t, raw, "silk_lease_grants") == 0 && count(t, raw, "silk_leases WHERE overlay_subnet = 'garbage' OR underlay_ip = ''") == 0
	})
}
