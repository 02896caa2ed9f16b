package testkit_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestLaunch starts what says that it serves after a line that is longer than any buffer, and ends it well and badly.
func TestLaunch(t *testing.T) {
	const script = `trap 'echo ending; exit 0' TERM; head -c 300000 /dev/zero | tr '\0' x; echo; echo '{"msg":"serving","api":"here"}'; echo after >&2; while :; do sleep 0.01; done`
	var at struct{ API string }
	p := testkit.Launch(t, exec.Command("sh", "-c", script), nil, &at)
	if at.API != "here" {
		t.Errorf("it serves at %q", at.API)
	}
	testkit.Until(t, 10*time.Second, "its errors are in the log", func() bool { return strings.Contains(p.Log(), "after\n") })
	p.End(t)
	if got := p.Log(); !strings.HasSuffix(got, "ending\n") || strings.Count(got, "x") != 300000 {
		t.Errorf("the log of %d bytes ends with %q", len(got), got[max(0, len(got)-20):])
	}
	p = testkit.Launch(t, exec.Command("sh", "-c", script), nil, &at)
	p.Kill()
	if err := p.Wait(); err == nil || p.Cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("killed it ended with %v", err)
	}
}

// TestPrograms: a program runs, and is gone afterwards.
func TestPrograms(t *testing.T) {
	var path string
	t.Run("one", func(t *testing.T) {
		path = testkit.Program(t, "silk-teardown")
		if out, err := exec.Command(path, "-help").CombinedOutput(); !strings.Contains(string(out), "-config") {
			t.Errorf("%v %s", err, out)
		}
	})
	if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
		t.Errorf("after its test: %v", err)
	}
	if _, _, err := testkit.Programs("silk-nothing"); err == nil || !strings.Contains(err.Error(), "silk-nothing") {
		t.Errorf("of a program that there is not: %v", err)
	}
}
