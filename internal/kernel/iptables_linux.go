package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Forwarding is what the FORWARD chain of the old iptables, the one that is not nftables, does with packets that none of its rules decides.
type Forwarding struct {
	Drops   bool
	Devices []string // that its table's rules name as input, a plus at the end standing for any rest
}

// Sizes and offsets of linux/netfilter_ipv4/ip_tables.h and linux/netfilter/x_tables.h.
const (
	iptGetInfo, iptGetEntries                                 = 64, 65
	iptName                                                   = 32
	iptInfoSize, iptUnderflow, iptInfoBytes                   = 84, 56, 80
	iptEntriesHeader, iptEntrySize                            = 40, 112
	iptInDevice, iptInMask, iptTargetOffset, iptNextOffset    = 16, 48, 88, 90
	iptTargetName, iptTargetVerdict, iptVerdictDrop, iptNames = 2, 32, -1, 29
)

// LegacyForwarding returns what the filter table of the calling thread's namespace does with forwarded packets. Where nobody has used that
// table it does nothing, and is not made by asking.
func LegacyForwarding() (Forwarding, error) {
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.Contains(strings.Fields(string(names)), "filter") {
		return Forwarding{}, nil
	}
	if err != nil {
		return Forwarding{}, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return Forwarding{}, fmt.Errorf("open socket to ask for iptables: %w", err)
	}
	defer unix.Close(fd)
	info := make([]byte, iptInfoSize)
	copy(info, "filter")
	if err := getsockopt(fd, iptGetInfo, info); err != nil {
		return Forwarding{}, err
	}
	size := ne.Uint32(info[iptInfoBytes:])
	table := make([]byte, iptEntriesHeader+int(size))
	copy(table, "filter")
	ne.PutUint32(table[iptName:], size)
	if err := getsockopt(fd, iptGetEntries, table); err != nil {
		return Forwarding{}, err
	}
	return ParseLegacyForwarding(ne.Uint32(info[iptUnderflow+4*unix.NF_INET_FORWARD:]), table[iptEntriesHeader:]), nil
}

// getsockopt reads an option into b, which says what is asked for.
func getsockopt(fd, option int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return fmt.Errorf("ask for iptables: %w", errno)
	}
	return nil
}

// ParseLegacyForwarding reads the entries of a filter table, in which the one at policy is what FORWARD ends with.
func ParseLegacyForwarding(policy uint32, entries []byte) (f Forwarding) {
	for at := 0; at+iptEntrySize <= len(entries); {
		e := entries[at:]
		target, next := int(ne.Uint16(e[iptTargetOffset:])), int(ne.Uint16(e[iptNextOffset:]))
		if next < iptEntrySize || next > len(e) {
			return f
		}
		device, mask := e[iptInDevice:iptInDevice+unix.IFNAMSIZ], e[iptInMask:iptInMask+unix.IFNAMSIZ]
		if n := bytes.IndexByte(mask, 0); n > 0 && device[0] != 0 {
			name := string(bytes.TrimRight(device[:n], "\x00"))
			if n <= len(name) {
				name += "+"
			}
			f.Devices = append(f.Devices, name)
		}
		if uint32(at) == policy && target+iptTargetVerdict+4 <= next {
			name := e[target+iptTargetName : target+iptTargetName+iptNames]
			f.Drops = name[0] == 0 && int32(ne.Uint32(e[target+iptTargetVerdict:])) == iptVerdictDrop
		}
		at += next
	}
	return f
}
