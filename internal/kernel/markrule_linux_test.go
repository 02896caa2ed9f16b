package kernel_test

import (
	"os/exec"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestMarkRules finds the rules that look at given bits, and no others.
func TestMarkRules(t *testing.T) {
	tool, err := exec.LookPath("ip")
	testkit.Require(t, "tools", err)
	ns := netns.New(t)
	for _, args := range [][]string{{"fwmark", "0x80/0xff", "priority", "10"}, {"fwmark", "0x10000/0xff0000", "priority", "11"}, {"from", "10.0.0.0/8", "priority", "12"},
		{"fwmark", "0x7", "priority", "13"}} {
		if err := ns.Do(func() error {
			return exec.Command(tool, append([]string{"rule", "add", "lookup", "100"}, args...)...).Run()
		}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := kernel.Dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for bits, want := range map[uint32]string{0xffff: "10: fwmark 0x80/0xff 13: fwmark 0x7/0xffffffff ", 0x10000: "11: fwmark 0x10000/0xff0000 13: fwmark 0x7/0xffffffff "} {
		rules, err := c.MarkRules(bits)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, r := range rules {
			got += r.String() + " "
		}
		if got != want {
			t.Errorf("rules on 0x%x: %s, expected %s", bits, got, want)
		}
	}
}

func FuzzMarkRule(f *testing.F) {
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, b []byte) { kernel.ParseMarkRule(b) })
}
