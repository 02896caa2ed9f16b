// Package netns gives tests network namespaces, and runs commands in them.
package netns

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// New returns a new namespace that is closed when the test ends. Nothing in it is up.
func New(t testing.TB) *kernel.NS {
	t.Helper()
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

// Try runs shell commands in a namespace until one fails, and returns what they print.
func Try(t testing.TB, ns *kernel.NS, script string) (string, error) {
	t.Helper()
	var out []byte
	err := ns.Do(func() (err error) { out, err = exec.Command("sh", "-ec", script).CombinedOutput(); return err })
	if errors.Is(err, exec.ErrNotFound) || bytes.Contains(out, []byte("not found\n")) && bytes.Contains(out, []byte("sh: ")) {
		testkit.Require(t, "tools", fmt.Errorf("%w: %s", err, out))
	}
	return string(out), err
}

// Shell is Try for commands that must not fail.
func Shell(t testing.TB, ns *kernel.NS, script string) string {
	t.Helper()
	out, err := Try(t, ns, script)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}
