package kernel_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

func dial(t *testing.T, ns *kernel.NS) *kernel.Conn {
	t.Helper()
	c, err := kernel.Dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func bridge(b *kernel.Batch, name string) {
	b.Add(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, name)
	b.Nest(unix.IFLA_LINKINFO, func() { b.Attr(unix.IFLA_INFO_KIND, []byte("bridge")) })
}

func links(t *testing.T, c *kernel.Conn) map[string]bool {
	t.Helper()
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	var names map[string]bool
	err := c.Dump(&b, func() { names = map[string]bool{} }, func(m kernel.Message) error {
		for t, v := range kernel.Attrs(m.Body[unix.SizeofIfInfomsg:]) {
			if t == unix.IFLA_IFNAME {
				names[kernel.Text(v)] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestBatchGoesOnAfterARefusal(t *testing.T) {
	ns := netns.New(t)
	c := dial(t, ns)
	var b kernel.Batch
	for _, n := range []string{"a", "a", "b"} {
		bridge(&b, n)
	}
	refused, err := c.Do(&b)
	if err != nil {
		t.Fatal(err)
	}
	if len(refused) != 1 || refused[0].Index != 1 || !errors.Is(refused[0], unix.EEXIST) {
		t.Fatalf("refused %v, want request 1 with EEXIST", refused)
	}
	if got := links(t, c); !got["a"] || !got["b"] || !got["lo"] || len(got) != 3 {
		t.Errorf("links %v, want a, b and lo", got)
	}
}

func TestBatchOfManyChunks(t *testing.T) {
	c := dial(t, netns.New(t))
	var b kernel.Batch
	bridge(&b, "a")
	for i := range 20_000 {
		b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(2+i/10_000*9999, 0, 0)) // a real link, then one that is not there
		b.Uint32(unix.IFLA_MTU, 1400)
	}
	refused, err := c.Do(&b)
	if err != nil {
		t.Fatal(err)
	}
	if len(refused) == 0 || refused[0].Index != 10_001 {
		t.Errorf("first refusal %v of %d, want request 10001", refused[:min(1, len(refused))], len(refused))
	}
}

func TestDoLeavesTheCallerWhereItWas(t *testing.T) {
	before, err := kernel.CurrentNS()
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	ns := netns.New(t)
	inside := kernel.NSID{}
	if err := ns.Do(func() error {
		n, err := kernel.CurrentNS()
		if err != nil {
			return err
		}
		defer n.Close()
		inside, err = n.ID()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want, _ := ns.ID()
	outer, _ := before.ID()
	if inside != want || inside == outer {
		t.Errorf("inside Do the namespace was %v, want %v (the caller's is %v)", inside, want, outer)
	}
}

func TestTheMainThreadStaysWhereItWas(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns := netns.New(t)
	for range 2000 { // the runtime picks the thread
		if err := ns.Do(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("/proc/self/ns/net is %s, %v, was %s", after, err, before)
	}
}

func TestNamedNamespace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := netns.New(t).Bind(path); err != nil {
		t.Fatal(err)
	}
	ns, err := kernel.OpenNS(path)
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	for range 2 {
		if err := kernel.UnbindNS(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := kernel.OpenNS(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open after unbind: %v, want not exist", err)
	}
}

func TestOpenNSRefusesWhatIsNoNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/mnt", "/proc/999999999/ns/net", t.TempDir()} {
		if _, err := kernel.OpenNS(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want not exist", path, err)
		}
	}
}

func FuzzAttrs(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 1, 2, 3, 4})
	f.Add([]byte{5, 0, 1, 0, 1})
	f.Add([]byte{3, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		for _, v := range kernel.Attrs(b) {
			n += 4 + len(v)
			_, _ = kernel.Uint32(v), kernel.Text(v)
		}
		if n > len(b) {
			t.Fatalf("%d bytes of attributes in %d", n, len(b))
		}
	})
}
