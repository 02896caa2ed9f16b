package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

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

// ReplaceLocked puts a new file in the place of f, which is at path and locked by the caller, with its owner and mode. Whoever waits for the lock finds by LockPath
// that f was replaced.
func ReplaceLocked(f *os.File, path string, content []byte) error {
	t, err := os.OpenFile(TempOf(path), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = t.Write(content)
	if err == nil {
		err = SameOwner(t, f)
	}
	if err == nil {
		err = t.Sync()
	}
	if err = errors.Join(err, t.Close()); err == nil {
		err = os.Rename(t.Name(), path)
	}
	if err != nil {
		os.Remove(t.Name())
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// TempOf returns the name of the new file of ReplaceLocked. There is one at a time, since its writer holds the lock: whoever has the lock may remove what a killed
// writer left.
func TempOf(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
}

// KeepBroken gives the file at path a second name beside it, which it returns, for a person to look at: path.broken-INODE. A second name needs no room, and the
// file that replaces it gets the first; the inode's number keeps attempts that fail from leaving one each.
func KeepBroken(path string) (kept string, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	kept = fmt.Sprintf("%s.broken-%d", path, st.Sys().(*syscall.Stat_t).Ino)
	if err := os.Link(path, kept); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return kept, nil
}
