package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/overlay"
)

// memory measures the resident memory of a process that holds an overlay of 2,047 peers and has changed and looked at it
// many times, against one that does nothing.
func memory(ctx context.Context, r *bench.Report) error {
	var full, empty []float64
	for range 3 {
		for _, m := range []struct {
			sizes *[]float64
			peers int
		}{{&empty, 0}, {&full, 2047}} {
			cmd := exec.CommandContext(ctx, "/proc/self/exe")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", holderVariable, m.peers))
			cmd.Stderr = os.Stderr
			out, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("run a process that holds an overlay: %w", err)
			}
			var kib float64
			if _, err := fmt.Sscan(string(out), &kib); err != nil {
				return errors.New("a process that holds an overlay did not say its size: does main call Hold?")
			}
			*m.sizes = append(*m.sizes, kib/1024)
		}
	}
	v := bench.Percentile(full, 1)
	r.Bar("overlay.hold.2047.resident", v, "MiB", bench.Median(empty), "<= 32 MiB", v <= 32)
	return nil
}

// hold makes an overlay of n peers, works on it, and prints the largest resident size it had, in KiB.
func hold(n int) error {
	if n > 0 {
		if err := work(n); err != nil {
			return err
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Println(strings.Fields(rest)[0])
		}
	}
	return nil
}

func work(n int) error {
	ctx := context.Background()
	ns, err := host()
	if err != nil {
		return err
	}
	defer ns.Close()
	f, err := overlay.Open(ns)
	if err != nil {
		return err
	}
	defer f.Close()
	stop, err := watch(ctx, f, func() {})
	if err != nil {
		return err
	}
	for i := range 100 {
		if i%2 == 0 {
			f.Forget()
		}
		if _, err := f.Set(ctx, config(n-i%3)); err != nil {
			return err
		}
	}
	return errors.Join(stop(), f.Remove(ctx, "silk-vtep"))
}
