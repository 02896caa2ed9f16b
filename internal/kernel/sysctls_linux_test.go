package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

func TestSysctlsRememberTheFirstValue(t *testing.T) {
	ns := netns.New(t)
	s := &kernel.Sysctls{Dir: filepath.Join(t.TempDir(), "sysctl")}
	const forward, filter, gone = "net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv4/conf/a.b/rp_filter"
	do := func(f func() error) {
		t.Helper()
		if err := ns.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	want := func(key, value string) {
		t.Helper()
		do(func() error {
			got, err := kernel.Sysctl(key)
			if err == nil && got != value {
				t.Errorf("%s is %s, want %s", key, got, value)
			}
			return err
		})
	}
	do(func() error { return kernel.SetSysctl(filter, "2") })
	do(s.Restore) // nothing recorded yet
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { do(func() error { return s.Set(forward, "1") }) })
	}
	wg.Wait()
	do(func() error { return s.Set(filter, "1") })
	do(func() error { return s.Set(filter, "0") }) // a later value of ours
	want(forward, "1")
	do(s.Restore)
	want(forward, "0")
	want(filter, "2")
	if _, err := os.Stat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record is left: %v", err)
	}

	do(func() error { return s.Set(forward, "1") })
	do(func() error { return kernel.SetSysctl(forward, "0") })
	do(func() error { return s.Set(filter, "1") })
	do(func() error { return kernel.SetSysctl(filter, "0") }) // somebody else's wish since
	c := dial(t, ns)
	var b kernel.Batch
	bridge(&b, "a.b")
	if refused, err := c.Do(&b); err != nil || refused != nil {
		t.Fatal(refused, err)
	}
	do(func() error { return s.Set(gone, "1") })
	b.Reset()
	b.Add(unix.RTM_DELLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, "a.b")
	if refused, err := c.Do(&b); err != nil || refused != nil {
		t.Fatal(refused, err)
	}
	do(s.Restore)
	want(filter, "0")
}

