package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Device is a network device.
type Device struct {
	Index int
	Name  string
	MAC   []byte // nil for a device without one
}

// Devices returns the devices of ns, nil for the calling thread's namespace, in no order. Unlike net.Interfaces it never takes part
// of a list for the list: ErrDumpInterrupted.
func Devices(ns *NS) ([]Device, error) {
	c, err := Dial(ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var b Batch
	b.Add(unix.RTM_GETLINK, 0, IfInfo(0, 0, 0))
	var devices []Device
	err = c.Dump(&b, func() { devices = nil }, func(m Message) error {
		if d, ok := parseDevice(m.Body); ok && m.Type == unix.RTM_NEWLINK {
			devices = append(devices, d)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return devices, nil
}

// parseDevice reads an ifinfomsg.
func parseDevice(b []byte) (d Device, ok bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return Device{}, false
	}
	d.Index = int(int32(ne.Uint32(b[4:])))
	for t, v := range Attrs(b[unix.SizeofIfInfomsg:]) {
		switch t {
		case unix.IFLA_IFNAME:
			d.Name = Text(v)
		case unix.IFLA_ADDRESS:
			d.MAC = append([]byte(nil), v...)
		}
	}
	return d, d.Name != ""
}

// NumberOf returns the number by which the connection's namespace knows ns, as IFLA_LINK_NETNSID says it of a device whose other end is
// there; -1 when it has none.
func (c *Conn) NumberOf(ns *NS) (int, error) {
	var b Batch
	b.Add(unix.RTM_GETNSID, 0, []byte{unix.AF_UNSPEC, 0, 0, 0})
	b.Uint32(unix.NETNSA_FD, uint32(ns.FD()))
	answers, err := c.Query(&b)
	if err != nil {
		return -1, err
	}
	if answers[0].Err != nil {
		return -1, fmt.Errorf("ask for the number of a network namespace: %w", answers[0].Err)
	}
	return parseNumber(answers[0].Body), nil
}

// parseNumber reads the answer to RTM_GETNSID.
func parseNumber(b []byte) int {
	if len(b) < 4 {
		return -1
	}
	for t, v := range Attrs(b[4:]) {
		if t == unix.NETNSA_NSID && len(v) >= 4 {
			return int(int32(ne.Uint32(v)))
		}
	}
	return -1
}
