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
