package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Where the lab's own mount namespace names the others. A name keeps its namespace alive, as long as any process is in
// the lab's mount namespace.
const (
	netNames = "/run/netns"
	mntNames = "/run/mntns"
)

// space is where a process runs: a network namespace, and a mount namespace unless that is the lab's own.
type space struct {
	net *kernel.NS
	mnt *os.File // nil: the caller's
}

func (s *space) close() {
	s.net.Close()
	if s.mnt != nil {
		s.mnt.Close()
	}
}

// do runs fn in the space, on a thread of its own that is given up afterwards. What fn starts with os/exec runs in the space
// too; goroutines that it starts do not.
func (s *space) do(fn func() error) error {
	return kernel.OnThread(func() error {
		if s.mnt != nil {
			if err := enterMounts(s.mnt); err != nil {
				return err
			}
		}
		if err := unix.Setns(s.net.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// with returns s with another network namespace: a container's on its host.
func (s *space) with(net *kernel.NS) *space { return &space{net, s.mnt} }

// enterMounts moves the calling thread, which must be given up afterwards.
func enterMounts(mnt *os.File) error {
	// A thread that shares its root and working directory with others may not change its mounts.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare file system attributes: %w", err)
	}
	if err := unix.Setns(int(mnt.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	return nil
}

// openSpace opens the named space of a host; withMounts says whether it has mounts of its own. fs.ErrNotExist
// if it is not there, or not whole.
func openSpace(name string, withMounts bool) (*space, error) {
	net, err := kernel.OpenNS(filepath.Join(netNames, name))
	if err != nil || !withMounts {
		return &space{net: net}, err
	}
	mnt, err := os.Open(filepath.Join(mntNames, name))
	if err == nil {
		if t, ierr := unix.IoctlRetInt(int(mnt.Fd()), unix.NS_GET_NSTYPE); ierr != nil || t != unix.CLONE_NEWNS {
			mnt.Close()
			err = fmt.Errorf("mount namespace %s: %w", name, fs.ErrNotExist)
		}
	}
	if err != nil {
		net.Close()
		return nil, err
	}
	return &space{net, mnt}, nil
}

// makeSpace makes and names a space. setup, if there is one, gives it mounts of its own, and runs inside it.
func makeSpace(name string, setup func() error) (*space, error) {
	if setup == nil {
		return newSpace(name, nil, -1)
	}
	// A mount namespace can be named only in an older one, and Linux 6.18 takes its age from a number that every processor
	// counts by itself, in blocks (kernel/nstree.c): on the processor that made the lab's namespace, at least, it is larger.
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return nil, fmt.Errorf("list processors: %w", err)
	}
	for cpu := range 64 * len(cpus) {
		if !cpus.IsSet(cpu) {
			continue
		}
		s, err := newSpace(name, setup, cpu)
		if !errors.Is(err, unix.EINVAL) {
			return s, err
		}
	}
	return nil, fmt.Errorf("name mount namespace %s: on no processor is it younger than the lab's", name)
}

// newSpace is makeSpace on one processor, on any for -1.
func newSpace(name string, setup func() error, cpu int) (*space, error) {
	s := &space{}
	err := kernel.OnThread(func() error {
		flags := unix.CLONE_NEWNET
		if setup != nil {
			flags |= unix.CLONE_NEWNS
			var one unix.CPUSet
			one.Set(cpu)
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				return fmt.Errorf("choose a processor: %w", err)
			}
		}
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("make namespaces of %s: %w", name, err)
		}
		var err error
		if s.net, err = kernel.CurrentNS(); err != nil {
			return err
		}
		if err := loopbackUp(); err != nil || setup == nil {
			return err
		}
		if s.mnt, err = os.Open("/proc/thread-self/ns/mnt"); err != nil {
			return err
		}
		return setup()
	})
	if err == nil {
		err = s.bind(name)
	}
	if err != nil {
		if s.net != nil {
			s.close()
		}
		return nil, err
	}
	return s, nil
}

// bind names the space in the caller's mount namespace. The network's name comes last: with it the space counts as made.
func (s *space) bind(name string) error {
	if err := dropNames(name); err != nil {
		return err
	}
	if s.mnt != nil {
		path := filepath.Join(mntNames, name)
		if err := os.WriteFile(path, nil, 0o400); err != nil {
			return err
		}
		if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", s.mnt.Fd()), path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("name mount namespace %s: %w", name, err)
		}
	}
	return s.net.Bind(filepath.Join(netNames, name))
}

// dropNames takes the names of a space away. What is not there is no error.
func dropNames(name string) error {
	return errors.Join(kernel.UnbindNS(filepath.Join(netNames, name)), kernel.UnbindNS(filepath.Join(mntNames, name)))
}

// privateRun gives the calling thread's mount namespace an empty /run of its own, in which only the lab's directory
// is where it was.
func privateRun(dir string, fresh bool) error {
	tree := -1
	if strings.HasPrefix(dir, "/run/") {
		var err error
		tree, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("keep %s: %w", dir, err)
		}
		defer unix.Close(tree)
	}
	if !fresh { // a copy of the lab's /run, whose names would keep other hosts' namespaces alive
		if err := unix.Unmount("/run", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount the copy of /run: %w", err)
		}
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount a private /run: %w", err)
	}
	if tree < 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("put %s back: %w", dir, err)
	}
	return nil
}

