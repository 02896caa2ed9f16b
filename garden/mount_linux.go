package garden

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// netns returns the path of the bind mount of the container's namespace.
func (n *networker) netns() string { return filepath.Join(n.cfg.BindMountDir, n.handle) }

// bind names the namespace behind src by the bind mount, and reports whether that is new. A mount that an operation before this one
// left is replaced, unless it is of the same namespace.
func (n *networker) bind(src string) (made bool, err error) {
	failed := func(err error) (bool, error) {
		return false, fmt.Errorf("failed mounting %s to %s: %w", src, n.netns(), err)
	}
	ns, err := kernel.OpenNS(src)
	if err != nil {
		return failed(err)
	}
	defer ns.Close()
	want, err := ns.ID()
	if err != nil {
		return failed(err)
	}
	if old, err := kernel.OpenNS(n.netns()); err == nil {
		have, err := old.ID()
		old.Close()
		if err == nil && have == want {
			return false, nil
		}
	}
	if err := n.unbind(); err != nil {
		return failed(err)
	}
	if err := ns.Bind(n.netns()); err != nil {
		return failed(err)
	}
	return true, nil
}

// stacked bounds how many mounts on one file are taken away: earlier releases put one more on it each time.
const stacked = 64

// unbind takes the bind mount and its file away. What is not there is no error.
func (n *networker) unbind() error {
	var err error
	for range stacked {
		if err = kernel.UnbindNS(n.netns()); !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	return err
}

// lockWithin takes the container's lock in the time that another operation may take.
func (n *networker) lockWithin(ctx context.Context) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.timeout()+time.Minute)
	defer cancel()
	return n.lock(ctx)
}

// lock keeps other operations from the container until it is closed. The plugins inherit it: when an operation is killed, the
// next one waits until the plugin that it was running has ended. It is a file beside the bind mount, which only a down
// removes.
func (n *networker) lock(ctx context.Context) (*os.File, error) {
	path := n.lockPath()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(n.cfg.BindMountDir, 0o700); err != nil {
				return nil, fmt.Errorf("lock container: %w", err)
			}
			f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("lock container: %w", err)
		}
		if err := kernel.Flock(ctx, f); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock container: %w", err)
		}
		if same(f, path) {
			return f, nil
		}
		f.Close() // a down has removed it
	}
}

func (n *networker) lockPath() string {
	return filepath.Join(n.cfg.BindMountDir, "."+n.handle+".lock")
}

// removeLock removes the lock's file as the last thing that is done under it. Whoever waits for it makes a new one.
func (n *networker) removeLock() error {
	if err := os.Remove(n.lockPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// same reports whether the path still leads to f.
func same(f *os.File, path string) bool {
	ours, err1 := f.Stat()
	now, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(ours, now)
}
