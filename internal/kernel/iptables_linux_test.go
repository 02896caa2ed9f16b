package kernel_test

import (
	"os/exec"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestLegacyForwarding reads what iptables-legacy wrote, and makes no table by reading.
func TestLegacyForwarding(t *testing.T) {
	tool, err := exec.LookPath("iptables-legacy")
	testkit.Require(t, "tools", err)
	ns := netns.New(t)
	read := func() (f kernel.Forwarding) {
		t.Helper()
		if err := ns.Do(func() (err error) { f, err = kernel.LegacyForwarding(); return err }); err != nil {
			t.Fatal(err)
		}
		return f
	}
	if f := read(); f.Drops || len(f.Devices) > 0 {
		t.Errorf("where there is nothing: %+v", f)
	}
	for _, x := range []struct {
		rule    string
		drops   bool
		devices string
	}{
		{"-P INPUT DROP", false, ""}, {"-A FORWARD -i docker0 -j ACCEPT", false, "docker0"}, {"-P FORWARD DROP", true, "docker0"},
		{"-I FORWARD -i s-+ -j ACCEPT", true, "s-+ docker0"}, {"-A FORWARD -o s-+ -p tcp --dport 80 -j DROP", true, "s-+ docker0"}, {"-P FORWARD ACCEPT", false, "s-+ docker0"},
	} {
		if err := ns.Do(func() error {
			out, err := exec.Command(tool, strings.Fields(x.rule)...).CombinedOutput()
			if err != nil {
				t.Logf("%s: %s", x.rule, out)
			}
			return err
		}); err != nil {
			testkit.Require(t, "tools", err)
		}
		if f := read(); f.Drops != x.drops || strings.Join(f.Devices, " ") != x.devices {
			t.Errorf("after %s: %+v", x.rule, f)
		}
	}
}

func FuzzLegacyForwarding(f *testing.F) {
	f.Add(uint32(0), make([]byte, 152))
	f.Add(uint32(112), append(make([]byte, 90), 152, 0, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, policy uint32, b []byte) { kernel.ParseLegacyForwarding(policy, b) })
}