// labMounts turns the mount namespace that this process was born in into the lab's.
func labMounts(dir string) error {
	// Slave and not private: what the machine unmounts later does not stay busy here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("detach from the machine's mounts: %w", err)
	}
	if err := privateRun(dir, true); err != nil {
		return err
	}
	return errors.Join(os.Mkdir(netNames, 0o755), os.Mkdir(mntNames, 0o755))
}

// hostMounts turns the calling thread's mount namespace, a copy of the lab's, into a host's: /run empty, no resolver
// (the machine's may lie inside the overlay, and is not reachable from a lab anyway), /etc/cni and /sys of its own.
func hostMounts(dir string) error {
	if err := privateRun(dir, false); err != nil {
		return err
	}
	if err := os.Mkdir(netNames, 0o755); err != nil {
		return err
	}
	if err := errors.Join(privateEtc(), privateSys()); err != nil {
		return err
	}
	empty := "/run/resolv.conf"
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		return err
	}
	if err := unix.Mount(empty, resolvConf, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("hide %s: %w", resolvConf, err)
	}
	return nil
}

// privateEtc makes /etc/cni writable for the host alone, and sees to it that there is an /etc/resolv.conf to put another one over. Where the
// machine has none of the one or the other, an overlay of /etc holds it.
func privateEtc() error {
	_, noCNI := os.Stat("/etc/cni")
	noResolver := reviveResolver()
	if errors.Is(noCNI, fs.ErrNotExist) || noResolver != nil {
		if err := overlayEtc(); err != nil {
			return fmt.Errorf("mount an overlay on /etc, which has no cni directory or no resolv.conf: %w", err)
		}
	}
	if noResolver != nil {
		if err := os.Remove(resolvConf); err != nil && !errors.Is(err, fs.ErrNotExist) { // a link that leads nowhere
			return err
		}
		if err := os.WriteFile(resolvConf, nil, 0o644); err != nil {
			return err
		}
	}
	if noCNI == nil {
		if err := unix.Mount("tmpfs", "/etc/cni", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fmt.Errorf("mount a private /etc/cni: %w", err)
		}
	}
	return os.MkdirAll(cniConfDir, 0o755)
}

// reviveResolver makes what a link of systemd-resolved leads to, which the host's empty /run hides. An error: there is no resolv.conf.
func reviveResolver() error {
	if _, err := os.Stat(resolvConf); err == nil {
		return nil
	}
	to, err := os.Readlink(resolvConf)
	if err != nil {
		return err
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(filepath.Dir(resolvConf), to)
	}
	if !strings.HasPrefix(filepath.Clean(to), "/run/") { // the machine's, which is not ours to write
		return fmt.Errorf("%s leads to %s, which is not there", resolvConf, to)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, nil, 0o644)
}

func overlayEtc() error {
	for _, d := range []string{"/run/etc", "/run/etc/upper", "/run/etc/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	opts := "lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work"
	err := unix.Mount("overlay", "/etc", "overlay", 0, opts)
	if err != nil { // without privilege the kernel wants its marks in user attributes (5.11)
		err = unix.Mount("overlay", "/etc", "overlay", 0, opts+",userxattr")
	}
	return err
}

// privateSys shows the host's own devices in /sys: the kernel shows those of the network namespace that mounted it. The control
// groups below it stay the machine's. Without root a machine whose /sys is partly hidden does not allow it, and then the machine's
// devices are seen there; nothing of Silk looks.
func privateSys() error {
	const groups = "/sys/fs/cgroup"
	tree, missing := unix.OpenTree(unix.AT_FDCWD, groups, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if missing == nil {
		defer unix.Close(tree)
	}
	err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	switch {
	case errors.Is(err, unix.EPERM):
		return nil
	case err != nil:
		return fmt.Errorf("mount /sys: %w", err)
	case missing != nil:
		return nil
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, groups, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("put %s back: %w", groups, err)
	}
	return nil
}
