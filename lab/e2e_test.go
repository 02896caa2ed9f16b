package lab_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
)

func TestKilledProgramsComeBack(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{})
	s := whole(t, l)
	e := dialEcho(t, s, "c1", "c5")
	targets := []string{"controller", "supervisor", "keeper", "host1/silk-daemon", "host2/silk-daemon", "host3/silk-daemon", "c1"}
	for _, name := range targets {
		role := name
		if name == "c1" {
			role = "c1/responder"
		}
		old := program(t, s, role).PID
		do(t, l.Kill(t.Context(), name))
		e.check(t, "after "+name+" was killed")
		eventually(t, l, name+" comes back", func(s lab.Status) bool {
			p := program(t, s, role)
			return p.PID != 0 && p.PID != old
		})
		s = whole(t, l)
	}
	for _, h := range s.Hosts { // all at once
		do(t, l.Kill(t.Context(), h.Name+"/silk-daemon"))
	}
	do(t, l.Kill(t.Context(), "controller"))
	e.check(t, "after controller and daemons were killed")
	do(t, l.Kill(t.Context(), "keeper"))
	do(t, l.Kill(t.Context(), "supervisor"))
	after := whole(t, l)
	for i, h := range after.Hosts {
		if h.Lease != s.Hosts[i].Lease {
			t.Errorf("%s has lease %v, had %v", h.Name, h.Lease, s.Hosts[i].Lease)
		}
	}
}

func TestTrafficFlowsWhileNothingOfTheLabItselfLives(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	s := whole(t, l)
	e := dialEcho(t, s, "c1", "c2")
	e.check(t, "before")
	restore := hide(t, l, "silk") // neither of the two can start the other
	do(t, l.Kill(t.Context(), "keeper"))
	do(t, l.Kill(t.Context(), "supervisor"))
	e.check(t, "without keeper and supervisor")
	restore()
	adopted, err := lab.Up(t.Context(), lab.Options{Dir: l.Dir(), Programs: filepath.Join(filepath.Dir(l.Dir()), "bin")})
	do(t, err)
	after := whole(t, adopted)
	e.check(t, "after the lab was adopted")
	for _, name := range []string{"controller", "host1/silk-daemon", "host2/silk-daemon", "c1/responder", "c2/responder"} {
		if was, is := program(t, s, name), program(t, after, name); was.PID != is.PID || is.Starts != 0 {
			t.Errorf("%s was process %d and is %d, started %d times, want it adopted", name, was.PID, is.PID, is.Starts)
		}
	}
	if was, is := container(t, s, "c1").Address, container(t, after, "c1").Address; was != is {
		t.Errorf("c1 had %v and has %v", was, is)
	}
}

func TestPartitionAndHeal(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{})
	s := whole(t, l)
	e := dialEcho(t, s, "c1", "c5")
	e.check(t, "before")
	do(t, l.Partition(t.Context(), "host3"))
	eventually(t, l, "host3 alone is cut off", func(s lab.Status) bool {
		for _, p := range s.Paths {
			cut := (container(t, s, p.From).Host == "host3") != (container(t, s, p.To).Host == "host3")
			if p.OK == cut {
				return false
			}
		}
		return len(s.Paths) == 30
	})
	do(t, l.Add(t.Context(), "lonely", "host3")) // a container needs nobody but its host
	do(t, l.Kill(t.Context(), "supervisor"))     // the next one keeps the partition
	eventually(t, l, "host3 is still cut off", func(s lab.Status) bool { return !s.Path("c1", "c5").OK && s.Path("c5", "lonely").OK })
	do(t, l.Heal(t.Context(), "host3"))
	whole(t, l)
	e.check(t, "after the partition")
}

func TestContainersComeAndGoWithoutTheController(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	s := whole(t, l)
	await(t, "host2 has saved what it needs after a power cut", func() error { // it writes every 2 s at most
		b, err := os.ReadFile(filepath.Join(l.Dir(), "nodes/host2/state/peers.json"))
		if err == nil && !strings.Contains(string(b), host(t, s, "host1").Lease.String()) {
			err = fmt.Errorf("its peers are %s", b)
		}
		return err
	})
	restore := hide(t, l, "silk-controller")
	do(t, l.Kill(t.Context(), "controller"))
	do(t, l.Add(t.Context(), "new1", "host1"))
	do(t, l.Add(t.Context(), "new2", "host2"))
	do(t, l.Remove(t.Context(), "c1"))
	do(t, l.Kill(t.Context(), "host1/silk-daemon")) // a daemon restarts on what it knows
	eventually(t, l, "paths without the controller", func(s lab.Status) bool {
		return len(s.Paths) == 6 && !slices.ContainsFunc(s.Paths, func(p lab.Path) bool { return !p.OK }) && host(t, s, "host1").State == "degraded"
	})
	do(t, l.Kill(t.Context(), "host2")) // and a whole host, after a power cut
	lease := host(t, s, "host2").Lease
	eventually(t, l, "paths after a reboot without the controller", func(s lab.Status) bool {
		return host(t, s, "host2").Lease == lease && host(t, s, "host2").State == "degraded" && len(s.Paths) == 6 && !slices.ContainsFunc(s.Paths, func(p lab.Path) bool { return !p.OK })
	})
	restore()
	whole(t, l)
}

