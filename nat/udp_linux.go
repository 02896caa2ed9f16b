package nat

import (
	"net/netip"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// forgetUDP makes the kernel forget, in the calling thread's namespace, the connections of UDP that began at one of the ports before it led
// anywhere: only the first packet of a connection is looked up, and a sender that never pauses would never have another one. (One of TCP to
// a server of the host's own is left to it.)
func forgetUDP(maps []PortMap) error {
	var table *kernel.Conntrack
	for _, m := range maps {
		if m.Protocol != UDP {
			continue
		}
		if table == nil {
			var err error
			if table, err = kernel.OpenConntrack(); table == nil {
				return err
			}
			defer table.Close()
		}
		err := table.ForgetTo(unix.IPPROTO_UDP, m.Host.Port(), func(a netip.Addr) (bool, error) {
			if m.Host.Addr().IsValid() {
				return a == m.Host.Addr(), nil
			}
			return isLocal(a)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// isLocal reports whether an address is one of the host's own.
func isLocal(a netip.Addr) (bool, error) {
	conn, err := kernel.Dial(nil)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	var b kernel.Batch
	h := kernel.Rt(32, 0, 0, 0)
	clear(h[2:])
	b.Add(unix.RTM_GETROUTE, 0, h)
	b.Attr(unix.RTA_DST, a.AsSlice())
	answers, err := conn.Query(&b)
	if err != nil || answers[0].Err != nil || len(answers[0].Body) < unix.SizeofRtMsg {
		return false, err // no way there: not here
	}
	return answers[0].Body[7] == unix.RTN_LOCAL, nil
}
