package testkit

import (
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

var volatile = regexp.MustCompile(`(valid_lft|preferred_lft) \S+|expires \S+|handle \d+`)

// Network returns all that a network namespace has, in words: devices, addresses, routes, neighbours, rules, queues, filters, and connections but those to the
// loopback address. within runs a function in the namespace. What passes by itself, such as the age of an address, is left out.
func Network(t testing.TB, within func(func() error) error) string {
	t.Helper()
	var out strings.Builder
	for _, c := range []struct{ program, input string }{ // tests compare states by the hundred: few processes
		{"ip -d -batch -", "link\naddr\nroute show table all\nneigh\nrule\n"},
		{"tc qdisc", ""},
		{"conntrack -L", ""},
		{"nft list ruleset", ""},
	} {
		f := strings.Fields(c.program)
		cmd := exec.Command(f[0], f[1:]...)
		cmd.Stdin = strings.NewReader(c.input)
		var b []byte
		if err := within(func() (err error) { b, err = cmd.Output(); return err }); err != nil {
			t.Fatalf("%s: %v", c.program, err)
		}
		fmt.Fprintf(&out, "# %s\n", c.program)
		for line := range strings.Lines(volatile.ReplaceAllString(string(b), "")) {
			if f[0] != "conntrack" || !strings.Contains(line, "127.0.0.1") {
				out.WriteString(line)
			}
		}
	}
	return out.String()
}
