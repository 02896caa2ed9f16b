// Package revision numbers the states of a list that clients follow: an epoch, and a counter that only grows within it.
//
// It is not a clock, and no store: those who keep a list move its revision in the transaction that changes the list.
//
// Use: a client sends the revision it has with its next question and gets what changed since.
package revision

import (
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
)

// Revision numbers the states of a list. Counters of one epoch are ordered; revisions of different
// epochs are not. The zero Revision stands for "nothing seen yet".
type Revision struct {
	Epoch   string // 1 to 64 letters, digits or hyphens; new with the schema and after a restore
	Counter uint64
}

// IsZero reports whether r is the zero Revision.
func (r Revision) IsZero() bool { return r == Revision{} }

// String returns "epoch.counter", or "" for the zero Revision.
func (r Revision) String() string {
	if r.IsZero() {
		return ""
	}
	return r.Epoch + "." + strconv.FormatUint(r.Counter, 10)
}

// Parse reads what String writes. Anything else is fault.Invalid.
func Parse(s string) (Revision, error) {
	if s == "" {
		return Revision{}, nil
	}
	epoch, count, ok := strings.Cut(s, ".")
	n, err := strconv.ParseUint(count, 10, 64)
	if !ok || err != nil || epoch == "" || len(epoch) > 64 || strings.Trim(strings.ToLower(epoch), "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return Revision{}, fault.Invalidf("revision %.100q: expected EPOCH.COUNTER as an earlier answer gave it, or nothing", s)
	}
	return Revision{epoch, n}, nil
}

// MarshalText returns String.
func (r Revision) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is Parse.
func (r *Revision) UnmarshalText(b []byte) error {
	v, err := Parse(string(b))
	if err == nil {
		*r = v
	}
	return err
}