func TestSysctlsKeepWhatTheyCannotRestore(t *testing.T) {
	ns := netns.New(t)
	s := &kernel.Sysctls{Dir: t.TempDir()}
	file := filepath.Join(s.Dir, "net:ipv4:ip_forward")
	if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(s.Restore); err == nil {
		t.Error("a record that cannot be read was passed over")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestFlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	open := func() *kernel.File {
		t.Helper()
		f, err := kernel.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first, second, third := open(), open(), open()
	if err := kernel.Flock(context.Background(), first); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := kernel.Flock(ctx, second); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a held lock: %v, want unavailable", err)
	}
	second.Close()
	got := make(chan error, 1)
	go func() { got <- kernel.Flock(context.Background(), third) }()
	first.Close()
	if err := <-got; err != nil {
		t.Errorf("after the holder let go: %v", err)
	}
	third.Close()
	fourth := open()
	defer fourth.Close()
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := kernel.Flock(ctx, fourth); err != nil {
		t.Errorf("a waiter that gave up kept the lock: %v", err)
	}
}

func TestVisitComesBack(t *testing.T) {
	ns := netns.New(t)
	if err := netns.New(t).Do(func() error { // on a thread that nobody else uses
		before, err := threadNS()
		if err != nil {
			return err
		}
		home, err := kernel.Dial(nil)
		if err != nil {
			return err
		}
		defer home.Close()
		failed := errors.New("failed")
		var inside kernel.NSID
		if err := ns.Visit(home, func() error { inside, err = threadNS(); return failed }); !errors.Is(err, failed) {
			t.Errorf("error %v, want the function's", err)
		}
		after, err := threadNS()
		if want, _ := ns.ID(); inside != want || after != before {
			t.Errorf("before %v, inside %v (want %v), after %v", before, inside, want, after)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// threadNS returns the calling thread's namespace by /proc, and an error if CurrentID has another opinion.
func threadNS() (kernel.NSID, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return kernel.NSID{}, err
	}
	id := kernel.NSID{Dev: uint64(st.Dev), Ino: st.Ino}
	got, err := kernel.CurrentID()
	if err == nil && got != id {
		err = fmt.Errorf("the namespace is %v, want %v", got, id)
	}
	return id, err
}

func TestQuery(t *testing.T) {
	ns := netns.New(t)
	c := dial(t, ns)
	var b kernel.Batch
	for _, name := range []string{"lo", "none", "lo"} {
		b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
		b.String(unix.IFLA_IFNAME, name)
	}
	for range 2 {
		a, err := c.Query(&b)
		if err != nil {
			t.Fatal(err)
		}
		if len(a) != 3 || a[0].Err != nil || a[2].Err != nil || len(a[0].Body) == 0 || !errors.Is(a[1].Err, unix.ENODEV) {
			t.Errorf("answers %+v", a)
		}
	}
}

func TestHasTable(t *testing.T) {
	ns := netns.New(t)
	if there, err := kernel.HasTable(ns, "silk-policy"); err != nil || there {
		t.Errorf("%v %v, want absent", there, err)
	}
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, step := range []struct {
		message uint16
		attr    uint16
		value   string
		want    bool
	}{
		{unix.NFT_MSG_NEWTABLE, unix.NFTA_TABLE_FLAGS, "\x00\x00\x00\x00", false}, // empty
		{unix.NFT_MSG_NEWCHAIN, unix.NFTA_CHAIN_NAME, "base\x00", true},
		{unix.NFT_MSG_NEWTABLE, unix.NFTA_TABLE_FLAGS, "\x00\x00\x00\x01", false}, // dormant
	} {
		var b kernel.Batch
		b.Add(kernel.NFTables(step.message), unix.NLM_F_CREATE, kernel.NFGen(unix.NFPROTO_INET))
		b.String(unix.NFTA_TABLE_NAME, "silk-policy") // as in a chain
		b.Attr(step.attr, []byte(step.value))
		if err := c.Transact(&b, 0); err != nil {
			t.Fatal(err)
		}
		if there, err := kernel.HasTable(ns, "silk-policy"); err != nil || there != step.want {
			t.Errorf("after %+v: %v %v", step, there, err)
		}
	}
}

// TestHasTableWithRules: a table that was flushed has its chains still, and judges nothing.
func TestHasTableWithRules(t *testing.T) {
	_, err := exec.LookPath("nft")
	testkit.Require(t, "nft", err)
	ns := netns.New(t)
	for _, step := range []struct {
		command string
		want    bool
	}{
		{"add table inet t; add chain inet t a { type filter hook forward priority 0; }; add rule inet t a drop", false},
		{"add chain inet t b", false},
		{"add chain inet t c; add rule inet t c drop; add rule inet t b jump c", true},
		{"flush chain inet t b", false},
		{"add rule inet t b drop; flush table inet t", false},
	} {
		err := ns.Do(func() error {
			out, err := exec.Command("nft", step.command).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("nft %s: %w: %s", step.command, err, out)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if there, err := kernel.HasTable(ns, "t", "a", "b"); err != nil || there != step.want {
			t.Errorf("after %q: %v %v", step.command, there, err)
		}
	}
}

func TestReadNames(t *testing.T) {
	dir := t.TempDir()
	want := map[string]bool{}
	for i := range 3000 { // more than one read
		name := filepath.Base(filepath.Join(dir, "some-rather-long-name-"+string(rune('a'+i%26))+time.Duration(i).String()))
		want[name] = true
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names, err := kernel.ReadNames(dir)
	if err != nil || len(names) != len(want) {
		t.Fatalf("%d names, want %d: %v", len(names), len(want), err)
	}
	for _, n := range names {
		if !want[n] {
			t.Errorf("unknown name %q", n)
		}
	}
	if _, err := kernel.ReadNames(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}
