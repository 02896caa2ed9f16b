package leasesql

import (
	"context"
	"fmt"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// Almost every request is a renewal of a lease that holds. Such a one changes nothing that others must know of, so it needs no ledger and no revision,
// and where the engine takes lists, one statement settles a batch of them: it finds the rows that are exactly as the renewals say, have not expired and are
// young, or it writes the time into those that are not young any more. Every other renewal, whatever the reason, is the keeper's to judge.

// renewals serves renewals until ctx ends.
func (s *Store) renewals(ctx context.Context) {
	due := false
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-s.renew.Calls():
			calls := s.renew.Gather(c)
			start := time.Now()
			due = s.settle(ctx, calls, due)
			s.renew.Served(len(calls), time.Since(start))
		}
	}
}

// settle answers those of calls whose leases hold and passes the others on. due says which statement comes first, and the result which should
// the next time: the one that met more.
func (s *Store) settle(ctx context.Context, calls []*call, due bool) bool {
	if len(calls) == 0 {
		return due
	}
	texts, hosts := make([]string, len(calls)), make([]string, len(calls))
	for i, c := range calls {
		l := c.Question.Lease
		hosts[i] = l.Underlay.String()
		texts[i] = hosts[i] + " " + l.Subnet.String() + " " + l.MAC.String()
	}
	within, cancel := context.WithTimeout(ctx, batchTime)
	defer cancel()
	settled := make(map[string]bool, len(calls))
	err := s.holding(within, due, hosts, texts, settled)
	first := len(settled)
	if err == nil && first < len(calls) {
		err = s.holding(within, !due, hosts, texts, settled)
	}
	if err != nil {
		s.log.Debug("renewals were not settled at once", "error", err) // the keeper finds out why, and says so
	}
	for i, c := range calls {
		if settled[texts[i]] {
			c.Answer(lease.Verdict{}, nil)
		} else {
			s.calls.Pass(ctx, c)
		}
	}
	return due == (first >= len(settled)-first)
}

// holdingText identifies a row of subnets by all that a renewal names.
const holdingText = "underlay_ip || ' ' || overlay_subnet || ' ' || overlay_hwaddr"

// holding adds to settled which leases hold and are young or, if due is set, were not young and are renewed now. The comparisons are those of lease.Terms.
func (s *Store) holding(ctx context.Context, due bool, hosts, texts []string, settled map[string]bool) error {
	now, t := s.db.Dialect().Now, s.keeper.terms(0)
	const these = " WHERE underlay_ip = ANY (?::text[]) AND " + holdingText + " = ANY (?::text[]) AND last_renewed_at > "
	text := "SELECT " + holdingText + " FROM subnets" + these + now + " - ?::bigint AND last_renewed_at > " + now + " - ?::bigint AND last_renewed_at <= " + now + " + ?::bigint + 1"
	if due {
		text = "UPDATE subnets SET last_renewed_at = " + now + these + now + " - ?::bigint AND (last_renewed_at <= " + now + " - ?::bigint OR last_renewed_at > " +
			now + " + ?::bigint + 1) RETURNING " + holdingText
	}
	rows, err := s.db.Query(ctx, text, sqldb.Array(hosts), sqldb.Array(texts), t.Expiration, t.Fresh, t.Fresh)
	if err != nil {
		return fmt.Errorf("renew leases: %w", err)
	}
	defer rows.Close()
	var met []string
	for rows.Next() {
		var l string
		if err := rows.Scan(&l); err != nil {
			return fmt.Errorf("renew leases: %w", sqldb.Failure(err))
		}
		met = append(met, l)
	}
	if err := rows.Err(); err != nil { // perhaps of the commit, which comes after the rows
		return fmt.Errorf("renew leases: %w", sqldb.Failure(err))
	}
	for _, l := range met {
		settled[l] = true
	}
	return nil
}
