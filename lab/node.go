package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
)

// node is a host, the place of the controller, or the outside: a space plugged into the underlay with programs in it.
type node struct {
	s     *supervisor
	name  string
	index int
	loop  *reconcile.Loop
	gone  chan struct{} // closed when the host has left

	pass      sync.Mutex // held through a pass or a command on the node: one changes it at a time; guards the next two
	collected bool
	detached  []netip.Addr // of containers that have gone

	mu         sync.RWMutex // guards what follows; held while the space is in use, so that it is not closed under a reader
	space      *space
	programs   []*task
	held       *handover // with programs
	containers map[string]*container
}

// task is a program and the end of the goroutine that keeps it.
type task struct {
	*program
	done chan struct{}
}

func keep(ctx context.Context, p *program) *task {
	t := &task{p, make(chan struct{})}
	go func() { defer close(t.done); p.run(ctx) }()
	return t
}

// end stops the program and waits until it has.
func (t *task) end() {
	if t != nil {
		t.stop()
		<-t.done
	}
}

func newNode(s *supervisor, name string, index int) *node {
	n := &node{s: s, name: name, index: index, gone: make(chan struct{}), containers: map[string]*container{}}
	n.loop = &reconcile.Loop{Name: name, Step: n.step, Log: s.log, Resync: 2 * time.Second, MinGap: 20 * time.Millisecond, Retry: 100 * time.Millisecond}
	return n
}

func (n *node) isHost() bool    { return n.index > 0 && n.index <= MaxHosts }
func (n *node) isOutside() bool { return n.index == outsideIndex }

// run turns the node's loop until ctx ends, which leaves everything running, or the host has left.
func (n *node) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx
		select {
		case <-n.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	n.loop.Run(ctx)
	<-ctx.Done()
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, t := range n.programs {
		<-t.done
	}
	for _, c := range n.containers {
		if c.responder != nil {
			<-c.responder.done
		}
	}
}

// step makes the node what the journal wants. One bad container does not keep the others from being attached.
func (n *node) step(ctx context.Context) error {
	n.pass.Lock()
	defer n.pass.Unlock()
	select {
	case <-n.gone:
		return nil
	default:
	}
	want, containers := n.s.wanted(n.name)
	if n.isHost() && want.Name == "" {
		return nil // an earlier pass has taken it out
	}
	if err := n.build(ctx, want); err != nil {
		return err
	}
	if err := n.collect(ctx, containers); err != nil {
		return fmt.Errorf("collect what is attached to %s and not wanted: %w", n.name, err)
	}
	var errs []error
	for _, c := range containers {
		errs = append(errs, n.settle(ctx, c))
	}
	if err := errors.Join(errs...); err != nil || !want.Leaving {
		return err
	}
	return n.leave(ctx)
}

