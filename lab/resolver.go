package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

const (
	resolvConf = "/etc/resolv.conf"
	resolvers  = "/run/resolv" // in the host: what containers have as resolv.conf, by their names
)

// writeResolver keeps, on the host, the resolv.conf of a container: what the plugin's result says, as container runtimes do it. A container without
// a resolver has the host's, which is empty.
func writeResolver(name string, d types.DNS) error {
	if len(d.Nameservers) == 0 {
		return dropResolver(name)
	}
	var b bytes.Buffer
	for _, s := range d.Nameservers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if search := d.Search; len(search) > 0 || d.Domain != "" {
		if len(search) == 0 {
			search = []string{d.Domain}
		}
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	if len(d.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(d.Options, " "))
	}
	path := filepath.Join(resolvers, name)
	if was, err := os.ReadFile(path); err == nil && bytes.Equal(was, b.Bytes()) {
		return nil
	}
	if err := os.MkdirAll(resolvers, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil { // in place: who runs in the container sees it change
		return fmt.Errorf("write the resolver of %s: %w", name, err)
	}
	return nil
}

func dropResolver(name string) error {
	if err := os.Remove(filepath.Join(resolvers, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// showResolver puts the container's resolv.conf in place of the host's, for the calling thread and what it starts. The thread is on the host, and
// given up afterwards.
func showResolver(name string) error {
	path := filepath.Join(resolvers, name)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace for a command in %s: %w", name, err)
	}
	if err := unix.Mount(path, resolvConf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s its resolver: %w", name, err)
	}
	return nil
}
