// Package fault names the kinds of failure that Silk's parts tell each other apart.
//
// It is not a list of errors: every package words its own. A kind says what the receiver may do about
// an error: mend the request, try later, give up. HTTP layers translate kinds to statuses and back with
// one table (internal/httpjson).
//
// Use: return fault.Invalidf("subnet %v: must be inside %v", got, want); test with errors.Is(err, fault.Invalid).
package fault

import (
	"errors"
	"fmt"
)

// Kind is what a failure means to whoever receives it. A Kind is itself an error, so that
// errors.Is(err, fault.Conflict) asks whether err is of that kind.
type Kind uint8

// The kinds. Internal, the zero value, is every error that says nothing else: a defect or a broken dependency.
const (
	Internal    Kind = iota
	Invalid          // the request can never succeed as it stands
	NotFound         // the thing asked for does not exist
	Conflict         // the request contradicts what exists
	Exhausted        // no capacity is left to serve it
	Denied           // the caller may not do this
	Unavailable      // a dependency is away or overloaded: try again later
)

var names = [...]string{"internal", "invalid", "not found", "conflict", "exhausted", "denied", "unavailable"}

// Error returns the kind's name, lower case.
func (k Kind) Error() string {
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

type fault struct {
	kind Kind
	err  error
}

func (f *fault) Error() string   { return f.err.Error() }
func (f *fault) Unwrap() []error { return []error{f.kind, f.err} }

// New gives err the kind k. A nil err stays nil.
func New(k Kind, err error) error {
	if err == nil {
		return nil
	}
	return &fault{k, err}
}

// Of returns the outermost kind in err's tree, Internal when it has none.
func Of(err error) Kind {
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	return Internal
}

// Invalidf is New(Invalid, fmt.Errorf(...)).
func Invalidf(format string, args ...any) error { return New(Invalid, fmt.Errorf(format, args...)) }

// NotFoundf is New(NotFound, fmt.Errorf(...)).
func NotFoundf(format string, args ...any) error { return New(NotFound, fmt.Errorf(format, args...)) }

// Conflictf is New(Conflict, fmt.Errorf(...)).
func Conflictf(format string, args ...any) error { return New(Conflict, fmt.Errorf(format, args...)) }

// Exhaustedf is New(Exhausted, fmt.Errorf(...)).
func Exhaustedf(format string, args ...any) error { return New(Exhausted, fmt.Errorf(format, args...)) }

// Deniedf is New(Denied, fmt.Errorf(...)).
func Deniedf(format string, args ...any) error { return New(Denied, fmt.Errorf(format, args...)) }

// Unavailablef is New(Unavailable, fmt.Errorf(...)).
func Unavailablef(format string, args ...any) error {
	return New(Unavailable, fmt.Errorf(format, args...))
}
