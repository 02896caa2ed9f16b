package testkit_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// childVariable makes the test binary a process that starts servers and waits to be killed.
const childVariable = "SILK_TESTKIT_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) == "" {
		testkit.Main(m)
	}
	for _, start := range []func(context.Context, testkit.Options) (*testkit.Server, error){testkit.StartPostgres, testkit.StartMariaDB} {
		s, err := start(context.Background(), testkit.Options{})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(s.Dir())
	}
	select {}
}

// TestServersDieWithTheirProcess kills a process that has servers, so that none of its own code can end them.
func TestServersDieWithTheirProcess(t *testing.T) {
	for _, f := range []string{"/usr/sbin/mariadbd", "/usr/lib/postgresql"} {
		_, err := os.Stat(f)
		testkit.Require(t, "servers", err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var pids []int
	for range 2 {
		if !lines.Scan() || strings.HasPrefix(lines.Text(), "error") {
			cmd.Process.Kill()
			t.Fatalf("the child said %q, %v", lines.Text(), lines.Err())
		}
		dir := lines.Text()
		t.Cleanup(func() { os.RemoveAll(dir) })
		for _, f := range []string{"data/postmaster.pid", "pid"} {
			var pid int
			if b, err := os.ReadFile(filepath.Join(dir, f)); err == nil {
				fmt.Sscan(string(b), &pid)
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) != 2 {
		t.Errorf("servers have process ids %v, want two", pids)
	}
	cmd.Process.Kill()
	cmd.Wait()
	deadline := time.After(15 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, pid := range pids {
		for !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("server %d is still there", pid)
			}
		}
	}
}
