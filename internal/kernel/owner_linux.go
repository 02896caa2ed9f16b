package kernel

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SameOwner gives f the owner, group and permissions of like: what replaces a file must be as accessible as that was.
func SameOwner(f, like *os.File) error {
	var want, have unix.Stat_t
	if err := unix.Fstat(int(like.Fd()), &want); err != nil {
		return fmt.Errorf("stat %s: %w", like.Name(), err)
	}
	if err := unix.Fstat(int(f.Fd()), &have); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if want.Uid != have.Uid || want.Gid != have.Gid {
		if err := f.Chown(int(want.Uid), int(want.Gid)); err != nil {
			return err
		}
	}
	return unix.Fchmod(int(f.Fd()), want.Mode&0o7777)
}
