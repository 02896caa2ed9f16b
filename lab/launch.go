package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

const startTime = 20 * time.Second // for a supervisor to answer

// ensure sees to it that a supervisor answers: the one that does, one that a keeper is starting, a new one in the namespaces
// that are left, or a new one in new namespaces.
func (l *Lab) ensure(ctx context.Context) error {
	if l.ping(ctx) == nil {
		return nil
	}
	if err := l.awaitSupervisor(ctx); !errors.Is(err, errUnattended) {
		return err
	}
	j, err := readJournal(l.dir)
	if err != nil {
		return err
	}
	p, err := find(l.dir, roleController)
	if err != nil {
		return err
	}
	// Without root nobody can enter a user namespace from outside again: then what is left is replaced.
	if p != nil && os.Geteuid() == 0 {
		defer p.close()
		return kernel.OnThread(func() error {
			mnt, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", p.pid))
			if err != nil {
				return err
			}
			defer mnt.Close()
			return launchInside(ctx, l.dir, j.Programs, mnt)
		})
	}
	if p != nil {
		p.close()
	}
	if err := sweepLab(ctx, l.dir); err != nil {
		return err
	}
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
	}
	return launch(ctx, l.dir, j.Programs, attr, "--fresh")
}

// launchInside launches on the calling thread, which must be given up afterwards, in the lab's mount namespace.
func launchInside(ctx context.Context, dir, programs string, mnt *os.File) error {
	if err := enterMounts(mnt); err != nil {
		return err
	}
	net, err := kernel.OpenNS(filepath.Join(netNames, underlayName))
	if err != nil {
		return err
	}
	defer net.Close()
	if err := unix.Setns(net.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the underlay's namespace: %w", err)
	}
	return launch(ctx, dir, programs, &syscall.SysProcAttr{})
}

func launch(ctx context.Context, dir, programs string, attr *syscall.SysProcAttr, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "silk"), append([]string{"lab", "launch", "--dir", dir}, args...)...)
	cmd.Env = environ(dir, "launch", programs)
	cmd.Dir = "/"
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOSPC) {
		return fault.Deniedf("make namespaces for the lab: %w: run it as root, or allow user namespaces "+
			"(sysctl user.max_user_namespaces; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)", err)
	}
	if err != nil {
		return fmt.Errorf("launch the lab: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Launch is the first process in a lab's namespaces. With fresh they have just been made, and it sets them up. It starts the
// keeper and returns when the supervisor answers.
func Launch(ctx context.Context, dir string, fresh bool) error {
	if fresh {
		if err := setUp(dir); err != nil {
			return err
		}
	}
	j, err := readJournal(dir)
	if err != nil {
		return err
	}
	p, err := startKeeper(dir, j.Programs)
	if err != nil {
		return err
	}
	p.close()
	return (&Lab{dir}).awaitSupervisor(ctx)
}

func setUp(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o700); err != nil {
		return err
	}
	if err := labMounts(dir); err != nil {
		return err
	}
	net, err := kernel.CurrentNS()
	if err != nil {
		return err
	}
	defer net.Close()
	if err := loopbackUp(); err != nil {
		return err
	}
	return net.Bind(filepath.Join(netNames, underlayName))
}

// errUnattended says that neither keeper nor supervisor lives.
var errUnattended = errors.New("neither the lab's keeper nor its supervisor lives")

// awaitSupervisor waits until a supervisor answers, as long as there is one or a keeper that will start one. A process that was
// killed looks alive until it has let go of its memory, so both are looked for again and again.
func (l *Lab) awaitSupervisor(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for missed := 0; ; {
		err := l.ping(ctx)
		if err == nil {
			return nil
		}
		attended, ferr := l.attended()
		switch {
		case ferr != nil:
			return ferr
		case attended:
			missed = 0
		case missed > 0: // one look may miss a process that is born behind its back
			return fmt.Errorf("%w: their logs are in %s", errUnattended, filepath.Join(l.dir, "log"))
		default:
			missed++
		}
		select {
		case <-ctx.Done():
			return fault.Unavailablef("the lab's supervisor does not answer: %w: its log is %s", err, logFile(l.dir, roleSupervisor))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (l *Lab) attended() (bool, error) {
	for _, role := range []string{roleKeeper, roleSupervisor} {
		p, err := find(l.dir, role)
		if err != nil {
			return false, err
		}
		if p != nil {
			p.close()
			return true, nil
		}
	}
	return false, nil
}

func startKeeper(dir, programs string) (*process, error) {
	return start(logFile(dir, roleKeeper), environ(dir, roleKeeper, programs), nil, filepath.Join(programs, "silk"), "lab", "keep", "--dir", dir)
}

// Keep is the keeper: it restarts the supervisor when that dies, as the supervisor restarts it, and reaps what a dead supervisor
// has left to it. It returns when ctx ends.
func Keep(ctx context.Context, dir string, log *slog.Logger) error {
	os.Unsetenv(roleVar)
	lock, err := lockFile(filepath.Join(dir, "keeper.lock"), syscall.LOCK_NB)
	if err != nil {
		return err
	}
	defer lock.Close()
	j, err := readJournal(dir)
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of the lab: %w", err)
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		for {
			select {
			case <-ctx.Done():
				return
			case <-children:
				reap()
			}
		}
	}()
	newProgram(dir, roleSupervisor, log, func() (*process, error) {
		return start(logFile(dir, roleSupervisor), environ(dir, roleSupervisor, j.Programs), nil, filepath.Join(j.Programs, "silk"), "lab", "supervise", "--dir", dir)
	}).run(ctx)
	<-reaped
	return nil
}

func reap() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if pid <= 0 && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
