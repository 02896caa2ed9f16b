package endpoint_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

func (h host) open(r endpoint.Record) (ns *kernel.NS, err error) {
	err = h.ns.Do(func() error {
		ns, err = endpoint.OpenNamespace(r)
		return err
	})
	return ns, err
}

// opens fails the test unless the record's namespace is want, or cannot be found when want is zero.
func (h host) opens(when string, r endpoint.Record, want kernel.NSID) {
	h.t.Helper()
	ns, err := h.open(r)
	if want.IsZero() {
		if !errors.Is(err, fault.NotFound) {
			h.t.Errorf("%s: %v, want fault.NotFound", when, err)
		}
		if err == nil {
			ns.Close()
		}
		return
	}
	if err != nil {
		h.t.Errorf("%s: %v", when, err)
		return
	}
	defer ns.Close()
	if id, err := ns.ID(); id != want {
		h.t.Errorf("%s: opened %v, %v, want %v", when, id, err, want)
	}
}

// sleeper starts a process in ns and returns its way in. It ends with the test or by the function.
func sleeper(t *testing.T, ns *kernel.NS) (path string, end func()) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	end = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(end)
	return filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "ns/net"), end
}

func TestOpenNamespace(t *testing.T) {
	h, c, other := newHost(t), netns.New(t), netns.New(t)
	path := filepath.Join(t.TempDir(), "c1")
	if err := c.Bind(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kernel.UnbindNS(path) })
	s := h.spec("c1", c)
	s.Path = path
	r := h.must(h.attach(s))
	h.opens("attached", r, r.Namespace)

	second := h.spec("c2", other)
	r2 := h.must(h.attach(second))
	mixed := r
	mixed.Path = filepath.Join(t.TempDir(), "c2")
	if err := other.Bind(mixed.Path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kernel.UnbindNS(mixed.Path) })
	h.opens("the path is another container's", mixed, kernel.NSID{})
	mixed.Namespace = r2.Namespace // as if the number had been used again
	h.opens("the number and the path are another container's", mixed, kernel.NSID{})

	if err := kernel.UnbindNS(path); err != nil {
		t.Fatal(err)
	}
	h.opens("without a name or a process", r, kernel.NSID{})
	_, end := sleeper(t, c)
	h.opens("by its process", r, r.Namespace)
	mixed.Namespace = r.Namespace
	h.opens("by its process, though the path is another container's", mixed, r.Namespace)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.opens("by its process, though a file has its name", r, r.Namespace)
	if err := h.detach(r.Key, c); err != nil {
		t.Fatal(err)
	}
	h.opens("detached", r, kernel.NSID{})
	end()
}

// TestOpenNamespaceThoughItsPathIsAnothers: what the runtime named may be anything by now, such as a number of a descriptor that is a socket's.
func TestOpenNamespaceThoughItsPathIsAnothers(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	r := h.must(h.attach(h.spec("c1", c)))
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)
	os.Symlink("loop", filepath.Join(dir, "loop"))
	_, end := sleeper(t, c)
	for _, way := range []string{"socket", "file", "file/below", "loop", "nothing"} {
		r.Path = filepath.Join(dir, way)
		h.opens(way, r, r.Namespace)
	}
	end()
	for _, way := range []string{"socket", "file", "file/below", "loop", "nothing"} {
		r.Path = filepath.Join(dir, way)
		h.opens(way+" without a process", r, kernel.NSID{})
	}
}

func TestOpenNamespaceLeaksNothing(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	sleeper(t, c)
	r := h.must(h.attach(h.spec("c1", c)))
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := count()
	gone := r
	gone.Device = "s-010255030099"
	for range 20 {
		h.opens("by its process", r, r.Namespace)
		h.opens("without its device", gone, kernel.NSID{})
	}
	if after := count(); after > before {
		t.Errorf("%d open files, before %d", after, before)
	}
}