// build sees to the space, its plug and its programs.
func (n *node) build(ctx context.Context, want hostEntry) error {
	if err := n.ensureSpace(); err != nil {
		return err
	}
	if err := plug(n.space.net, n.name, n.index, want.Partitioned); err != nil {
		return err
	}
	if n.isOutside() {
		if err := configure(n.space.net, netip.PrefixFrom(address(n.index+1), underlay.Bits())); err != nil {
			return fmt.Errorf("configure the outside: %w", err)
		}
	}
	if n.programs != nil {
		return nil
	}
	if err := n.writeConfigs(); err != nil {
		return fmt.Errorf("write the configuration of %s: %w", n.name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held = &handover{}
	for _, r := range n.runs() {
		n.programs = append(n.programs, keep(ctx, newProgram(n.s.dir, r.role, n.s.log, func() (*process, error) {
			if r.role == n.name+"/silk-dns" {
				return n.startResolver(r)
			}
			return n.start(n.space, r.role, r.program, r.args...)
		})))
	}
	return nil
}

// run is a program that a node runs.
type run struct {
	role, program string // the program's path, or its name beside Silk's others
	args          []string
}

// runs returns the programs of the node, in the order in which they are started.
func (n *node) runs() []run {
	policed := n.s.policed()
	file := func(name string) string { return filepath.Join(n.dir(), name) }
	if n.isOutside() {
		return []run{{outsideName, "silk", []string{"lab", "respond", "--as", outsideName}}}
	}
	named := n.s.named()
	if !n.isHost() {
		all := []run{{roleController, "silk-controller", []string{"-config", file("controller.json")}}}
		if named {
			all = append(all, run{roleNATS, n.s.natsPath(), []string{"-c", file("nats.conf")}})
		}
		if policed {
			all = append(all, run{rolePolicyServer, "policy-server", []string{"-config-file", file("policy-server.json")}})
		}
		return all
	}
	all := []run{{n.name + "/silk-daemon", "silk-daemon", []string{"-config", n.daemonConfig()}}}
	if policed {
		all = append(all, run{n.name + "/vxlan-policy-agent", "vxlan-policy-agent", []string{"-config-file", file("policy-agent.json")}})
	}
	if named {
		all = append(all, run{n.name + "/silk-dns", "silk-dns", []string{"-config", file("dns.json")}}, run{n.name + "/silk-tls", "silk-tls", []string{"-config-file", file("tls.json")}})
	}
	return all
}

// ensureSpace opens the node's namespaces, or makes them.
func (n *node) ensureSpace() error {
	if n.space != nil {
		return nil
	}
	s, err := openSpace(n.name, n.isHost())
	if errors.Is(err, fs.ErrNotExist) {
		var setup func() error
		if n.isHost() {
			setup = func() error { return hostMounts(n.s.dir) }
		}
		if err := unplug(n.index); err != nil { // of an earlier space, whose end the kernel may still be busy with
			return err
		}
		s, err = makeSpace(n.name, setup)
	}
	if err != nil {
		return fmt.Errorf("namespaces of %s: %w", n.name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.space = s
	return nil
}

// start starts a program in a space of the node.
func (n *node) start(sp *space, role, name string, args ...string) (*process, error) {
	return n.startWith(sp, role, nil, name, args...)
}

// startWith is start of a program that gets files besides, as descriptors from 3 on.
func (n *node) startWith(sp *space, role string, files []*os.File, name string, args ...string) (p *process, err error) {
	programs := n.s.programs()
	if !filepath.IsAbs(name) {
		name = filepath.Join(programs, name)
	}
	err = sp.do(func() error {
		p, err = start(n.s.logFile(role), environ(n.s.dir, role, programs), files, name, args...)
		return err
	})
	return p, err
}

func (s *supervisor) programs() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.j.Programs
}

// use calls fn with the node's space, which stays open meanwhile. fault.Unavailable while there is none.
func (n *node) use(fn func(*space) error) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.space == nil {
		return fault.Unavailablef("%s is not built yet", n.name)
	}
	return fn(n.space)
}

// crash is a power cut: everything on the host ends at once, and only its state directory is left.
func (n *node) crash() error {
	n.pass.Lock()
	defer n.pass.Unlock()
	defer n.loop.Kick()
	return n.destroy()
}

// destroy ends all processes of the node and its namespaces.
func (n *node) destroy() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	tasks := n.programs
	for _, c := range n.containers {
		if c.responder != nil {
			tasks = append(tasks, c.responder)
		}
	}
	for _, t := range tasks {
		t.stop()
	}
	for _, t := range tasks {
		<-t.done
	}
	n.programs, n.containers = nil, map[string]*container{}
	n.held.close()
	if n.space == nil {
		return nil
	}
	spaces, err := n.spaces()
	if err != nil {
		return err
	}
	if err := sweepSpaces(spaces); err != nil {
		return err
	}
	err = errors.Join(unplug(n.index), dropNames(n.name))
	n.space.close()
	n.space = nil
	return err
}

// spaces returns the namespaces in which processes of the node are: its own, and those that are named on the host, which are containers'. A command in
// a container has mounts of its own and is found by the container's network.
func (n *node) spaces() (map[kernel.NSID]bool, error) {
	id, err := n.space.net.ID()
	if err != nil {
		return nil, err
	}
	ids := map[kernel.NSID]bool{id: true}
	if n.space.mnt == nil {
		return ids, nil
	}
	if id, ok := fileID(n.space.mnt.Name(), n.space.mnt); ok {
		ids[id] = true
	}
	return ids, n.space.do(func() error {
		names, err := os.ReadDir(netNames)
		for _, e := range names {
			if id, ok := fileID(netnsPath(e.Name()), nil); ok { // a name without a namespace is a file that no process is in
				ids[id] = true
			}
		}
		return err
	})
}

// leave gives the host's lease back, as an operator would, and takes the host down.
func (n *node) leave(ctx context.Context) error {
	if n.s.named() {
		n.awaitForgotten(ctx)
	}
	n.mu.Lock()
	for _, t := range n.programs { // they would repair what silk-teardown removes
		t.end()
	}
	n.programs = nil
	n.held.close()
	n.mu.Unlock()
	role := n.name + "/silk-teardown"
	p, err := n.start(n.space, role, "silk-teardown", "-config", n.daemonConfig())
	if err != nil {
		return err
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := p.await(ctx); err != nil {
		p.kill(9)
		return fmt.Errorf("%s: %w", role, err)
	}
	if p.exit.ExitStatus() != 0 {
		return fmt.Errorf("%s ended with %d: its log is %s", role, p.exit.ExitStatus(), n.s.logFile(role))
	}
	if err := n.destroy(); err != nil {
		return err
	}
	if err := os.RemoveAll(n.dir()); err != nil {
		return err
	}
	err = n.s.update(func(j *journal) error {
		j.Hosts = without(j.Hosts, func(h hostEntry) bool { return h.Name == n.name })
		return nil
	})
	if err != nil {
		return err
	}
	n.s.mu.Lock()
	delete(n.s.nodes, n.name)
	n.s.mu.Unlock()
	close(n.gone)
	return nil
}

// dir holds the host's configuration, and its state that outlives a reboot.
func (n *node) dir() string          { return filepath.Join(n.s.dir, "nodes", n.name) }
func (n *node) daemonConfig() string { return filepath.Join(n.dir(), "daemon.json") }

// container returns the state of a container that a pass has seen, nil if none has.
func (n *node) container(name string) *container {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.containers[name]
}

// kill ends one of the node's programs.
func (n *node) kill(role string) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, t := range n.programs {
		if t.role == role {
			return t.signal(9)
		}
	}
	return fault.Unavailablef("%s does not run at the moment", role)
}

// replug applies what the journal says about the host's partition.
func (n *node) replug() error {
	want, _ := n.s.wanted(n.name)
	return n.use(func(sp *space) error { return plug(sp.net, n.name, n.index, want.Partitioned) })
}
