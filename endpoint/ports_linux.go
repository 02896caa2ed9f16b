package endpoint

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
)

// Which endpoint has which port of the host is in one file, a line for each port, written under the lock on the directory before the record is.
// A line counts for as long as there is a record of the name in it; others are left out the next time that the file is written. So only who
// maps ports reads or writes it, and nobody has to take anything out of it.

// claimed is a line of the file.
type claimed struct {
	PortMap
	file string // of the record
}

// String returns the line: "tcp 10.0.16.15 8080 80 silk@c1@eth0@10.255.30.2", with a * for every address.
func (c claimed) String() string {
	return fmt.Sprintf("%s %s %d %d %s", c.Protocol, hostOf(c.HostIP), c.HostPort, c.ContainerPort, c.file)
}

func hostOf(a netip.Addr) string {
	if !a.IsValid() {
		return "*"
	}
	return a.String()
}

// parseClaims reads the file. Lines that are none are left out.
func parseClaims(text []byte) []claimed {
	var out []claimed
	for line := range bytes.Lines(text) {
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 5)
		if len(f) != 5 {
			continue
		}
		c := claimed{PortMap: PortMap{Protocol: f[0]}, file: f[4]}
		host, err1 := strconv.ParseUint(f[2], 10, 16)
		inside, err2 := strconv.ParseUint(f[3], 10, 16)
		var err3 error
		if f[1] != "*" {
			c.HostIP, err3 = netip.ParseAddr(f[1])
		}
		c.HostPort, c.ContainerPort = uint16(host), uint16(inside)
		if errors.Join(err1, err2, err3) == nil && validPorts([]PortMap{c.PortMap}, netip.Prefix{}) == nil {
			out = append(out, c)
		}
	}
	return out
}

