package cni_test

import (
	"errors"
	"os/exec"
	"regexp"
	"strings"

	"code.cloudfoundry.org/silk/internal/kernel"
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

var volatile = regexp.MustCompile(`(valid_lft|preferred_lft) \S+|expires \S+|handle \d+`)

// dump returns all that the host's namespace has in devices, addresses, routes, neighbours and connections, in words.
func (h *host) dump() string {
	h.t.Helper()
	var out strings.Builder
	for _, args := range []string{"ip -d link", "ip addr", "ip route show table all", "ip neigh", "ip -6 neigh", "ip rule", "tc qdisc", "conntrack -L", "nft list ruleset"} {
		f := strings.Fields(args)
		var b []byte
		if err := h.ns.Do(func() (err error) { b, err = exec.Command(f[0], f[1:]...).Output(); return err }); err != nil {
			h.t.Fatalf("%s: %v", args, err)
		}
		out.WriteString("# " + args + "\n")
		for line := range strings.Lines(volatile.ReplaceAllString(string(b), "")) {
			if f[0] != "conntrack" || !strings.Contains(line, "127.0.0.1") { // of the questions to the daemon
				out.WriteString(line)
			}
		}
	}
	return out.String()
}
