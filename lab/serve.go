package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

const commandTime = 30 * time.Second // for a container or host to come or go

// serve answers commands until ctx ends.
func (s *supervisor) serve(ctx context.Context, wg *sync.WaitGroup, ln *net.UnixListener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a command: %w", err)
		}
		wg.Go(func() {
			w := &wire{c: c}
			defer w.close()
			cctx, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(cctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
			if err := s.command(cctx, w); err != nil {
				w.send(answer{Error: err.Error(), Kind: fault.Of(err)})
			}
		})
	}
}

// command reads one request and answers it, unless it returns an error.
func (s *supervisor) command(ctx context.Context, w *wire) error {
	w.c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := w.line(lineLimit)
	if err != nil {
		return err
	}
	w.c.SetReadDeadline(time.Time{})
	r, err := parseRequest(b)
	if err != nil {
		return err
	}
	a := answer{}
	switch r.Op {
	case opPing:
	case opStatus:
		st := s.status(ctx)
		a.Status = &st
	case opExec:
		a.Exit, err = s.exec(ctx, w, r)
	case opAdd:
		a.Name, a.Address, err = s.add(ctx, r)
	case opRemove:
		err = s.remove(ctx, r.Name)
	case opKill:
		err = s.killWhenItRuns(ctx, r.Name)
	case opPartition, opHeal:
		err = s.partition(ctx, r.Name, r.Op == opPartition)
	default:
		err = fault.Invalidf("unknown operation %q: the running lab is of another version of silk", r.Op)
	}
	if err != nil {
		return err
	}
	return w.send(a)
}

// add puts a container on a host, or, with the host "-", makes a new host. It returns when the container is attached and answers
// its host, or the new host has a lease.
func (s *supervisor) add(ctx context.Context, r message) (name string, address netip.Addr, err error) {
	var entry hostEntry
	err = s.update(func(j *journal) error {
		if r.Host == newHost {
			index, err := j.freeIndex()
			if err != nil {
				return err
			}
			entry = hostEntry{Name: r.Name, Index: index}
			if entry.Name == "" {
				entry.Name = fmt.Sprintf("host%d", index)
			}
			j.Hosts = append(j.Hosts, entry)
			return errors.Join(checkName(entry.Name), (&journal{Hosts: j.Hosts[:len(j.Hosts)-1], Containers: j.Containers}).free(entry.Name))
		}
		if err := errors.Join(checkName(r.Name), j.free(r.Name)); err != nil {
			return err
		}
		h := pickHost(j, r.Host)
		if h == nil || h.Leaving {
			return fault.NotFoundf("no host %q in this lab", r.Host)
		}
		entry = *h
		group := r.Group
		if group == "" {
			group = groups[0]
		}
		if err := j.checkGroup(group); err != nil {
			return err
		}
		if err := j.freePorts(h.Name, r.Ports); err != nil {
			return err
		}
		j.Containers = append(j.Containers, containerEntry{Name: r.Name, Host: h.Name, Group: group, Index: j.freeIndexOf(group), Ports: r.Ports})
		return nil
	})
	if err != nil {
		return "", address, err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	if r.Host == newHost {
		s.mu.Lock()
		s.grow(entry)
		n := s.nodes[entry.Name]
		s.mu.Unlock()
		return entry.Name, address, poll(ctx, func() (bool, error) { i, err := n.info(ctx); return err == nil && i.lease().IsValid(), err })
	}
	n, err := s.node(entry.Name)
	if err != nil {
		return "", address, err
	}
	n.loop.Kick()
	err = poll(ctx, func() (bool, error) {
		c := n.container(r.Name)
		if c == nil {
			return false, nil
		}
		var err error
		if address, err = c.state(); !address.IsValid() {
			return false, err
		}
		err = n.use(func(sp *space) error {
			_, err := newTurns().probe(ctx, sp.net, netip.AddrPortFrom(address, HTTPPort), r.Name)
			return err
		})
		return err == nil, err
	})
	return r.Name, address, err
}

// newHost, in place of a host's name, asks add for a host.
const newHost = "-"

// pickHost returns the host of that name, or for no name the one with the fewest containers.
func pickHost(j *journal, name string) *hostEntry {
	if name != "" {
		return j.host(name)
	}
	count := map[string]int{}
	for _, c := range j.Containers {
		count[c.Host]++
	}
	var best *hostEntry
	for i := range j.Hosts {
		if h := &j.Hosts[i]; !h.Leaving && (best == nil || count[h.Name] < count[best.Name]) {
			best = h
		}
	}
	return best
}

// remove takes a container or a host away and returns when it is gone.
func (s *supervisor) remove(ctx context.Context, name string) error {
	host := name
	err := s.update(func(j *journal) error {
		if c := j.container(name); c != nil {
			c.Leaving, host = true, c.Host
			return nil
		}
		h := j.host(name)
		if h == nil {
			return fault.NotFoundf("no host or container %q in this lab", name)
		}
		h.Leaving = true
		for i := range j.Containers {
			j.Containers[i].Leaving = j.Containers[i].Leaving || j.Containers[i].Host == name
		}
		return nil
	})
	if err != nil {
		return err
	}
	n, err := s.node(host)
	if err != nil {
		return err
	}
	n.loop.Kick()
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		s.mu.Lock()
		gone := s.j.host(name) == nil && s.j.container(name) == nil
		s.mu.Unlock()
		return gone, n.loop.Stats().LastError
	})
}

