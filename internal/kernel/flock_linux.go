package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

// Locker is a file that can be locked: an *os.File or a *File.
type Locker interface {
	Fd() uintptr
	Name() string
}

// Flock takes the exclusive advisory lock on f, which closing f lets go (also when the process dies). It waits until ctx
// ends and is then fault.Unavailable; f must in that case be closed and not be used again. The wait keeps a thread and a
// descriptor until the lock can be had, also after ctx: who asks again and again, for ever, uses TryFlock.
func Flock(ctx context.Context, f Locker) error {
	if ok, err := TryFlock(f); ok || err != nil {
		return err
	}
	// The kernel offers no wait with a limit. The waiter works on a descriptor of its own: if nobody waits for it any more
	// when it gets the lock, it lets go at once.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(fd, unix.LOCK_EX)
			if !errors.Is(err, unix.EINTR) {
				got <- err
				unix.Close(fd) // the lock belongs to the open file, which f still refers to
				return
			}
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		return nil
	case <-ctx.Done():
		return fault.Unavailablef("lock %s: another process held it for too long: %w", f.Name(), ctx.Err())
	}
}

// LockPath opens the file at path for reading and writing, made with mode 0600 (and its directory with 0700) if it is missing, and takes its lock as
// Flock does. The lock is that of the file which is at path then: if it was replaced during the wait, that of its successor.
func LockPath(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return nil, err
			}
			f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		}
		if err != nil {
			return nil, err
		}
		if err := Flock(ctx, f); err != nil {
			f.Close()
			return nil, err
		}
		ours, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		now, err := os.Stat(path)
		if err == nil && os.SameFile(ours, now) {
			return f, nil
		}
		f.Close() // replaced while we waited
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

// TryFlock takes the exclusive advisory lock on f if nobody has it, and reports whether it did.
func TryFlock(f Locker) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}
