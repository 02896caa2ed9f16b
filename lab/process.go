package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Every process of a lab has these in its environment: the lab's directory and what the process is in it.
const (
	memberVar = "SILK_LAB_MEMBER"
	roleVar   = "SILK_LAB_ROLE"
)

// The roles of the lab's own processes. Those of a host are "HOST/silk-daemon" and "HOST/vxlan-policy-agent", a responder's is
// "CONTAINER/responder".
const (
	roleKeeper       = "keeper"
	roleSupervisor   = "supervisor"
	roleController   = "controller"
	rolePolicyServer = "policy-server"
	roleExec         = "exec"
)

// environ returns the environment of a process of the lab.
func environ(dir, role, programs string, more ...string) []string {
	return append([]string{
		memberVar + "=" + dir, roleVar + "=" + role,
		"PATH=" + programs + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LANG=C",
	}, more...)
}

// process is a live process, held by a descriptor, so that its number cannot come to mean another one.
type process struct {
	pid  int
	fd   *os.File
	exit unix.WaitStatus // of a child that await has reaped
}

// openProcess opens process pid. fs.ErrNotExist when there is none.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = fs.ErrNotExist
		}
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// await returns when the process has ended, nil, or when ctx has. A child of this process is reaped. After a wait that
// was given up another one ends at once.
func (p *process) await(ctx context.Context) error {
	if err := p.ended(ctx); err != nil {
		return err
	}
	p.reap()
	return nil
}

// ended is await without reaping: the process's number, and its group's, stay what they are.
func (p *process) ended(ctx context.Context) error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { p.fd.SetReadDeadline(time.Unix(1, 0)) })()
	err = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	if err != nil {
		return errors.Join(err, ctx.Err())
	}
	return nil
}

// reap takes the exit status of a child that has ended. That of an adopted process goes to its parent.
func (p *process) reap() { unix.Wait4(p.pid, &p.exit, unix.WNOHANG, nil) }

// kill ends the process. One that has ended is no error.
func (p *process) kill(sig unix.Signal) error {
	if err := unix.PidfdSendSignal(int(p.fd.Fd()), sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	return nil
}

func (p *process) close() { p.fd.Close() }

// start runs a program detached from whoever starts it, its output appended to the file at log. It must be called on the
// thread whose namespaces the program is to have. Files beyond the standard ones are its descriptors from 3 on.
func start(log string, env []string, files []*os.File, path string, args ...string) (*process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	return spawn(env, append([]*os.File{null, out, out}, files...), &unix.SysProcAttr{Setsid: true}, path, args...)
}

// spawn starts a process and returns it held from its first moment.
func spawn(env []string, files []*os.File, attr *unix.SysProcAttr, path string, args ...string) (*process, error) {
	fd := -1
	attr.PidFD = &fd
	p, err := os.StartProcess(path, append([]string{filepath.Base(path)}, args...), &os.ProcAttr{Dir: "/", Env: env, Files: files, Sys: attr})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(path), err)
	}
	pid := p.Pid
	p.Release()
	if fd < 0 {
		return nil, fmt.Errorf("start %s: this kernel gives no process descriptors: Linux 5.10 or later is needed", filepath.Base(path))
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// find returns the process that has the role in the lab, nil if there is none.
func find(dir, role string) (*process, error) {
	var found *process
	err := members(dir, func(pid int, r string) error {
		if r != role || found != nil || pid == os.Getpid() {
			return nil
		}
		p, err := openProcess(pid)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		// The number may have changed hands between the two looks.
		if again, ok := roleOf(dir, pid); !ok || again != role {
			p.close()
			return nil
		}
		found = p
		return nil
	})
	return found, err
}

// members calls each with every live process of the lab and its role.
func members(dir string, each func(pid int, role string) error) error {
	pids, err := allProcesses()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if role, ok := roleOf(dir, pid); ok {
			if err := each(pid, role); err != nil {
				return err
			}
		}
	}
	return nil
}

func allProcesses() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// roleOf reads the role of a process in the lab. A zombie and a process of others have none: anybody can write the lab's name into
// an environment, and by role processes are adopted, entered and killed.
func roleOf(dir string, pid int) (string, bool) {
	st, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		return "", false
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() {
		return "", false
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", false
	}
	return parseRole(b, dir)
}

// parseRole looks for the lab's two variables in the environment of a process.
func parseRole(environ []byte, dir string) (role string, member bool) {
	for v := range bytes.SplitSeq(environ, []byte{0}) {
		k, val, _ := bytes.Cut(v, []byte("="))
		switch string(k) {
		case memberVar:
			member = string(val) == dir
		case roleVar:
			role = string(val)
		}
	}
	return role, member
}
