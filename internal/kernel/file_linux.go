package kernel

import (
	"cmp"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// File is an open plain file. An os.File would ask the poller whether it likes the file, which takes five calls and, the first
// time in a process, a poller; it would have a finalizer and wait for its users when it is closed. A File that is forgotten
// stays open.
type File struct {
	fd   atomic.Int64 // -1 when it is closed
	path string
}

// OpenFile is os.OpenFile for plain files.
func OpenFile(path string, flag int, perm uint32) (*File, error) {
	fd, err := open(path, flag, perm)
	if err != nil {
		return nil, err
	}
	return newFile(fd, path), nil
}

func newFile(fd int, path string) *File {
	f := &File{path: path}
	f.fd.Store(int64(fd))
	return f
}

func open(path string, flag int, perm uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flag|unix.O_CLOEXEC, perm)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return -1, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// Name returns the path that the file was opened by.
func (f *File) Name() string { return f.path }

// Fd returns the descriptor, valid until Close, and an invalid one after it.
func (f *File) Fd() uintptr { return uintptr(f.fd.Load()) }

// Close closes the file. A second time it is os.ErrClosed. Nobody may use the file meanwhile.
func (f *File) Close() error {
	fd := f.fd.Swap(-1)
	if fd < 0 {
		return &fs.PathError{Op: "close", Path: f.path, Err: os.ErrClosed}
	}
	return unix.Close(int(fd))
}

// Read reads up to len(p) bytes, and io.EOF at the end.
func (f *File) Read(p []byte) (int, error) {
	n, err := read(int(f.fd.Load()), p)
	if err != nil {
		return 0, &fs.PathError{Op: "read", Path: f.path, Err: err}
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// Write writes all of p, or says why not.
func (f *File) Write(p []byte) (int, error) {
	n, err := write(int(f.fd.Load()), p)
	if err != nil {
		err = &fs.PathError{Op: "write", Path: f.path, Err: err}
	}
	return n, err
}

// Is reports whether the file is still the one of that name: not removed, not replaced. A link is another file.
func (f *File) Is(path string) (bool, error) {
	var ours, now unix.Stat_t
	if err := unix.Fstat(int(f.fd.Load()), &ours); err != nil {
		return false, &fs.PathError{Op: "stat", Path: f.path, Err: err}
	}
	err := unix.Lstat(path, &now)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return ours.Dev == now.Dev && ours.Ino == now.Ino, nil
}

// Volatile reports whether the file is on a file system that lives in memory, which a reboot empties.
func (f *File) Volatile() bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.fd.Load()), &st) == nil && (st.Type == unix.TMPFS_MAGIC || uint32(st.Type) == unix.RAMFS_MAGIC) // 32 bits on some machines, with a sign
}

// Overwrite writes p over the beginning of the file, by one call.
func (f *File) Overwrite(p []byte) error {
	if n, err := unix.Pwrite(int(f.fd.Load()), p, 0); err != nil || n < len(p) {
		return &fs.PathError{Op: "write", Path: f.path, Err: cmp.Or(err, io.ErrShortWrite)}
	}
	return nil
}

// read and write call package syscall, as package net does: the race detector then sees that what is read was written before.
func read(fd int, p []byte) (int, error) {
	for {
		n, err := syscall.Read(fd, p)
		if !errors.Is(err, unix.EINTR) {
			return max(n, 0), err
		}
	}
}

func write(fd int, p []byte) (done int, err error) {
	for done < len(p) {
		n, err := syscall.Write(fd, p[done:])
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}

// ReadFile is os.ReadFile for plain files.
func ReadFile(path string) ([]byte, error) {
	fd, err := open(path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 512)
	for {
		n, err := read(fd, b[len(b):cap(b)])
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return b, nil
		}
		if b = b[:len(b)+n]; len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

// WriteFile writes p into a file with those flags: O_WRONLY, and O_CREATE and O_TRUNC as wanted.
func WriteFile(path string, p []byte, flag int, perm uint32) error {
	fd, err := open(path, flag, perm)
	if err != nil {
		return err
	}
	if _, err = write(fd, p); err != nil {
		err = &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return errors.Join(err, unix.Close(fd))
}

// names is how many bytes of a directory are read at once. The buffer has no place on the stack, which would have to grow five times.
var names = 32 << 10

// ReadNames returns the names in a directory, without . and .., in no order.
func ReadNames(path string) ([]string, error) {
	fd, err := open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, names)
	var list []string
	for {
		n, err := unix.ReadDirent(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "readdirent", Path: path, Err: err}
		}
		if n == 0 {
			return list, nil
		}
		_, _, list = unix.ParseDirent(buf[:n], -1, list)
	}
}
