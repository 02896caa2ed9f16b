package endpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// RemoveOrphans removes the limiters, in the host namespace of the calling thread, that have neither a record nor a container, and returns how many. The
// records that they were made for must have been lost.
func (d *Dir) RemoveOrphans(ctx context.Context) (int, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return 0, err
	}
	defer host.Close()
	if orphans, err := d.orphans(host); err != nil || len(orphans) == 0 {
		return 0, err
	}
	g, err := d.lock(ctx) // from here on nobody makes one
	if err != nil {
		return 0, err
	}
	defer g.unlock()
	return d.removeOrphans(host)
}

// removeOrphans removes them; the directory is locked.
func (d *Dir) removeOrphans(host *kernel.Conn) (int, error) {
	orphans, err := d.orphans(host)
	if err != nil || len(orphans) == 0 {
		return 0, err
	}
	var b kernel.Batch
	for _, o := range orphans {
		b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(o.index, 0, 0))
	}
	refused, err := host.Do(&b)
	for _, e := range refused {
		if !errors.Is(e, unix.ENODEV) {
			err = errors.Join(err, e)
		}
	}
	return len(orphans), err
}

// orphans lists them.
func (d *Dir) orphans(host *kernel.Conn) ([]device, error) {
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.Nest(unix.IFLA_LINKINFO, func() { b.Attr(unix.IFLA_INFO_KIND, []byte("ifb")) })
	var list []device
	err := host.Dump(&b, func() { list = nil }, func(m kernel.Message) error {
		x := parseDevice(m.Body)
		if _, ok := limited(x.name); ok && x.kind == "ifb" {
			list = append(list, x)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list limits: %w", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	names, err := d.live() // after the devices: a record comes before its device and goes after it
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list, func(x device) bool {
		a, _ := limited(x.name)
		_, recorded := names.holder(a)
		there, err := exists(host, Device(a))
		return recorded || there || err != nil
	}), nil
}