// claims returns the lines of records in the list, and those records' names parsed.
func (d *Dir) claims(list listing) ([]claimed, map[string]entry, error) {
	b, err := kernel.ReadFile(filepath.Join(d.path, portFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("read which ports are taken: %w", err)
	}
	all := parseClaims(b)
	if len(all) == 0 {
		return nil, nil, nil
	}
	known := make(map[string]entry, len(list))
	for _, e := range list.entries() {
		known[e.file] = e
	}
	all = slices.DeleteFunc(all, func(c claimed) bool { _, is := known[c.file]; return !is })
	return all, known, nil
}

// claim notes the ports of a new record, or says who has one of them. The directory is locked.
func (d *Dir) claim(r Record, list listing) error {
	if len(r.PortMaps) == 0 {
		return nil
	}
	all, known, err := d.claims(list)
	if err != nil {
		return err
	}
	own := r.Key.file(r.Addresses)
	all = slices.DeleteFunc(all, func(c claimed) bool { return c.file == own }) // of an earlier record of that name
	for _, m := range r.PortMaps {
		for _, c := range all {
			if c.overlaps(m) && d.stands(c, known[c.file]) {
				return fault.Conflictf("host port %s %s:%d is taken by %v, which has %s:%d", m.Protocol, hostOf(m.HostIP), m.HostPort, known[c.file].key, hostOf(c.HostIP), c.HostPort)
			}
		}
	}
	for _, m := range r.PortMaps {
		all = append(all, claimed{m, own})
	}
	var b bytes.Buffer
	for _, c := range all {
		fmt.Fprintln(&b, c)
	}
	temp := filepath.Join(d.path, tempFile+"ports") // nobody else makes one while the directory is locked, and what a killed process left is swept
	err = kernel.WriteFile(temp, b.Bytes(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = os.Rename(temp, filepath.Join(d.path, portFile))
	}
	if err != nil {
		os.Remove(temp)
		return fmt.Errorf("note which ports are taken: %w", err)
	}
	return nil
}

// stands reports whether a line says what the record of its name does: it may be about an earlier one. One that cannot be read stands for whatever it
// may have been.
func (d *Dir) stands(c claimed, e entry) bool {
	r, err := d.read(e)
	return err == nil && slices.Contains(r.PortMaps, c.PortMap) || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// overlaps reports whether a packet could be meant for either.
func (m PortMap) overlaps(o PortMap) bool {
	return m.Protocol == o.Protocol && m.HostPort == o.HostPort && (m.HostIP == o.HostIP || !m.HostIP.IsValid() || !o.HostIP.IsValid())
}

// MaxPorts bounds the port maps of one endpoint.
const MaxPorts = 1024

// validPorts judges port maps of a host whose containers' subnet is local, zero when that does not matter.
func validPorts(maps []PortMap, local netip.Prefix) error {
	if len(maps) > MaxPorts {
		return fault.Invalidf("%d port maps: expected at most %d", len(maps), MaxPorts)
	}
	for i, m := range maps {
		_, known := nat.Protocol(m.Protocol)
		switch {
		case !known:
			return fault.Invalidf("port map %d: protocol %q: expected tcp, udp or sctp", i, m.Protocol)
		case m.HostPort == 0 || m.ContainerPort == 0:
			return fault.Invalidf("port map %d: %s %d to %d: cannot allocate port 0: expected 1 to 65535", i, m.Protocol, m.HostPort, m.ContainerPort)
		case m.HostIP.IsValid() && (!m.HostIP.Is4() || m.HostIP.IsUnspecified() || m.HostIP.IsMulticast()):
			return fault.Invalidf("port map %d: host address %v: expected an IPv4 address of the host, or none for all", i, m.HostIP)
		}
		if m.HostIP.IsValid() && local.Contains(m.HostIP) {
			return fault.Invalidf("port map %d: host address %v is one of the overlay's, which have no ports: expected another of the host's", i, m.HostIP)
		}
		for _, o := range maps[:i] {
			if m.overlaps(o) {
				return fault.Invalidf("port map %d: host port %s %s:%d is given twice", i, m.Protocol, hostOf(m.HostIP), m.HostPort)
			}
		}
	}
	return nil
}

// to returns the map as package nat has it.
func (m PortMap) to(a netip.Addr) nat.PortMap {
	number, _ := nat.Protocol(m.Protocol)
	return nat.PortMap{Host: netip.AddrPortFrom(m.HostIP, m.HostPort), Protocol: number, To: netip.AddrPortFrom(a, m.ContainerPort)}
}

func (r Record) portMaps() []nat.PortMap {
	var out []nat.PortMap
	for _, m := range r.PortMaps {
		out = append(out, m.to(r.Address()))
	}
	return out
}

// fromLoopback reports whether a port of 127.0.0.0/8 leads to the container.
func (r Record) fromLoopback() bool {
	return slices.ContainsFunc(r.PortMaps, func(m PortMap) bool { return !m.HostIP.IsValid() || m.HostIP.IsLoopback() })
}

// mapPorts makes the endpoint's ports lead to it. A port that leads to an address without a container is nobody's.
func (r Record) mapPorts(host *kernel.Conn) error {
	if len(r.PortMaps) == 0 {
		return nil
	}
	return nat.MapPorts(context.Background(), r.portMaps(), func(a netip.Addr) (bool, error) { return attachedTo(host, a) })
}

// attachedTo reports whether the host has a container device for an address.
func attachedTo(host *kernel.Conn, a netip.Addr) (bool, error) {
	if Device(a) == "" {
		return false, nil
	}
	return exists(host, Device(a))
}

// unmapPorts takes them back: all that lead to the address, if it is not known which those are.
// wait is as with nat.UnmapPorts.
func (r Record) unmapPorts(known bool) (wait func(), err error) {
	if known && len(r.PortMaps) == 0 || !r.Address().IsValid() {
		return func() {}, nil
	}
	if !known {
		return func() {}, nat.UnmapAddress(context.Background(), r.Address())
	}
	return nat.UnmapPorts(context.Background(), r.portMaps())
}

// RestorePorts makes the kernel's port maps agree with the records, in the calling thread's namespace, and returns how many differed. What is
// being attached or detached meanwhile is waited for, until ctx ends.
func (d *Dir) RestorePorts(ctx context.Context) (int, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return 0, err
	}
	defer host.Close()
	return nat.SetPorts(ctx, func(have []nat.PortMap, whole bool) ([]nat.PortMap, func(), error) {
		list, err := d.live()
		if err != nil {
			return nil, nil, err
		}
		all, known, err := d.claims(list)
		if err != nil {
			return nil, nil, err
		}
		// Those that lead to somebody stay unless the port is known as another's: the file may have been lost, or his record is elsewhere.
		want := slices.DeleteFunc(slices.Clone(have), func(m nat.PortMap) bool {
			_, taken := list.holder(m.To.Addr())
			if !taken {
				there, err := attachedTo(host, m.To.Addr())
				taken = there || err != nil
			}
			return !taken || slices.ContainsFunc(all, func(c claimed) bool {
				o := c.to(known[c.file].addresses[0])
				return o.Host == m.Host && o.Protocol == m.Protocol && o != m
			})
		})
		holds := map[string]*hold{}
		done := func() {
			for _, h := range holds {
				if h != nil {
					h.release()
				}
			}
		}
		slices.SortStableFunc(all, func(a, b claimed) int { return cmp.Compare(a.file, b.file) })
		for _, c := range all {
			m := c.to(known[c.file].addresses[0])
			if whole && slices.Contains(have, m) {
				continue
			}
			h, held := holds[c.file]
			if !held {
				if h, err = d.hold(ctx, known[c.file]); err != nil {
					done()
					return nil, nil, err
				}
				holds[c.file] = h
			}
			if h != nil && !slices.Contains(want, m) && slices.Contains(h.record.PortMaps, c.PortMap) {
				want = append(want, m)
			}
		}
		return want, done, nil
	})
}
