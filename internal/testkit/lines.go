package testkit

import (
	"fmt"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

// Lines returns the rows of queries, each of which gives one column of text: a line a row, with single spaces between its words. Tests compare what an
// engine says about its tables so.
func Lines(t testing.TB, db *sqldb.DB, queries []string) string {
	t.Helper()
	var b strings.Builder
	for _, q := range queries {
		rows, err := db.Query(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(&b, strings.Join(strings.Fields(line), " "))
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}
