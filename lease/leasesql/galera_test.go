package leasesql_test

import (
	"database/sql"
	"errors"
	"slices"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/lease/leasetest"
)

// TestGalera has a controller at each node of a cluster, which does not lock rows across nodes: whoever commits second fails then.
func TestGalera(t *testing.T) {
	nodes := testkit.Galera(t)
	stores := []*leasesql.Store{open(t, config(nodes[0], wide(t))), open(t, config(nodes[1], wide(t)))}
	got := make([]lease.Lease, 255)
	var wg sync.WaitGroup
	next := make(chan int)
	for g := range 32 {
		wg.Go(func() {
			for i := range next {
				s := stores[g%2]
				var err error
				if got[i], err = s.Acquire(t.Context(), leasetest.Host(i), lease.Block); err != nil {
					t.Errorf("host %d: %v", i, err)
				}
				if err := stores[(g+1)%2].Renew(t.Context(), got[i]); err != nil {
					t.Errorf("host %d at the other node: %v", i, err)
				}
			}
		})
	}
	for i := range got {
		next <- i
	}
	close(next)
	wg.Wait()
	lease.Sort(got)
	for i, s := range stores {
		leasetest.Eventually(t, "every lease is listed", func() bool { return slices.Equal(list(t, s), got) })
		if _, err := s.Acquire(t.Context(), leasetest.Host(999), lease.Block); !errors.Is(err, fault.Exhausted) {
			t.Errorf("node %d: %v, want an Exhausted fault", i, err)
		}
	}
	retries := stores[0].DBCounts().Retries + stores[1].DBCounts().Retries
	var conflicts int64
	for _, n := range nodes {
		var name string
		var failed int64
		if err := connect(t, n).QueryRow(t.Context(), "SHOW STATUS LIKE 'wsrep_local_cert_failures'").Scan(&name, &failed); err != nil {
			t.Fatal(err)
		}
		conflicts += failed
		if err := connect(t, n).QueryRow(t.Context(), "SHOW STATUS LIKE 'wsrep_local_bf_aborts'").Scan(&name, &failed); err != nil {
			t.Fatal(err)
		}
		conflicts += failed
	}
	t.Logf("%d transactions lost against the other node; %d were begun again", conflicts, retries)
	if conflicts == 0 || retries == 0 {
		t.Error("the nodes never met: the test tested nothing")
	}
	certify(t, nodes)
}

// certify makes two transactions meet for certain: each node has changed the same row before either commits.
func certify(t *testing.T, nodes [2]sqldb.Config) {
	a, b := connect(t, nodes[0]), connect(t, nodes[1])
	exec(t, a, "CREATE TABLE pair (id integer NOT NULL PRIMARY KEY, n bigint NOT NULL)")
	exec(t, a, "INSERT INTO pair (id, n) VALUES (1, 0)")
	// A node applies what another has committed a little later, and only reads wait for it: until then an UPDATE there finds no row.
	leasetest.Eventually(t, "the other node has the row", func() bool { return pair(t, b) == 0 })
	attempts := 0
	err := a.Tx(t.Context(), func(tx *sqldb.Tx) error {
		attempts++
		if _, err := tx.Exec(t.Context(), "UPDATE pair SET n = n + 1 WHERE id = 1"); err != nil {
			return err
		}
		if tx.Attempt > 0 {
			return nil
		}
		_, err := b.Exec(t.Context(), "UPDATE pair SET n = n + 10 WHERE id = 1")
		return err
	})
	if err != nil || attempts != 2 {
		t.Errorf("%v after %d attempts, want success after 2", err, attempts)
	}
	leasetest.Eventually(t, "both changes are in", func() bool { return pair(t, b) == 11 })
}

// pair is the number in the row that both nodes change, as db's node has it; -1 while it does not have the row.
func pair(t *testing.T, db *sqldb.DB) int64 {
	t.Helper()
	n := int64(-1)
	if err := db.QueryRow(t.Context(), "SELECT n FROM pair WHERE id = 1").Scan(&n); err != nil && !errors.Is(err, sql.ErrNoRows) {
		t.Fatal(err)
	}
	return n
}
