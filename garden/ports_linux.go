package garden

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// The file of ports says which container has which ports of the host. It is Garden's earlier networker's, in form and in lock (the file
// itself): {"acquired_ports":{"HANDLE":[61000,61001]}}. We replace it instead of writing into it, so that a crash never leaves
// half of it; whoever waits for the lock of a file that was replaced must look again.

// pool is that file and the range that ports are given out from.
type pool struct {
	path         string
	first, count int
	records      func() (map[string][]int, error) // which ports lead to which container by the endpoints' records
	warn         func(format string, args ...any)
}

// portState is what is in the file.
type portState struct {
	Acquired map[string][]int `json:"acquired_ports"`
}

// portRequest asks for a port of the host; 0 for any of the pool.
type portRequest int

// acquire gives the container the ports that it asks for, in their order, all or none, and returns those that it did not have yet apart. Those that it
// has in the file, and that do not lead to it, it gets first: an operation that was killed has left them. again is an up's: those that lead
// to it are asked for again.
func (p *pool) acquire(ctx context.Context, handle string, want []portRequest, again bool) (ports, added []int, err error) {
	if len(want) == 0 {
		return nil, nil, nil
	}
	host, err := hostPorts()
	if err != nil {
		return nil, nil, err
	}
	err = p.update(ctx, func(s *portState) error {
		recorded, err := p.records()
		if err != nil {
			return err
		}
		c := chooser{pool: p, host: host, owner: map[int]string{}}
		for h, list := range recorded { // where the file says otherwise, it does for all to see
			c.own(h, list)
		}
		for h, list := range s.Acquired {
			c.own(h, list)
		}
		mine := s.Acquired[handle]
		c.leads = recorded[handle]
		if again {
			c.leads = nil
		}
		c.left = slices.DeleteFunc(slices.Clone(mine), func(p int) bool { return slices.Contains(c.leads, p) })
		if ports, err = c.choose(handle, want); err != nil {
			return err
		}
		for _, port := range ports {
			if !slices.Contains(mine, port) {
				added = append(added, port)
			}
		}
		s.Acquired[handle] = append(slices.Clone(mine), added...)
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return ports, added, nil
}

// release takes ports from a container: those given, or all when there are none given.
func (p *pool) release(ctx context.Context, handle string, ports ...int) error {
	return p.update(ctx, func(s *portState) error {
		keep := slices.DeleteFunc(slices.Clone(s.Acquired[handle]), func(n int) bool { return len(ports) == 0 || slices.Contains(ports, n) })
		if len(keep) == 0 {
			delete(s.Acquired, handle)
			return nil
		}
		s.Acquired[handle] = keep
		return nil
	})
}

// chooser decides who gets which port.
type chooser struct {
	pool  *pool
	host  inUse
	owner map[int]string // containers' handles
	leads []int          // to the container, and stay
	left  []int          // to be given to the same container again
}

func (c *chooser) own(handle string, ports []int) {
	for _, p := range ports {
		c.owner[p] = handle
	}
}

// errExhausted is the error when the pool has no port left.
var errExhausted = errors.New("acquire port: port pool exhausted")

func (c *chooser) choose(handle string, want []portRequest) ([]int, error) {
	ports := make([]int, len(want))
	for i, w := range want {
		if w == 0 {
			continue
		}
		p := int(w)
		if p < 0 || p > maxPort {
			return nil, fmt.Errorf("acquire port: port %d: expected 1 to %d, or 0 for any", p, maxPort)
		}
		switch h, taken := c.owner[p]; {
		case slices.Contains(ports[:i], p):
			return nil, fmt.Errorf("acquire port: port %d is asked for twice", p)
		case taken && h != handle:
			return nil, fmt.Errorf("acquire port: port %d is container %s's", p, h)
		case slices.Contains(c.leads, p):
			return nil, fmt.Errorf("acquire port: port %d leads to the container already", p)
		case !taken && c.host.listens[p]:
			return nil, fmt.Errorf("acquire port: port %d: a program of the host listens on it", p)
		}
		ports[i] = p
		c.owner[p] = handle
		c.left = slices.DeleteFunc(c.left, func(n int) bool { return n == p })
	}
	for i, w := range want {
		if w != 0 {
			continue
		}
		p, err := c.any()
		if err != nil {
			return nil, err
		}
		ports[i] = p
		c.owner[p] = handle
	}
	return ports, nil
}

// any returns a port of the pool that is nobody's: one that the container has already, or the lowest that is free. Those that the kernel gives to
// programs of the host by itself come last: one that gets such a port later would not be reached any more.
func (c *chooser) any() (int, error) {
	for i, p := range c.left {
		if c.pool.has(p) {
			c.left = slices.Delete(c.left, i, i+1)
			return p, nil
		}
	}
	for _, local := range []bool{false, true} {
		for p := c.pool.first; c.pool.has(p); p++ {
			if _, taken := c.owner[p]; !taken && !c.host.listens[p] && c.host.local(p) == local {
				return p, nil
			}
		}
	}
	return 0, errExhausted
}

func (p *pool) has(port int) bool { return port >= p.first && port < p.first+p.count }

// update lets change work on what is in the file and replaces it if that differs. A file that is empty, or cannot be understood, is
// made again from the records of endpoints; the broken one is kept beside it.
func (p *pool) update(ctx context.Context, change func(*portState) error) error {
	path := p.path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	f, err := kernel.LockPath(ctx, path)
	if err != nil {
		return fmt.Errorf("open state file: %w", err)
	}
	defer f.Close()
	os.Remove(kernel.TempOf(path)) // a writer was killed
	was, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return fmt.Errorf("read state file: %w", err)
	}
	s, err := parseState(was)
	if err != nil {
		if s, err = p.rebuild(path, was, err); err != nil {
			return err
		}
	}
	if err := change(&s); err != nil {
		return err
	}
	now, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write state file: %w", err)
	}
	if now = append(now, '\n'); bytes.Equal(now, was) {
		return nil
	}
	if err := kernel.ReplaceLocked(f, path, now); err != nil {
		return fmt.Errorf("write state file: %w", err)
	}
	return nil
}

// maxState bounds the file in bytes.
const maxState = 16 << 20

// errEmpty is an empty file's: a writer of the earlier release was killed, or the file is new.
var errEmpty = errors.New("it is empty")

// parseState reads what is in the file.
func parseState(b []byte) (portState, error) {
	s := portState{Acquired: map[string][]int{}}
	switch {
	case len(bytes.TrimSpace(b)) == 0:
		return s, errEmpty
	case len(b) > maxState:
		return s, fmt.Errorf("it is longer than %d bytes", maxState)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return portState{Acquired: map[string][]int{}}, err
	}
	if s.Acquired == nil {
		s.Acquired = map[string][]int{}
	}
	return s, nil
}

// rebuild returns what the records of endpoints say about ports.
func (p *pool) rebuild(path string, was []byte, cause error) (portState, error) {
	s := portState{Acquired: map[string][]int{}}
	recorded, err := p.records()
	if err != nil {
		return s, fmt.Errorf("make state file again (%w): %w", cause, err)
	}
	for h, list := range recorded {
		s.Acquired[h] = list
	}
	if len(was) == 0 && len(recorded) == 0 {
		return s, nil
	}
	kept := ""
	if len(was) > 0 {
		if kept, err = kernel.KeepBroken(path); err != nil {
			return s, fmt.Errorf("keep broken state file (%w): %w", cause, err)
		}
		kept = ", the broken one is kept as " + kept
	}
	p.warn("state file %s: %v: made again from the records of %d containers%s", path, cause, len(recorded), kept)
	return s, nil
}
