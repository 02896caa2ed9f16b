package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// NS is an open network namespace. It stays alive while it is open.
type NS struct{ f *File }

// NSID identifies a namespace as long as it lives: the device and inode of its file in nsfs.
type NSID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// IsZero reports whether id names no namespace.
func (id NSID) IsZero() bool { return id == NSID{} }

// OpenNS opens the namespace that path (a bind mount or /proc/PID/ns/net) refers to. A path that does not exist is
// fs.ErrNotExist; one that is not a network namespace, such as the plain file that a lost mount leaves, as well.
func OpenNS(path string) (*NS, error) {
	f, err := OpenFile(path, unix.O_RDONLY, 0)
	if err != nil {
		for _, e := range []error{unix.ESRCH, unix.ENXIO, unix.ENODEV, unix.ENOTDIR, unix.ELOOP} { // the process behind /proc/PID went away; or it is a socket, or no path at all
			if errors.Is(err, e) {
				err = fs.ErrNotExist
			}
		}
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: not a namespace: %w", path, fs.ErrNotExist)
	}
	if t, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || t != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: a namespace of another kind: %w", path, fs.ErrNotExist)
	}
	return &NS{f}, nil
}

// CurrentNS opens the namespace of the calling thread.
func CurrentNS() (*NS, error) {
	fd, err := openOwn()
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	return &NS{newFile(fd, ownNS)}, nil
}

// ownNS is the path of the calling thread's namespace.
const ownNS = "/proc/thread-self/ns/net"

// openOwn opens the namespace of the calling thread. A new socket tells it (SIOCGSKNS, CAP_NET_ADMIN) in a tenth of the time
// that it takes /proc to make entries for a process that nobody has looked at yet.
func openOwn() (int, error) {
	if s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		defer unix.Close(s)
		return openOwnBy(s)
	}
	return open(ownNS, unix.O_RDONLY, 0)
}

// openOwnBy is openOwn with a socket that was opened in that namespace.
func openOwnBy(socket int) (int, error) {
	if fd, err := unix.IoctlRetInt(socket, unix.SIOCGSKNS); err == nil {
		return fd, nil
	}
	return open(ownNS, unix.O_RDONLY, 0)
}

// CurrentID returns what tells the namespace of the calling thread from others.
func CurrentID() (NSID, error) {
	ns, err := CurrentNS()
	if err != nil {
		return NSID{}, err
	}
	defer ns.Close()
	return ns.ID()
}

// NewNS makes a namespace that nothing else refers to: it vanishes, with all that is in it, on Close.
func NewNS() (*NS, error) {
	var n *NS
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		var err error
		n, err = CurrentNS()
		return err
	})
	return n, err
}

// Bind gives n a name: path becomes a bind mount of it, as "ip netns" makes them. The file is created.
func (n *NS) Bind(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("name network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.FD()), path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("name network namespace %s: %w", path, err)
	}
	return nil
}

// UnbindNS takes the name away. A path that is not there, or not a mount, is removed without complaint.
func UnbindNS(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// FD returns the descriptor, valid until Close.
func (n *NS) FD() int { return int(n.f.Fd()) }

// Close lets go of the namespace.
func (n *NS) Close() error { return n.f.Close() }

// ID returns what tells n from every other live namespace.
func (n *NS) ID() (NSID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.FD(), &st); err != nil {
		return NSID{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return NSID{uint64(st.Dev), st.Ino}, nil
}

// Do runs fn in the namespace, on a thread of its own that is given up afterwards. fn must not start goroutines that
// rely on the namespace.
func (n *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// Visit runs fn in the namespace on the calling thread and comes back. It is for programs that do one thing: it saves
// the thread that Do makes. home is a connection in the calling thread's namespace. If there is no way back, the error says so
// and the thread stays locked to its goroutine.
func (n *NS) Visit(home *Conn, fn func() error) error {
	runtime.LockOSThread()
	back, err := openOwnBy(home.fd)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(back)
	if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = fn()
	if stuck := unix.Setns(back, unix.CLONE_NEWNET); stuck != nil {
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", stuck))
	}
	runtime.UnlockOSThread()
	return err
}

// onThread runs fn on a locked thread that ends with it: the runtime destroys a thread whose goroutine
// exits while locked, so a changed namespace cannot leak to other goroutines.
func onThread(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// The main thread cannot be destroyed, and its namespaces are what /proc/PID/ns shows of the process.
		if unix.Gettid() == unix.Getpid() {
			errc <- onThread(fn) // on another one, while this goroutine holds the main thread
			runtime.UnlockOSThread()
			return
		}
		errc <- fn()
	}()
	return <-errc
}

// Sysctl reads a value below /proc/sys of the calling thread's namespace ("net/ipv4/ip_forward"), without the newline.
func Sysctl(key string) (string, error) {
	b, err := ReadFile("/proc/sys/" + key)
	return strings.TrimSuffix(string(b), "\n"), err
}

// SetSysctl writes a value below /proc/sys of the calling thread's namespace.
func SetSysctl(key, value string) error {
	return WriteFile("/proc/sys/"+key, []byte(value), unix.O_WRONLY, 0)
}
