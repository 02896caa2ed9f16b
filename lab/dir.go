package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

const commandLock = "command.lock"

// claim makes the lab's directory if need be and holds it against other ups and downs until unlock. It returns the
// directory's real path, by which processes of the lab are known.
func claim(ctx context.Context, dir string) (real string, unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fmt.Errorf("make the lab's directory: %w", err)
	}
	if real, err = filepath.EvalSymlinks(dir); err != nil {
		return "", nil, err
	}
	if real, err = filepath.Abs(real); err != nil {
		return "", nil, err
	}
	if err := ours(real); err != nil {
		return "", nil, err
	}
	// An empty directory that was there may be open to all, and what the umask makes of the socket as well.
	if err := os.Chmod(real, 0o700); err != nil {
		return "", nil, err
	}
	path := filepath.Join(real, commandLock)
	for {
		f, err := lockFile(path, syscall.LOCK_NB)
		switch {
		case err == nil:
			if same(f, path) {
				return real, func() { f.Close() }, nil
			}
			f.Close() // a down has removed the directory while we waited
			if err := os.MkdirAll(real, 0o700); err != nil {
				return "", nil, err
			}
		case errors.Is(err, fs.ErrNotExist):
			if err := os.MkdirAll(real, 0o700); err != nil {
				return "", nil, err
			}
		case !errors.Is(err, fault.Conflict):
			return "", nil, err
		}
		select {
		case <-ctx.Done():
			return "", nil, fault.Unavailablef("another silk lab command works on %s", real)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// ours refuses a directory that belongs to somebody else, or holds something that no lab wrote: Down will remove it.
func ours(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if err := owned(dir, st); err != nil {
		return err
	}
	if parent := filepath.Dir(dir); parent == filepath.Dir(DefaultDir("lab")) { // it may be in /tmp, where others can make it first
		st, err := os.Lstat(parent)
		if err != nil {
			return err
		}
		if err := owned(parent, st); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	foreign := ""
	for _, e := range entries {
		if e.Name() == journalFile {
			return nil
		}
		if e.Name() != commandLock && !strings.HasPrefix(e.Name(), journalFile) {
			foreign = e.Name()
		}
	}
	if foreign != "" {
		return fault.Invalidf("directory %s holds %s and no lab: choose an empty one with --dir, since silk lab down removes it", dir, foreign)
	}
	return nil
}

func owned(dir string, st fs.FileInfo) error {
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() || st.Mode()&0o022 != 0 {
		return fault.Deniedf("others own or may write to directory %s: choose another one with --dir", dir)
	}
	return nil
}

// removeLab deletes the directory, its journal last, so that an interrupted removal can be repeated, and the place of all labs
// if it was the last one there.
func removeLab(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n := e.Name(); n != journalFile && n != commandLock {
			if err := os.RemoveAll(filepath.Join(dir, n)); err != nil {
				return err
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if parent := filepath.Dir(dir); parent == filepath.Dir(DefaultDir("lab")) {
		os.Remove(parent) // refused while another lab is in it
	}
	return nil
}
