package sqldb

import (
	"strconv"
	"strings"
)

// The engines, as a configuration names them.
const (
	SQLite   = "sqlite"
	Postgres = "postgres"
	MySQL    = "mysql" // MySQL, MariaDB and Galera clusters of either
)

// Dialect has the words in which engines differ.
type Dialect struct {
	Name string

	// Now is an expression for the time of the statement in whole seconds since 1970, 64 bits wide, by the clock of the database.
	Now string

	// ForUpdate ends a select of rows that the transaction is going to change; empty where transactions exclude each other anyway.
	ForUpdate string

	// Arrays says that an argument can be a list (Array, and unnest in statements).
	Arrays bool

	numbered bool   // arguments are $1, $2, ...
	conflict string // begins what an insert does about a row that is there; %s is the key
	proposed string // the value that was to be inserted; %s is the column
}

var dialects = map[string]Dialect{
	SQLite: {Name: SQLite, Now: "unixepoch()", conflict: " ON CONFLICT (%s) DO UPDATE SET ", proposed: "excluded.%s"},
	Postgres: {Name: Postgres, Now: "floor(date_part('epoch', statement_timestamp()))::bigint", ForUpdate: " FOR UPDATE", Arrays: true, numbered: true,
		conflict: " ON CONFLICT (%s) DO UPDATE SET ", proposed: "excluded.%s"},
	MySQL: {Name: MySQL, Now: "CAST(UNIX_TIMESTAMP() AS SIGNED)", ForUpdate: " FOR UPDATE",
		conflict: " ON DUPLICATE KEY UPDATE ", proposed: "VALUES(%s)"},
}

// Upsert returns the end of an insert that overwrites the columns of a row with the same key. How many rows such an insert met is not the same
// number on all engines.
func (d Dialect) Upsert(key string, columns ...string) string {
	var b strings.Builder
	b.WriteString(strings.ReplaceAll(d.conflict, "%s", key))
	for i, c := range columns {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(c + " = " + strings.ReplaceAll(d.proposed, "%s", c))
	}
	return b.String()
}

// number replaces each ? outside quotes by $1, $2, ...
func number(s string) string {
	var b strings.Builder
	n, quote := 0, byte(0)
	for i := range len(s) {
		c := s[i]
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '"':
			quote = c
		case c == '?':
			n++
			b.WriteByte('$')
			b.WriteString(strconv.Itoa(n))
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

// Among returns a condition that column holds an element of a non-empty list, and its arguments. It needs only one statement, or a few, for lists of all
// lengths.
func Among[T int64 | string](d Dialect, column string, list []T) (condition string, args []any) {
	if !d.Arrays {
		marks, args := In(list)
		return column + " IN " + marks, args
	}
	return column + " = ANY (?::" + arrayType(list) + ")", []any{Array(list)}
}

func arrayType[T int64 | string](list []T) string {
	if _, ok := any(list).([]int64); ok {
		return "bigint[]"
	}
	return "text[]"
}

// Array returns a list as the text of an array of PostgreSQL. As an argument it needs a type in the statement: "?::text[]".
func Array[T int64 | string](list []T) string {
	b := make([]byte, 0, 24*len(list)+2)
	b = append(b, '{')
	for i, e := range list {
		if i > 0 {
			b = append(b, ',')
		}
		switch e := any(e).(type) {
		case int64:
			b = strconv.AppendInt(b, e, 10)
		case string:
			b = append(b, '"')
			for j := range len(e) {
				if e[j] == '"' || e[j] == '\\' {
					b = append(b, '\\')
				}
				b = append(b, e[j])
			}
			b = append(b, '"')
		}
	}
	return string(append(b, '}'))
}

// Marks returns "(?, ?), (?, ?)": rows groups of columns argument marks each.
func Marks(rows, columns int) string {
	group := "(" + strings.TrimSuffix(strings.Repeat("?, ", columns), ", ") + ")"
	return strings.TrimSuffix(strings.Repeat(group+", ", rows), ", ")
}

// In returns "(?, ?, ?)" and its arguments for a non-empty list. The list is padded with its last element to a power of two, so
// that lists of all lengths need only few different statements.
func In[T any](list []T) (marks string, args []any) {
	n := 1
	for n < len(list) {
		n *= 2
	}
	args = make([]any, n)
	for i := range args {
		args[i] = list[min(i, len(list)-1)]
	}
	return Marks(1, n), args
}
