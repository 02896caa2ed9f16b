package testkit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// Programs puts programs of this repository, all of cmd/ if none is named, into a new directory that anybody may read, and returns it and what removes it. They
// are made where and as make build makes them, so that tests run what is shipped and only the first who needs a program waits for it.
func Programs(names ...string) (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp("", "silk-programs-")
	if err != nil {
		return "", nil, err
	}
	remove = func() { os.RemoveAll(dir) }
	if err := errors.Join(os.Chmod(dir, 0o755), makePrograms(dir, names)); err != nil {
		remove()
		return "", nil, err
	}
	return dir, remove, nil
}

// Program returns the path of a program of this repository, which is there until the test ends.
func Program(t testing.TB, name string) string {
	t.Helper()
	dir, remove, err := Programs(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(remove)
	return filepath.Join(dir, name)
}

// makePrograms lets the go command find out which programs are to be made anew, and copies them from where they are for all: a test may run long, and the next
// one may belong to another state of the sources.
func makePrograms(dir string, names []string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		all, err := os.ReadDir(filepath.Join(root, "cmd"))
		if err != nil {
			return err
		}
		for _, e := range all {
			names = append(names, e.Name())
		}
	}
	unlock, err := lockDirectory(filepath.Join(root, "bin"))
	if err != nil {
		return err
	}
	defer unlock()
	build := []string{"go", "build", "-trimpath", "-ldflags=-s -w", "-o", "bin/"} // as the Makefile has it
	copies := []string{"cp"}                                                      // another process, since what this one has open for writing cannot be run
	for _, n := range names {
		build, copies = append(build, "./cmd/"+n), append(copies, "bin/"+n)
	}
	for _, args := range [][]string{build, append(copies, dir)} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w\n%s", args, err, out)
		}
	}
	return nil
}

// moduleRoot returns the directory of go.mod: tests run in the directory of their package.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil && !fileExists(filepath.Join(dir, "go.mod")) {
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("go.mod above the working directory: %w", fs.ErrNotExist)
		}
		dir = filepath.Dir(dir)
	}
	return dir, err
}

// lockDirectory makes a directory and keeps the test processes beside this one out of it.
func lockDirectory(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
