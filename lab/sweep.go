package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

const sweepTime = 20 * time.Second

// Down ends every process of the lab, whether its supervisor lives or not, and with them its namespaces, then removes its
// directory. A lab that is half gone is taken down as well.
func (l *Lab) Down(ctx context.Context) error {
	_, unlock, err := claim(ctx, l.dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := sweepLab(ctx, l.dir); err != nil {
		return err
	}
	return removeLab(l.dir)
}

// sweepLab kills the members of the lab, what they have started, and what has entered their namespaces.
func sweepLab(ctx context.Context, dir string) error {
	spared := map[kernel.NSID]bool{}
	for _, pid := range []string{"thread-self", "1"} {
		for _, kind := range []string{"net", "mnt"} {
			if id, ok := nsOf(pid, kind); ok {
				spared[id] = true
			}
		}
	}
	return sweep(ctx, func(pids []int) map[int]bool {
		in, spaces := map[int]bool{}, map[kernel.NSID]bool{}
		for _, pid := range pids {
			if _, ok := roleOf(dir, pid); !ok {
				continue
			}
			in[pid] = true
			for _, kind := range []string{"net", "mnt"} {
				if id, ok := nsOf(strconv.Itoa(pid), kind); ok && !spared[id] {
					spaces[id] = true
				}
			}
		}
		addInside(in, pids, spaces)
		return in
	})
}

// sweepSpaces kills what runs in any of the namespaces and what that has started.
func sweepSpaces(spaces map[kernel.NSID]bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), sweepTime)
	defer cancel()
	return sweep(ctx, func(pids []int) map[int]bool {
		in := map[int]bool{}
		addInside(in, pids, spaces)
		return in
	})
}

func addInside(in map[int]bool, pids []int, spaces map[kernel.NSID]bool) {
	for _, pid := range pids {
		for _, kind := range []string{"net", "mnt"} {
			if id, ok := nsOf(strconv.Itoa(pid), kind); ok && spaces[id] {
				in[pid] = true
			}
		}
	}
}

// sweep kills the processes that seeds picks from all, and their descendants, until none is left. This process and the first
// one are spared.
func sweep(ctx context.Context, seeds func(pids []int) map[int]bool) error {
	ctx, cancel := context.WithTimeout(ctx, sweepTime)
	defer cancel()
	for {
		held, err := holdAll()
		if err != nil {
			return err
		}
		n, err := killRound(ctx, held, seeds)
		if err == nil {
			awaitReaped(ctx, held)
		}
		for _, p := range held {
			p.close()
		}
		if err != nil || n == 0 {
			return err
		}
	}
}

// holdAll opens all processes but this and the first: what is learnt about them afterwards is about them, or they have ended.
func holdAll() (map[int]*process, error) {
	pids, err := allProcesses()
	if err != nil {
		return nil, err
	}
	held := map[int]*process{}
	for _, pid := range pids {
		if pid == 1 || pid == os.Getpid() {
			continue
		}
		if p, err := openProcess(pid); err == nil { // it may have ended since
			held[pid] = p
		}
	}
	return held, nil
}

// killRound kills those of held that seeds picks, and their descendants, and leaves only them in held.
func killRound(ctx context.Context, held map[int]*process, seeds func([]int) map[int]bool) (int, error) {
	pids, parents := make([]int, 0, len(held)), map[int]int{}
	for pid := range held {
		ppid, alive := parentOf(pid)
		if !alive {
			continue
		}
		pids, parents[pid] = append(pids, pid), ppid
	}
	in := seeds(pids)
	for more := len(in) > 0; more; {
		more = false
		for pid, ppid := range parents {
			if !in[pid] && in[ppid] {
				in[pid], more = true, true
			}
		}
	}
	for pid, p := range held {
		if !in[pid] {
			p.close()
			delete(held, pid)
		}
	}
	var errs []error
	for pid := range in {
		errs = append(errs, held[pid].kill(unix.SIGKILL))
	}
	for pid := range in {
		if err := held[pid].await(ctx); err != nil {
			errs = append(errs, fmt.Errorf("process %d of the lab does not end: %w", pid, err))
		}
	}
	return len(in), errors.Join(errs...)
}

// awaitReaped gives those who have to reap the killed ones, such as a machine's first process, a while to do so.
func awaitReaped(ctx context.Context, killed map[int]*process) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, p := range killed {
		for unix.PidfdSendSignal(int(p.fd.Fd()), 0, nil, 0) == nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
}

// parentOf reads the parent of a process from its stat file, and whether it is more than a zombie.
func parentOf(pid int) (ppid int, alive bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	return parseStat(b)
}

// parseStat reads "PID (NAME) STATE PPID ...", in which NAME may hold anything (proc_pid_stat(5)).
func parseStat(b []byte) (ppid int, alive bool) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, false
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 2 {
		return 0, false
	}
	ppid, err := strconv.Atoi(string(f[1]))
	return ppid, err == nil && f[0][0] != 'Z' && f[0][0] != 'X'
}

// nsOf identifies a namespace of a process.
func nsOf(pid, kind string) (kernel.NSID, bool) { return fileID("/proc/"+pid+"/ns/"+kind, nil) }

func fileID(path string, f *os.File) (kernel.NSID, bool) {
	var st os.FileInfo
	var err error
	if f != nil {
		st, err = f.Stat()
	} else {
		st, err = os.Stat(path)
	}
	if err != nil {
		return kernel.NSID{}, false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return kernel.NSID{}, false
	}
	return kernel.NSID{Dev: uint64(sys.Dev), Ino: sys.Ino}, true
}
