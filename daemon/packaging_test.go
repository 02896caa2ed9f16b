package daemon

import (
	"net/netip"
	"os"
	"path"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
)

// TestPackagedFilesNameOurDevices compares the patterns in the files for network managers with the names we give, and with
// names that are not ours.
func TestPackagedFilesNameOurDevices(t *testing.T) {
	ours := []string{DefaultConfig().VTEPName, endpoint.Device(netip.MustParseAddr("10.255.30.2")), endpoint.Limiter(netip.MustParseAddr("10.255.30.2"))}
	for file, key := range map[string]struct{ prefix, separators string }{
		"network/10-silk.link":                {"OriginalName=", " "},
		"network/10-silk.network":             {"Name=", " "},
		"network/10-silk-networkmanager.conf": {"match-device=", ","},
		"udev/99-zz-silk.rules":               {`SUBSYSTEM=="net", KERNEL==`, "|"},
	} {
		b, err := os.ReadFile("../packaging/" + file)
		if err != nil {
			t.Fatal(err)
		}
		var patterns []string
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), key.prefix); ok {
				if q, ok := strings.CutPrefix(rest, `"`); ok {
					rest, _, _ = strings.Cut(q, `"`)
				}
				for _, p := range strings.Split(rest, key.separators) {
					patterns = append(patterns, strings.TrimPrefix(p, "interface-name:"))
				}
			}
		}
		matches := func(name string) bool {
			for _, p := range patterns {
				if ok, err := path.Match(p, name); ok && err == nil {
					return true
				}
			}
			return false
		}
		for _, name := range ours {
			if !matches(name) {
				t.Errorf("%s: no pattern of %q is for %s", file, patterns, name)
			}
		}
		for _, name := range []string{"eth0", "lo", "silk", "docker0", "ens3", "i-net"} {
			if matches(name) {
				t.Errorf("%s: a pattern of %q takes %s", file, patterns, name)
			}
		}
	}
}

// TestDevicesWithUnits: systemd makes a unit of the VTEP, which silk-dns-resolved.service is bound to, and none of any container's devices.
func TestDevicesWithUnits(t *testing.T) {
	rules, err := os.ReadFile("../packaging/udev/99-zz-silk.rules")
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.255.30.2")
	for name, want := range map[string]bool{DefaultConfig().VTEPName: true, endpoint.Device(a): false, endpoint.Limiter(a): false} {
		unit := true
		for line := range strings.Lines(string(rules)) {
			_, patterns, _ := strings.Cut(line, `KERNEL=="`)
			patterns, _, _ = strings.Cut(patterns, `"`)
			for p := range strings.SplitSeq(patterns, "|") {
				if ok, err := path.Match(p, name); ok && err == nil && strings.Contains(line, `TAG-="systemd"`) {
					unit = false
				}
			}
		}
		if unit != want {
			t.Errorf("%s has a device unit: %v, want %v", name, unit, want)
		}
	}
}
