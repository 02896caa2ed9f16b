package kernel_test

import (
	"fmt"
	"net"
	"os/exec"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
)

func TestDevices(t *testing.T) {
	ns, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	defer ns.Close()
	script := "ip link set lo address 00:00:00:00:00:00"
	for i := range 60 { // more than one message holds
		script += fmt.Sprintf("; ip link add a%d address 02:00:00:00:00:%02x type veth peer name b%d", i, i, i)
	}
	err = ns.Do(func() error {
		if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	testkit.Require(t, "tools", err)
	got, err := kernel.Devices(ns)
	if err != nil || len(got) != 121 {
		t.Fatalf("%d devices, %v, want 121", len(got), err)
	}
	i := slices.IndexFunc(got, func(d kernel.Device) bool { return d.Name == "a59" })
	if i < 0 || net.HardwareAddr(got[i].MAC).String() != "02:00:00:00:00:3b" || got[i].Index == 0 {
		t.Errorf("device a59: %+v", got[max(i, 0)])
	}
}
