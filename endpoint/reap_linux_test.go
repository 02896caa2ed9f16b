package endpoint_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// named gives a container's namespace a name and attaches it.
func (h host) named(id string) (r endpoint.Record, ns *kernel.NS) {
	h.t.Helper()
	ns = netns.New(h.t)
	s := h.spec(id, ns)
	s.Path = filepath.Join(h.t.TempDir(), id)
	if err := ns.Bind(s.Path); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { kernel.UnbindNS(s.Path) })
	return h.must(h.attach(s)), ns
}

func (h host) pass(r *endpoint.Reaper, now time.Time) (n int) {
	h.t.Helper()
	if err := h.ns.Do(func() (err error) { n, err = r.Pass(now); return err }); err != nil {
		h.t.Fatal(err)
	}
	return n
}

// TestReaper: only what has neither device nor namespace goes, and only when it has been so for a while.
func TestReaper(t *testing.T) {
	h := newHost(t)
	h.named("live")
	unnamed, _ := h.named("unnamed") // a process keeps the namespace
	if err := kernel.UnbindNS(unnamed.Path); err != nil {
		t.Fatal(err)
	}
	cut, _ := h.named("cut")
	ip(t, h.ns, "link", "del", cut.Device)
	again, _ := h.named("again") // the name is another namespace's by now, and the device is gone
	ip(t, h.ns, "link", "del", again.Device)
	if err := kernel.UnbindNS(again.Path); err != nil {
		t.Fatal(err)
	}
	if err := netns.New(t).Bind(again.Path); err != nil {
		t.Fatal(err)
	}
	dead, ns := h.named("dead")
	if err := kernel.UnbindNS(dead.Path); err != nil {
		t.Fatal(err)
	}
	ns.Close()
	for deadline := time.Now().Add(10 * time.Second); slices.ContainsFunc(h.containers(), func(c endpoint.Container) bool { return c.Device == dead.Device }); {
		if time.Now().After(deadline) {
			t.Fatal("the kernel keeps the device of a dead namespace")
		}
	}
	r := &endpoint.Reaper{Dir: h.dir, Grace: time.Minute}
	now := time.Now()
	for _, at := range []time.Duration{0, 59 * time.Second} {
		if n := h.pass(r, now.Add(at)); n != 0 {
			t.Errorf("after %v: %d forgotten", at, n)
		}
	}
	f, err := os.Open(filepath.Join(h.dir.Path(), "silk@again@eth0@"+again.Address().String()))
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := kernel.TryFlock(f); !ok {
		t.Fatal(err)
	}
	if n := h.pass(r, now.Add(time.Minute)); n != 1 {
		t.Errorf("%d forgotten, want the dead one, and not the one that somebody works on", n)
	}
	f.Close()
	if n := h.pass(r, now.Add(2*time.Minute)); n != 0 {
		t.Errorf("%d forgotten, want none: the grace begins anew", n)
	}
	if n := h.pass(r, now.Add(3*time.Minute)); n != 1 {
		t.Errorf("%d forgotten, want the one whose namespace is another's", n)
	}
	want := []string{"silk@cut@eth0@" + cut.Address().String(), "silk@live@eth0@10.255.30.2", "silk@unnamed@eth0@" + unnamed.Address().String()}
	if got := h.files(); !slices.Equal(got, want) {
		t.Errorf("records %v, want %v", got, want)
	}
}

// TestReaperBesideAttach: whatever the reaper does, an endpoint that is attached is recorded.
func TestReaperBesideAttach(t *testing.T) {
	h := newHost(t)
	r := &endpoint.Reaper{Dir: h.dir}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		h.ns.Do(func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
					r.Pass(time.Now())
				}
			}
		})
	})
	for range 20 {
		c := netns.New(t)
		s := h.spec("c1", c) // its path names nothing: only the device and the lock speak for it
		rec := h.must(h.attach(s))
		if got, err := h.dir.Lookup(s.Key); err != nil || got.Address() != rec.Address() {
			t.Errorf("record %v %v", got, err)
		}
		if err := h.ns.Do(func() error { return h.dir.Detach(context.Background(), s.Key, c, nil) }); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	h.clean()
}
