package hostca_test

import (
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/authority/hostca"
)

// takeFiles takes every descriptor that this process may have until what is returned is called.
func takeFiles(t *testing.T) (giveBack func()) {
	t.Helper()
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	few := was
	few.Cur = 256
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	var taken []int
	for {
		fd, err := syscall.Dup(0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	return func() {
		for _, fd := range taken {
			syscall.Close(fd)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	}
}

// TestStateThatCannotBeReadStays: the next start may be able to, and there may be no controller.
func TestStateThatCannotBeReadStays(t *testing.T) {
	f := newFleet(t)
	c, dir := f.controller(t, ""), t.TempDir()
	i, stop := start(t, f.config(t, c.URL, dir))
	leaf(t, i, spec)
	stop()
	c.CloseClientConnections()
	c.Close()
	cfg := f.config(t, c.URL, dir)
	giveBack := takeFiles(t)
	i, err := hostca.Open(cfg)
	giveBack()
	if err != nil {
		t.Fatal(err)
	}
	if i.Need(inside) {
		t.Error("the state could be read: the test tells nothing")
	}
	if i, err = hostca.Open(cfg); err != nil {
		t.Fatal(err)
	}
	verify(t, leaf(t, i, spec), rootsOf(t, dir))
}
