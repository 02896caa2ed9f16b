package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"code.cloudfoundry.org/silk/bench/daemon"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// pluginsVersion is the release of the standard plugins that silk-cni is compared with.
const pluginsVersion = "v1.9.1"

// bed is what the measurements run on.
type bed struct {
	dir     string // a tmpfs, as /run is
	bin     string
	silk    *host
	fresh   *host // of ours, without a container
	ptp     *host // with ipMasq
	plain   *host // without
	raw     *host
	closers []func()
}

// host is a host's namespace with container namespaces, made beforehand and used again and again.
type host struct {
	name       string
	ns         *kernel.NS
	containers []*container
	attached   int
	daemon     *daemon.Host // nil where it is not ours
}

// container is a network namespace and its name.
type container struct {
	id, path string
	number   int
	ns       *kernel.NS
}

func (b *bed) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		b.closers[i]()
	}
}

func (b *bed) later(f func()) { b.closers = append(b.closers, f) }

func setUp(ctx context.Context) (_ *bed, err error) {
	b := new(bed)
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	if b.dir, err = os.MkdirTemp("", "silkbench-cni-"); err != nil {
		return nil, err
	}
	b.later(func() { os.RemoveAll(b.dir) })
	if err := syscall.Mount("silkbench", b.dir, "tmpfs", 0, ""); err != nil {
		return nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	b.later(func() { syscall.Unmount(b.dir, syscall.MNT_DETACH) })
	if err := b.build(ctx); err != nil {
		return nil, err
	}
	most := levels[len(levels)-1] + atOnce
	for _, h := range []struct {
		at         **host
		name       string
		containers int
	}{{&b.ptp, "ptp", most}, {&b.plain, "plain", most}, {&b.raw, "raw", most}} {
		if *h.at, err = b.newHost(h.name, nil, h.containers); err != nil {
			return nil, err
		}
	}
	if b.silk, err = b.newSilkHost(ctx, "silk", most); err != nil {
		return nil, err
	}
	if b.fresh, err = b.newSilkHost(ctx, "fresh", 1); err != nil {
		return nil, err
	}
	return b, errors.Join(b.configurePTP("ptp", true), b.configurePTP("plain", false))
}

// build makes the programs: ours, one that does nothing, and the standard ones from their module.
func (b *bed) build(ctx context.Context) error {
	b.bin = filepath.Join(b.dir, "bin")
	empty := filepath.Join(b.dir, "empty")
	if err := os.MkdirAll(empty, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(empty, "main.go"), []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		return err
	}
	const plugins = "github.com/containernetworking/plugins/plugins/"
	for _, args := range [][]string{
		{"build", "-o", filepath.Join(b.bin, "silk-cni"), "code.cloudfoundry.org/silk/cmd/silk-cni"},
		{"build", "-o", filepath.Join(b.bin, "silk-daemon"), "code.cloudfoundry.org/silk/cmd/silk-daemon"},
		{"build", "-o", filepath.Join(b.bin, "empty"), filepath.Join(empty, "main.go")},
		{"install", plugins + "main/ptp@" + pluginsVersion, plugins + "ipam/host-local@" + pluginsVersion},
	} {
		args = append([]string{args[0], "-trimpath", "-ldflags=-s -w"}, args[1:]...)
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+b.bin)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %v: %w\n%s", args, err, out)
		}
	}
	return nil
}

// newHost makes containers for a host, and a namespace for it if ns is nil.
func (b *bed) newHost(name string, ns *kernel.NS, containers int) (*host, error) {
	h := &host{name: name, ns: ns}
	var err error
	if ns == nil {
		if h.ns, err = kernel.NewNS(); err != nil {
			return nil, err
		}
		b.later(func() { h.ns.Close() })
	}
	if err := os.MkdirAll(filepath.Join(b.dir, "netns"), 0o755); err != nil {
		return nil, err
	}
	for i := range containers {
		c := &container{id: fmt.Sprintf("%s-%d", name, i), number: i}
		c.path = filepath.Join(b.dir, "netns", c.id)
		if c.ns, err = kernel.NewNS(); err != nil {
			return nil, err
		}
		b.later(func() { c.ns.Close() })
		if err := c.ns.Bind(c.path); err != nil {
			return nil, err
		}
		b.later(func() { kernel.UnbindNS(c.path) })
		h.containers = append(h.containers, c)
	}
	return h, nil
}

// newSilkHost makes a host as operators have it: with silk-daemon, which has a lease.
func (b *bed) newSilkHost(ctx context.Context, name string, containers int) (*host, error) {
	d, err := daemon.NewHost(ctx, daemon.Options{Dir: filepath.Join(b.dir, name), Program: filepath.Join(b.bin, "silk-daemon"), Overlay: "10.255.0.0/16", Bits: 23, Interval: 30})
	if err != nil {
		return nil, err
	}
	b.later(d.Close)
	if err := d.Start(ctx); err != nil {
		return nil, err
	}
	if err := d.Wait(ctx, 0); err != nil {
		return nil, err
	}
	h, err := b.newHost(name, d.NS, containers)
	if err != nil {
		return nil, err
	}
	h.daemon = d
	return h, os.WriteFile(b.config(name), fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"silk","type":"silk-cni","daemonPort":23954,"endpointDir":%q}`, d.EndpointDir()), 0o644)
}

func (b *bed) configurePTP(name string, masquerade bool) error {
	return os.WriteFile(b.config(name), fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":%q,"type":"ptp","ipMasq":%v,"mtu":1450,"ipam":{"type":"host-local","subnet":"10.1.0.0/23","dataDir":%q}}`,
		name, masquerade, filepath.Join(b.dir, "ipam")), 0o644)
}

func (b *bed) config(name string) string { return filepath.Join(b.dir, name+".json") }

// on runs fn on threads of the host's namespace, n at once, and waits.
func (h *host) on(n int, fn func(i int) error) error {
	errs := make(chan error, n)
	ready, start := make(chan struct{}), make(chan struct{})
	for i := range n {
		go func() {
			errs <- h.ns.Do(func() error {
				ready <- struct{}{}
				<-start
				return fn(i)
			})
		}()
	}
	for range n {
		<-ready
	}
	runtime.GC()
	close(start)
	var all []error
	for range n {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}
