package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
)

// What the host looks like: the VTEP, the container devices, resolvers, sysctls. All of it in the namespace of the process.

// observeDevice returns what the device of that name says about the host's lease. The MAC tells the subnet's first address, and so
// does the address; a stranger may have changed one of them, or added addresses.
func observeDevice(name string, overlay netip.Prefix) (DeviceState, error) {
	devices, err := kernel.Devices(nil)
	if err != nil {
		return DeviceState{}, fmt.Errorf("observe device %s: %w", name, err)
	}
	i := slices.IndexFunc(devices, func(d kernel.Device) bool { return d.Name == name })
	if i < 0 {
		return DeviceState{}, nil
	}
	addrs, err := (&net.Interface{Index: devices[i].Index}).Addrs()
	if err != nil {
		return DeviceState{}, fmt.Errorf("observe device %s: %w", name, err)
	}
	var list []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			list = append(list, p)
		}
	}
	return DeviceState{Exists: true, Base: baseOf(devices[i].MAC, list, overlay)}, nil
}

// baseOf finds the first address of the lease that a VTEP with this MAC and these addresses stands for, the zero Addr if
// neither tells. An address that agrees with the MAC is certain; then the only address of the overlay's prefix length;
// then the MAC.
func baseOf(mac []byte, addrs []netip.Prefix, overlay netip.Prefix) netip.Addr {
	var likely []netip.Addr
	for _, a := range addrs {
		if !a.Addr().Is4() || a.Bits() == a.Addr().BitLen() {
			continue
		}
		if m := lease.MACOf(netip.PrefixFrom(a.Addr(), 32)); string(m[:]) == string(mac) {
			return a.Addr()
		}
		if a.Bits() == overlay.Bits() {
			likely = append(likely, a.Addr())
		}
	}
	switch {
	case len(likely) == 1:
		return likely[0]
	case len(mac) == 6 && mac[0] == 0xee && mac[1] == 0xee:
		return netip.AddrFrom4([4]byte(mac[2:]))
	}
	return netip.Addr{}
}

// containerAddress returns the address that the host's end of a container's veth pair is named after: s- and three digits for
// each octet.
func containerAddress(device string) (netip.Addr, bool) {
	digits, ok := strings.CutPrefix(device, "s-")
	if !ok || len(digits) != 12 {
		return netip.Addr{}, false
	}
	var b [4]byte
	for i := range b {
		n, err := strconv.ParseUint(digits[3*i:3*i+3], 10, 8)
		if err != nil {
			return netip.Addr{}, false
		}
		b[i] = byte(n)
	}
	return netip.AddrFrom4(b), true
}

// containerDevices returns the addresses of all containers that the kernel has a device for.
func containerDevices() (map[netip.Addr]bool, error) {
	all, err := kernel.Devices(nil)
	if err != nil {
		return nil, err
	}
	out := map[netip.Addr]bool{}
	for _, i := range all {
		if a, ok := containerAddress(i.Name); ok {
			out[a] = true
		}
	}
	return out, nil
}

// resolvers returns the addresses of the name servers in a resolv.conf. A file that does not exist has none.
func resolvers(path string) ([]netip.Addr, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read resolvers: %w", err)
	}
	defer f.Close()
	return parseResolvers(io.LimitReader(f, 1<<20))
}

func parseResolvers(r io.Reader) ([]netip.Addr, error) {
	var out []netip.Addr
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, a.WithZone("").Unmap())
		}
	}
	return out, s.Err()
}

// Sizing of the connection table. It is shared by the whole machine, which is why it is only ever raised.
const (
	connectionsPerContainer = 4096
	leastConnections        = 262144
	connectionBytes         = 384 // of one entry, with both directions
	memoryShare             = 16  // the full table takes at most this part of the memory
)

// conntrackMax returns the size of the connection table for a host whose subnet holds that many addresses, on a machine
// with that much memory in bytes.
func conntrackMax(addresses, memory uint64) uint64 {
	return max(leastConnections, min(addresses*connectionsPerContainer, memory/memoryShare/connectionBytes))
}

// tuneHost sets the sysctls that containers depend on, remembering what they were. The connection table is left alone when
// something larger is set, and outside the machine's own namespace. Without a place to remember nothing is set.
func tuneHost(s *kernel.Sysctls, subnet netip.Prefix) error {
	if s == nil {
		return errors.New("nothing is set without an endpoint directory to remember the old values in")
	}
	err := s.Set("net/ipv4/ip_forward", "1")
	if !initialNamespace() {
		return err
	}
	const key = "net/netfilter/nf_conntrack_max"
	text, rerr := kernel.Sysctl(key)
	if errors.Is(rerr, fs.ErrNotExist) { // no connection tracking
		return err
	}
	now, perr := strconv.ParseUint(text, 10, 64)
	memory, merr := memoryBytes()
	if e := errors.Join(rerr, perr, merr); e != nil {
		return errors.Join(err, fmt.Errorf("size connection table: %w", e))
	}
	if want := conntrackMax(uint64(1)<<(32-subnet.Bits()), memory); now < want {
		err = errors.Join(err, s.Set(key, strconv.FormatUint(want, 10)))
	}
	return err
}

// initialNamespace reports whether this process seems to live in the machine's own network namespace: that of process 1, and
// the table can be written (the kernel shows it read-only in others, which has to do where a unit leaves no capability to look at process 1).
func initialNamespace() bool {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return false
	}
	first, err := os.Readlink("/proc/1/ns/net")
	if err != nil && !errors.Is(err, fs.ErrPermission) || err == nil && own != first {
		return false
	}
	st, err := os.Stat("/proc/sys/net/netfilter/nf_conntrack_max")
	return err == nil && st.Mode().Perm()&0o200 != 0
}

// memoryBytes returns the machine's memory.
func memoryBytes() (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseMemory(string(b))
}

func parseMemory(text string) (uint64, error) {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemTotal:" && f[2] == "kB" {
			n, err := strconv.ParseUint(f[1], 10, 44)
			return n << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemTotal")
}

// conntrack returns how many entries the connection table has and may have, zeros when there is none.
func conntrack() (used, size uint64) {
	read := func(key string) uint64 {
		s, err := kernel.Sysctl("net/netfilter/" + key)
		if err != nil {
			return 0
		}
		n, _ := strconv.ParseUint(s, 10, 64)
		return n
	}
	return read("nf_conntrack_count"), read("nf_conntrack_max")
}

// countTimeout bounds the wait for the lock on the deployed store.
const countTimeout = 5 * time.Second

// countAside bounds it where repairs of the overlay wait for the count to end.
const countAside = 200 * time.Millisecond
