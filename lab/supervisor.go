package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

// supervisor makes what the journal wants and keeps it so. It runs inside the lab's namespaces.
type supervisor struct {
	dir string
	log *slog.Logger
	ca  *pki.CA

	keeper  *program
	control *node
	outside *node           // nil: there is none
	grow    func(hostEntry) // makes a host's node; mu is held

	secrets sync.Mutex // held while a file of a secret is read or made

	mu    sync.Mutex // guards journal and nodes; never held while anything is waited for
	j     *journal
	nodes map[string]*node // hosts by name
}

// Supervise runs the supervisor of the lab in dir until ctx ends. What it has started goes on without it; the next
// supervisor takes it over. It must run in the lab's namespaces (Launch sees to that), and only once: another one is
// fault.Conflict.
func Supervise(ctx context.Context, dir string, log *slog.Logger) error {
	os.Unsetenv(roleVar) // what we start is no supervisor
	lock, err := lockFile(filepath.Join(dir, "supervisor.lock"), syscall.LOCK_NB)
	if err != nil {
		return err
	}
	defer lock.Close()
	j, err := readJournal(dir)
	if err != nil {
		return err
	}
	s := &supervisor{dir: dir, log: log, j: j, nodes: map[string]*node{}}
	if err := makeUnderlay(j.BridgeNF); err != nil {
		return err
	}
	if s.ca, err = pki.OpenCA(filepath.Join(dir, "pki")); err != nil {
		return fmt.Errorf("open the lab's certificate authority: %w", err)
	}
	if s.named() {
		if err := s.makeContainerCA(); err != nil {
			return err
		}
	}
	ln, err := listen(dir)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.keeper = newProgram(dir, roleKeeper, log, func() (*process, error) { return startKeeper(dir, j.Programs) })
	wg.Go(func() { s.keeper.run(ctx) })
	s.control = newNode(s, controlName, 0)
	wg.Go(func() { s.control.run(ctx) })
	if j.Outside {
		s.outside = newNode(s, outsideName, outsideIndex)
		wg.Go(func() { s.outside.run(ctx) })
	}
	s.grow = func(h hostEntry) {
		n := newNode(s, h.Name, h.Index)
		s.nodes[h.Name] = n
		wg.Go(func() { n.run(ctx) })
	}
	s.mu.Lock()
	for _, h := range j.Hosts {
		s.grow(h)
	}
	s.mu.Unlock()
	log.Info("supervising", "hosts", len(j.Hosts), "containers", len(j.Containers))
	return s.serve(ctx, &wg, ln)
}

// lockFile opens and locks a file until it is closed. With LOCK_NB a lock that is held is fault.Conflict.
func lockFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|flags)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fault.Conflictf("%s is held by another process", path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// update changes the journal and writes it. A change that cannot be written is taken back.
func (s *supervisor) update(change func(*journal) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := *s.j
	next.Hosts, next.Containers = slices.Clone(s.j.Hosts), slices.Clone(s.j.Containers)
	if err := change(&next); err != nil {
		return err
	}
	if err := next.save(s.dir); err != nil {
		return fmt.Errorf("write the lab's journal: %w", err)
	}
	s.j = &next
	return nil
}

// wanted returns what is wanted of the host, and of its containers.
func (s *supervisor) wanted(name string) (h hostEntry, containers []containerEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.j.host(name); e != nil {
		h = *e
	}
	for _, c := range s.j.Containers {
		if c.Host == name {
			containers = append(containers, c)
		}
	}
	return h, containers
}

// node returns the node of a host.
func (s *supervisor) node(host string) (*node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.nodes[host]; n != nil {
		return n, nil
	}
	return nil, fault.NotFoundf("no host %q in this lab", host)
}

// hostOf returns the node that has the container.
func (s *supervisor) hostOf(container string) (*node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.j.container(container); c != nil && s.nodes[c.Host] != nil {
		return s.nodes[c.Host], nil
	}
	return nil, fault.NotFoundf("no container %q in this lab", container)
}

// logFile returns where a program's output goes.
func (s *supervisor) logFile(role string) string { return logFile(s.dir, role) }

func logFile(dir, role string) string {
	b := []byte(role)
	for i, c := range b {
		if c == '/' {
			b[i] = '-'
		}
	}
	return filepath.Join(dir, "log", string(b)+".log")
}