func TestHostsKeepTheirSubnetsWhenTheDatabaseIsLost(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{})
	s := whole(t, l)
	e := dialEcho(t, s, "c1", "c3")
	restore := hide(t, l, "silk-controller")
	do(t, l.Kill(t.Context(), "controller"))
	files, err := filepath.Glob(filepath.Join(l.Dir(), "nodes/control/controller.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no database in %s: %v", l.Dir(), err)
	}
	for _, f := range files {
		do(t, os.Remove(f))
	}
	restore()
	await(t, "the new database has every lease", func() error {
		out, err := l.Output(t.Context(), "host1", "silk", "leases", "--config", filepath.Join(l.Dir(), "nodes/host1/daemon.json"))
		if err != nil {
			return err
		}
		for _, h := range s.Hosts {
			if !slices.ContainsFunc(strings.Split(string(out), "\n"), func(line string) bool {
				return slices.Equal(strings.Fields(line)[:min(2, len(strings.Fields(line)))], []string{h.Lease.String(), h.Underlay.String()})
			}) {
				return fmt.Errorf("no lease of %s in\n%s", h.Name, out)
			}
		}
		return nil
	})
	after := whole(t, l)
	for i, h := range after.Hosts {
		if h.Lease != s.Hosts[i].Lease {
			t.Errorf("%s has lease %v, had %v", h.Name, h.Lease, s.Hosts[i].Lease)
		}
	}
	e.check(t, "afterwards")
}

func TestRebootedHostComesBackWithItsLease(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{})
	s := whole(t, l)
	for range 3 {
		do(t, l.Kill(t.Context(), "host2"))
		after := whole(t, l)
		if was, is := host(t, s, "host2").Lease, host(t, after, "host2").Lease; was != is {
			t.Errorf("host2 had lease %v and has %v", was, is)
		}
		if was, is := container(t, s, "c3").Responder.PID, container(t, after, "c3").Responder.PID; was == is {
			t.Errorf("c3 lived through the power cut as process %d", is)
		}
		s = after
	}
}

func TestBridgeFirewallLeftOn(t *testing.T) {
	t.Parallel()
	_, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables")
	testkit.Require(t, "br_netfilter", err)
	for _, on := range []bool{true, false} {
		l := up(t, lab.Options{Hosts: 2, Containers: 1, BridgeNF: on})
		s := whole(t, l)
		var got []byte
		do(t, nsOf(t, program(t, s, "supervisor").PID).Do(func() (err error) {
			got, err = os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-iptables")
			return err
		}))
		if want := map[bool]string{true: "1\n", false: "0\n"}[on]; string(got) != want {
			t.Errorf("bridge-nf-call-iptables of the underlay is %q, want %q", got, want)
		}
	}
}

func TestContainersComeAndGo(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	whole(t, l)
	before := hostState(t, l, "host1")
	for i := range 12 {
		name := fmt.Sprintf("x%d", i)
		do(t, l.Add(t.Context(), name, "host1"))
		if i%3 == 0 {
			if s := whole(t, l); !s.Path(name, "c2").OK {
				t.Errorf("%s does not reach c2", name)
			}
		}
		do(t, l.Remove(t.Context(), name))
	}
	if after := hostState(t, l, "host1"); after != before {
		t.Errorf("after 12 containers came and went host1 has\n%s\nand had\n%s", after, before)
	}
}

// hostState lists what containers leave on a host if they leave something.
func hostState(t *testing.T, l *lab.Lab, host string) string {
	t.Helper()
	var all strings.Builder
	for _, dir := range []string{"/run/netns", "/run/silk/endpoints", "/run/cni/results", "/proc/sys/net/ipv4/conf"} {
		out, err := l.Output(t.Context(), host, "ls", dir)
		do(t, err)
		fmt.Fprintf(&all, "%s:\n%s", dir, out)
	}
	return all.String()
}

func TestHostsComeAndGo(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	whole(t, l)
	name, err := l.AddHost(t.Context(), "")
	do(t, err)
	if name != "host3" {
		t.Errorf("the new host is %s, want host3", name)
	}
	do(t, l.Add(t.Context(), "c3", name))
	whole(t, l)
	do(t, l.Remove(t.Context(), name))
	s := whole(t, l)
	if len(s.Hosts) != 2 || len(s.Containers) != 2 {
		t.Errorf("%d hosts and %d containers are left, want 2 and 2", len(s.Hosts), len(s.Containers))
	}
	if _, err := l.AddHost(t.Context(), "host1"); !errors.Is(err, fault.Conflict) {
		t.Errorf("a second host1: %v, want a conflict", err)
	}
	if err := l.Add(t.Context(), "c9", "host3"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a container on a host that left: %v, want not found", err)
	}
}

