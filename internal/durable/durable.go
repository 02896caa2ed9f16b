// Package durable replaces files so that whoever reads one, also after a crash, finds what was there before or what was written, never a
// part.
//
// Use: Sweep the directory at the start, Replace files in it.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Temp begins the names of what is being written.
const Temp = ".new-"

// Replace gives path the content that write writes: into a file beside it, which is synced to the disk and renamed, and so is the directory. The file has the mode
// perm. When anything fails, path is as before. Two callers for one path may interleave; the last to end wins.
func Replace(path string, perm fs.FileMode, write func(io.Writer) error) error {
	if err := put(path, perm, write, os.Rename); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}

// Create is Replace of what must not be there: fs.ErrExist when it is, and then path is as before. A link, other than a rename, replaces nothing.
func Create(path string, perm fs.FileMode, write func(io.Writer) error) error {
	err := put(path, perm, write, func(from, to string) error {
		err := os.Link(from, to)
		if err == nil {
			os.Remove(from) // what stays is swept, and path is made all the same
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

// put writes a file beside path and has place give it that name.
func put(path string, perm fs.FileMode, write func(io.Writer) error, place func(from, to string) error) error {
	dir, base := filepath.Split(path)
	dir = filepath.Clean(dir)
	f, err := os.CreateTemp(dir, Temp+base+"-")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = place(f.Name(), path)
	}
	if err != nil {
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return syncDir(dir)
}

// Sweep removes from a directory what killed processes were writing. The caller sees to it that nobody else is writing there. A directory
// that is not there is no error.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if n := e.Name(); len(n) > len(Temp) && n[:len(Temp)] == Temp {
			if err := os.Remove(filepath.Join(dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("sweep: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
