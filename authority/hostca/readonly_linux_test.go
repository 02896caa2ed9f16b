package hostca_test

import (
	"os"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/authority/hostca"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/internal/testkit"
	"golang.org/x/sys/unix"
)

// immutable is FS_IMMUTABLE_FL of linux/fs.h.
const immutable = 0x10

// setFlags sets the attributes of a directory as chattr does.
func setFlags(t *testing.T, dir string, flags int) error {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags)
}

// TestADiskThatHasBecomeReadOnly: what was saved is used without a controller, though nothing can be changed, not even what a killed process left.
func TestADiskThatHasBecomeReadOnly(t *testing.T) {
	f := newFleet(t)
	c, dir := f.controller(t, ""), t.TempDir()
	i, stop := start(t, f.config(t, c.URL, dir))
	leaf(t, i, spec)
	stop()
	c.CloseClientConnections()
	c.Close()
	if err := os.WriteFile(filepath.Join(dir, durable.Temp+"1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, filepath.Join(dir, "roots")} {
		testkit.Require(t, "immutable", setFlags(t, d, immutable))
		t.Cleanup(func() {
			if err := setFlags(t, d, 0); err != nil {
				t.Error(err)
			}
		})
	}
	if err := os.Chmod(dir, 0o700); err == nil {
		t.Fatal("the directory can be changed: the test tells nothing")
	}
	i, err := hostca.Open(f.config(t, c.URL, dir))
	if err != nil {
		t.Fatal(err)
	}
	verify(t, leaf(t, i, spec), rootsOf(t, dir))
}
