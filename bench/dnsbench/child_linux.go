package dnsbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// childVariable says what a process that Run starts is to do: "wake", "tell ADDRESS" or "pace ADDRESS RATE NANOSECONDS".
const childVariable = "SILK_BENCH_DNS"

// self returns the command that runs this program as a child, which dies with this process.
func self(ctx context.Context, what string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"="+what)
	return cmd
}

// Child does what a process that Run starts must do, if this is one, and reports whether it was. main calls it first.
func Child() bool {
	var role, at string
	var rate float64
	var length int64
	n, _ := fmt.Sscan(os.Getenv(childVariable), &role, &at, &rate, &length)
	if n < 1 {
		return false
	}
	unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	to, err := netip.ParseAddrPort(at)
	switch {
	case role == "wake":
		err = wake()
	case err != nil:
	case role == "tell":
		err = tell(to)
	case n < 4:
		err = fmt.Errorf("%s: no rate and length", childVariable)
	default:
		var p paced
		if p, err = pace(to, rate, time.Duration(length)); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(p)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/dnsbench:", err)
		os.Exit(1)
	}
	return true
}

// pace asks at a rate, from a process on the processors of who asks.
func (b *run) pace(ctx context.Context, at netip.AddrPort, rate float64, length time.Duration) (p paced, err error) {
	cmd := self(ctx, fmt.Sprintf("pace %v %v %d", at, rate, length))
	out, err := os.CreateTemp(b.dir, "paced")
	if err != nil {
		return p, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := b.pinned(b.loadCPUs, cmd.Start); err != nil {
		return p, err
	}
	if err := cmd.Wait(); err != nil {
		return p, fmt.Errorf("ask at a rate: %w", err)
	}
	_, err = out.Seek(0, 0)
	return p, errors.Join(err, json.NewDecoder(out).Decode(&p))
}

// wake computes while nobody else has anything to compute, until its parent has ended.
func wake() error {
	runtime.LockOSThread()
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil {
		return fmt.Errorf("compute when nobody else does: %w", err)
	}
	for parent := os.Getppid(); os.Getppid() == parent; {
	}
	return nil
}

// awake keeps processors from idling until stop: those of a virtual machine are given to others when they do, and come back when it suits
// the host. How long that takes says nothing of a server.
func (b *run) awake(ctx context.Context) (stop func(), err error) {
	var all []*exec.Cmd
	stop = func() {
		for _, cmd := range all {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	for _, c := range slices.Concat(b.serverCPUs, b.loadCPUs) {
		cmd := self(ctx, "wake")
		cmd.Stderr = os.Stderr
		if err := b.pinned([]int{c}, cmd.Start); err != nil {
			stop()
			return nil, err
		}
		all = append(all, cmd)
	}
	return stop, nil
}
