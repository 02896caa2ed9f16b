// Package testkit holds what tests of several rooms share: real database servers on private sockets, deserved skips,
// leak checks. Product code does not import it (except its pki, for the lab).
package testkit

import (
	"os"
	"strings"
	"testing"
)

// Require skips the test when the environment lacks a capability, unless SILK_TEST_REQUIRE (a comma list of
// capability names, set by CI) says that it must be there: then the test fails.
func Require(t testing.TB, capability string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for c := range strings.SplitSeq(os.Getenv("SILK_TEST_REQUIRE"), ",") {
		if strings.TrimSpace(c) == capability {
			t.Fatalf("%s is required here: %v", capability, err)
		}
	}
	t.Skipf("no %s: %v", capability, err)
}