// poll waits until done, and when ctx ends first says why it is not.
func poll(ctx context.Context, done func() (bool, error)) error {
	for {
		ok, err := done()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return fault.Unavailablef("not done yet, and still being tried: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// killWhenItRuns gives a program that is just being started, or adopted, a while.
func (s *supervisor) killWhenItRuns(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	var final error
	err := poll(ctx, func() (bool, error) {
		err := s.kill(name)
		if errors.Is(err, fault.Unavailable) {
			return false, err
		}
		final = err
		return true, nil
	})
	return errors.Join(err, final)
}

// kill ends a program at once, or a whole host. All of them come back. fault.Unavailable when it does not run just now.
func (s *supervisor) kill(name string) error {
	switch name {
	case roleSupervisor:
		return unix.Kill(os.Getpid(), unix.SIGKILL)
	case roleKeeper:
		return s.keeper.signal(unix.SIGKILL)
	case outsideName:
		if s.outside == nil {
			return fault.NotFoundf("the lab has no outside: silk lab up --outside makes one with a new lab")
		}
		return s.outside.kill(name)
	case roleController, rolePolicyServer, roleNATS:
		if name == rolePolicyServer && !s.policed() || name == roleNATS && !s.named() {
			break
		}
		return s.control.kill(name)
	}
	host, program, ok := strings.Cut(name, "/")
	if n, err := s.node(host); err == nil {
		switch {
		case !ok:
			return n.crash()
		case program == "silk-daemon", program == "vxlan-policy-agent" && s.policed(), slices.Contains(namePrograms, program) && s.named():
			return n.kill(name)
		}
	}
	if n, err := s.hostOf(host); err == nil && (!ok || program == "responder") {
		if c := n.container(host); c != nil {
			return c.kill(n)
		}
		return fault.Unavailablef("%s is not attached yet", host)
	}
	return fault.NotFoundf("%q is nothing that can be killed: expected controller, policy-server, nats-server, outside, supervisor, keeper, HOST, HOST/silk-daemon, HOST/vxlan-policy-agent, HOST/silk-dns, HOST/silk-tls or CONTAINER", name)
}

// partition cuts a host off the underlay, or joins it again.
func (s *supervisor) partition(ctx context.Context, name string, cut bool) error {
	n, err := s.node(name)
	if err != nil {
		return err
	}
	err = s.update(func(j *journal) error {
		j.host(name).Partitioned = cut
		return nil
	})
	if err != nil {
		return err
	}
	return n.replug()
}

// exec runs a command in a host's or container's space, with the files that came with the request, and returns its
// exit status. The command is killed when the connection ends.
func (s *supervisor) exec(ctx context.Context, w *wire, r message) (int, error) {
	if len(w.files) != 3 {
		return 0, fault.Invalidf("exec: %d files came with the request, expected 3", len(w.files))
	}
	var p *process
	err := s.inSpace(r.Name, func(sp *space) error {
		return sp.do(func() error {
			if _, err := s.hostOf(r.Name); err == nil {
				if err := showResolver(r.Name); err != nil {
					return err
				}
			}
			env := environ(s.dir, roleExec, s.programs(), append(r.Env, s.policyEnv(r.Name)...)...)
			path, err := lookPath(r.Command[0], env)
			if err != nil {
				return fault.New(fault.NotFound, err)
			}
			p, err = spawn(env, w.files, &unix.SysProcAttr{Setsid: true}, path, r.Command[1:]...)
			return err
		})
	})
	if err != nil {
		return 0, err
	}
	defer p.close()
	if err := attend(ctx, w, p); err != nil {
		return 0, err
	}
	if p.exit.Signaled() {
		return 128 + int(p.exit.Signal()), nil
	}
	return p.exit.ExitStatus(), nil
}

// attend waits for the command, passes on the signals that come over the connection, and kills the command's group when
// the connection ends.
func attend(ctx context.Context, w *wire, p *process) error {
	var mu sync.Mutex
	over := false // then the group's number may be another's
	signal := func(sig unix.Signal) {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			unix.Kill(-p.pid, sig)
		}
	}
	listening := make(chan struct{})
	go func() {
		defer close(listening)
		for {
			b, err := w.line(lineLimit)
			if err != nil {
				signal(unix.SIGKILL)
				return
			}
			if m, err := parseRequest(b); err == nil && m.Signal > 0 {
				signal(unix.Signal(m.Signal))
			}
		}
	}()
	err := p.ended(ctx)
	mu.Lock()
	over = true
	p.reap()
	mu.Unlock()
	w.c.SetReadDeadline(time.Unix(1, 0))
	<-listening
	return err
}

// lookPath finds a program in the PATH of env, on the calling thread's file system.
func lookPath(name string, env []string) (string, error) {
	if strings.ContainsRune(name, '/') {
		return name, nil
	}
	for _, e := range env {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, d := range filepath.SplitList(list) {
			p := filepath.Join(d, name)
			if st, err := os.Stat(p); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
				return p, nil
			}
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

// inSpace calls fn with the space of a host, a container or the controller.
func (s *supervisor) inSpace(name string, fn func(*space) error) error {
	if name == roleController || name == rolePolicyServer || name == roleNATS || name == controlName {
		return s.control.use(fn)
	}
	if name == outsideName && s.outside != nil {
		return s.outside.use(fn)
	}
	if n, err := s.node(name); err == nil {
		return n.use(fn)
	}
	n, err := s.hostOf(name)
	if err != nil {
		return fault.NotFoundf("no host or container %q in this lab", name)
	}
	return n.use(func(sp *space) error { return n.inContainer(sp, name, fn) })
}