func TestAddsSurviveKills(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	whole(t, l)
	before := hostState(t, l, "host1")
	for i := range 8 {
		name := fmt.Sprintf("k%d", i)
		added := make(chan error, 1)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		go func() { added <- l.Add(ctx, name, "host1") }()
		<-time.After(rand.N(25 * time.Millisecond)) // an instant somewhere in the ADD, which is what the test is about
		do(t, l.Kill(t.Context(), "supervisor"))
		<-added // it may have been cut off, or not have begun
		cancel()
		s := whole(t, l)
		if !slices.ContainsFunc(s.Containers, func(c lab.Container) bool { return c.Name == name }) {
			continue
		}
		do(t, l.Remove(t.Context(), name))
	}
	if after := hostState(t, l, "host1"); after != before {
		t.Errorf("after 8 interrupted ADDs host1 has\n%s\nand had\n%s", after, before)
	}
}

func TestAddSurvivesTheDeathOfThePlugin(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	whole(t, l)
	before := hostState(t, l, "host1")
	for ms := 1; ms <= 10; ms++ {
		restore := hide(t, l, "silk-cni")
		path := filepath.Join(filepath.Dir(l.Dir()), "bin/silk-cni")
		script := fmt.Sprintf("#!/bin/sh\nexec timeout -s KILL 0.%03d %s\n", ms, filepath.Join(programs, "silk-cni"))
		do(t, os.WriteFile(path, []byte(script), 0o755))
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		name := fmt.Sprintf("p%d", ms)
		l.Add(ctx, name, "host1") // that it does not succeed, or does, is not the point
		cancel()
		do(t, os.Remove(path))
		restore()
		if s := whole(t, l); !s.Path("c2", name).OK {
			t.Errorf("c2 does not reach %s", name)
		}
		do(t, l.Remove(t.Context(), name))
	}
	if after := hostState(t, l, "host1"); after != before {
		t.Errorf("after ten killed plugins host1 has\n%s\nand had\n%s", after, before)
	}
}

func TestContainersReachTheUnderlayAsTheirHost(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 1, Containers: 1})
	s := whole(t, l)
	control := nsOf(t, program(t, s, "controller").PID)
	var ln net.Listener
	do(t, control.Do(func() (err error) { ln, err = net.Listen("tcp4", "10.0.0.10:0"); return err }))
	defer ln.Close()
	var c net.Conn
	do(t, nsOf(t, container(t, s, "c1").Responder.PID).Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", ln.Addr().String(), 5*time.Second)
		return err
	}))
	defer c.Close()
	in, err := ln.Accept()
	do(t, err)
	defer in.Close()
	if from := in.RemoteAddr().(*net.TCPAddr).IP.String(); from != host(t, s, "host1").Underlay.String() {
		t.Errorf("a container's connection to the underlay comes from %s, want its host's %v", from, host(t, s, "host1").Underlay)
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 1, Containers: 1})
	whole(t, l)
	if out, err := l.Output(t.Context(), "c1", "sh", "-c", "echo out; echo err >&2; cat /proc/net/dev | grep -c eth0"); err != nil || string(out) != "out\n1\n" {
		t.Errorf("output %q, %v", out, err)
	}
	if out, err := l.Output(t.Context(), "host1", "sh", "-c", "ls /sys/class/net | grep -c '^silk-vtep$'; ls /run; ls /etc/cni/net.d; cat /etc/resolv.conf"); err != nil ||
		!strings.HasPrefix(string(out), "1\n") || !strings.Contains(string(out), "10-silk.conflist") || strings.Contains(string(out), "nameserver") {
		t.Errorf("the host's own files: %q, %v", out, err)
	}
	var exit *lab.ExitError
	if _, err := l.Output(t.Context(), "host1", "sh", "-c", "echo why >&2; exit 7"); !errors.As(err, &exit) || exit.Code != 7 || !strings.Contains(exit.Stderr, "why") {
		t.Errorf("exit 7: %v", err)
	}
	if _, err := l.Output(t.Context(), "host1", "sh", "-c", "kill -9 $$"); !errors.As(err, &exit) || exit.Code != 137 {
		t.Errorf("killed: %v, want status 137", err)
	}
	if _, err := l.Output(t.Context(), "nobody", "true"); !errors.Is(err, fault.NotFound) {
		t.Errorf("unknown place: %v, want not found", err)
	}
	if _, err := l.Output(t.Context(), "host1", "no-such-program"); !errors.Is(err, fault.NotFound) {
		t.Errorf("unknown program: %v, want not found", err)
	}
	r, w, err := os.Pipe()
	do(t, err)
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := l.Exec(ctx, "c1", []string{"sh", "-c", "echo started; exec sleep 1000"}, r, w, w)
		w.Close()
		done <- err
	}()
	b := make([]byte, 16)
	if n, err := r.Read(b); err != nil || string(b[:n]) != "started\n" {
		t.Fatalf("read %q, %v", b[:n], err)
	}
	cancel() // ends the command: its output is at its end
	if err := <-done; err == nil {
		t.Error("a cancelled command succeeds")
	}
	if n, err := r.Read(b); n != 0 || err == nil {
		t.Errorf("after the end: %q, %v", b[:n], err)
	}
}
