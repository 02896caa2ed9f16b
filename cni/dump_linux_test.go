package cni_test

import (
	"errors"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"golang.org/x/sys/unix"
)

// kernelUp sets a device of the calling thread's namespace up.
func kernelUp(device string) error {
	c, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(0, unix.IFF_UP, unix.IFF_UP))
	b.String(unix.IFLA_IFNAME, device)
	refused, err := c.Do(&b)
	if len(refused) > 0 {
		err = errors.Join(err, refused[0])
	}
	return err
}

// dump returns all that the host's namespace has, in words. Connections to the loopback address are questions to the daemon.
func (h *host) dump() string {
	h.t.Helper()
	return testkit.Network(h.t, h.ns.Do)
}
