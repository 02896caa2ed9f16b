package fault_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

func TestKindSurvivesWrapping(t *testing.T) {
	err := fmt.Errorf("acquire: %w", fault.New(fault.Exhausted, fmt.Errorf("pool: %w", io.EOF)))
	if !errors.Is(err, fault.Exhausted) || !errors.Is(err, io.EOF) {
		t.Errorf("%v: want both the kind and the cause to be found", err)
	}
	if errors.Is(err, fault.Invalid) {
		t.Errorf("%v: is also Invalid", err)
	}
	if got := fault.Of(err); got != fault.Exhausted {
		t.Errorf("Of = %v, want exhausted", got)
	}
	if got, want := err.Error(), "acquire: pool: EOF"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
}

func TestOutermostKindWins(t *testing.T) {
	err := fault.New(fault.Unavailable, fault.Conflictf("lost a race"))
	if got := fault.Of(err); got != fault.Unavailable {
		t.Errorf("Of = %v, want unavailable", got)
	}
}

func TestNoKindIsInternal(t *testing.T) {
	if got := fault.Of(io.EOF); got != fault.Internal {
		t.Errorf("Of(EOF) = %v, want internal", got)
	}
	if fault.New(fault.Invalid, nil) != nil {
		t.Error("New(kind, nil) is not nil")
	}
}
