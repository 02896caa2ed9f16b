package lab_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lab"
)

// TestUpDoesNotWaitForAKeeperThatDies has a keeper that lives just long enough to be seen: a killed process keeps its
// environment until it has let go of its memory.
func TestUpDoesNotWaitForAKeeperThatDies(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 1, Containers: 1})
	s := whole(t, l)
	restore := hide(t, l, "silk")
	do(t, l.Kill(t.Context(), "keeper"))
	do(t, l.Kill(t.Context(), "supervisor"))
	await(t, "both are dead", func() error {
		for _, name := range []string{"keeper", "supervisor"} {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", program(t, s, name).PID)); err == nil {
				return errors.New(name + " lives")
			}
		}
		return nil
	})
	dying := exec.Command("sleep", "0.7")
	dying.Env = []string{"PATH=/usr/bin:/bin", "SILK_LAB_MEMBER=" + l.Dir(), "SILK_LAB_ROLE=keeper"}
	do(t, dying.Start())
	reaped := make(chan struct{})
	go func() { defer close(reaped); dying.Wait() }()
	defer func() { <-reaped }()
	restore()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // a supervisor that is on its way is given 20 s
	defer cancel()
	again, err := lab.Up(ctx, lab.Options{Dir: l.Dir(), Programs: filepath.Join(filepath.Dir(l.Dir()), "bin")})
	do(t, err)
	whole(t, again)
}

// TestWaitingEndsWithTheLab takes a lab down that somebody waits for.
func TestWaitingEndsWithTheLab(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 1, Containers: 1})
	whole(t, l)
	do(t, l.Partition(t.Context(), "host1"))
	restore := hide(t, l, "silk-daemon")
	do(t, l.Kill(t.Context(), "host1/silk-daemon")) // it will not be whole
	eventually(t, l, "host1 is silent", func(s lab.Status) bool { return !s.Whole() })
	waited := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { _, err := l.AwaitWhole(ctx); waited <- err }()
	do(t, l.Down(t.Context()))
	if err := <-waited; !errors.Is(err, fault.NotFound) {
		t.Errorf("the wait ended with %v, want not found", err)
	}
	restore()
}
