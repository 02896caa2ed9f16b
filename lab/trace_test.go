package lab_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// machine is what a lab must not change: links, addresses, routes, rules and nft tables of this network namespace,
// and this mount namespace.
func machine(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	c, err := kernel.Dial(nil)
	do(t, err)
	defer c.Close()
	for _, d := range []struct {
		what   string
		typ    uint16
		header []byte
		strip  bool
	}{
		{"link", unix.RTM_GETLINK, kernel.IfInfo(0, 0, 0), true},
		{"address", unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg), true},
		{"route", unix.RTM_GETROUTE, make([]byte, unix.SizeofRtMsg), false},
		{"rule", unix.RTM_GETRULE, make([]byte, unix.SizeofRtMsg), false},
	} {
		var b kernel.Batch
		b.Add(d.typ, 0, d.header)
		var lines []string
		do(t, c.Dump(&b, func() { lines = nil }, func(m kernel.Message) error {
			body := m.Body
			if d.strip { // counters and lifetimes move by themselves
				body = body[:min(len(body), 8)]
			}
			lines = append(lines, d.what+" "+hex.EncodeToString(body))
			return nil
		}))
		slices.Sort(lines)
		fmt.Fprintln(&all, strings.Join(lines, "\n"))
	}
	nft, err := nftables.New()
	do(t, err)
	tables, err := nft.ListTables()
	do(t, err)
	for _, table := range tables {
		fmt.Fprintf(&all, "table %v %s\n", table.Family, table.Name)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	do(t, err)
	for line := range strings.Lines(string(mounts)) { // other tests may mount things of their own meanwhile
		if strings.Contains(line, "/TestDownLeavesNothing") || strings.Contains(line, "/run/netns/host") || strings.Contains(line, " /run ") {
			all.WriteString(line)
		}
	}
	return all.String()
}

// members returns the processes of a lab and the namespaces they are in, other than the test's own.
func members(t *testing.T, dir string) (pids []int, spaces map[string]bool) {
	t.Helper()
	spaces = map[string]bool{}
	for _, pid := range processes(t) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil || !slices.Contains(strings.Split(string(b), "\x00"), "SILK_LAB_MEMBER="+dir) {
			continue
		}
		pids = append(pids, pid)
		for _, kind := range []string{"net", "mnt", "user"} {
			own, _ := os.Readlink("/proc/self/ns/" + kind)
			if id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil && id != own {
				spaces[id] = true
			}
		}
	}
	return pids, spaces
}

// hold keeps the namespaces of processes until the test ends: else the kernel gives the number of one that is gone to the next
// that somebody makes.
func hold(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		for _, kind := range []string{"net", "mnt", "user"} {
			f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
			do(t, err)
			t.Cleanup(func() { f.Close() })
		}
	}
}

func processes(t *testing.T) (pids []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	do(t, err)
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// users returns the processes that are in any of the namespaces.
func users(t *testing.T, spaces map[string]bool) (found []string) {
	t.Helper()
	for _, pid := range processes(t) {
		for _, kind := range []string{"net", "mnt", "user"} {
			if id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil && spaces[id] {
				comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
				found = append(found, fmt.Sprintf("%d %s in %s", pid, strings.TrimSpace(string(comm)), id))
			}
		}
	}
	return found
}

func TestDownLeavesNothing(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name  string
		names bool
		kill  []string
	}{
		{"all alive", false, nil}, {"supervisor dead", false, []string{"keeper", "supervisor"}}, {"nearly all dead", false, []string{"host1/silk-daemon", "controller", "keeper", "supervisor"}},
		{"names, supervisor dead", true, []string{"keeper", "supervisor"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := machine(t)
			if c.names {
				_, err := exec.LookPath("nats-server")
				testkit.Require(t, "nats", err)
			}
			l := up(t, lab.Options{Hosts: 2, Containers: 1, Names: c.names})
			s := whole(t, l)
			if c.names {
				commandIn(t, l, "c1")
			}
			if !slices.Contains(c.kill, "host1/silk-daemon") { // else nothing in host1's network would tell whose it is
				strayInto(t, host(t, s, "host1").Daemon.PID)
			}
			pids, spaces := members(t, l.Dir())
			if len(pids) < 7 || len(spaces) < 6 {
				t.Fatalf("a lab of %d processes in %d namespaces", len(pids), len(spaces))
			}
			hold(t, pids)
			if len(c.kill) > 0 {
				hide(t, l, "silk")
				hide(t, l, "silk-daemon")
			}
			for _, k := range c.kill {
				do(t, l.Kill(t.Context(), k))
			}
			do(t, l.Down(t.Context()))
			if left, _ := members(t, l.Dir()); len(left) > 0 {
				t.Errorf("processes %v are left", left)
			}
			if left := users(t, spaces); len(left) > 0 {
				t.Errorf("namespaces are left, with %q", left)
			}
			if _, err := os.Stat(l.Dir()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the directory is left: %v", err)
			}
			if after := machine(t); after != before {
				t.Errorf("the machine has\n%s\nand had\n%s", after, before)
			}
		})
	}
}

// commandIn starts a command that goes on in a container, in mounts of its own for its resolver.
func commandIn(t *testing.T, l *lab.Lab, container string) {
	t.Helper()
	r, w, err := os.Pipe()
	do(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.Exec(context.WithoutCancel(t.Context()), container, []string{"sh", "-c", "echo started; exec sleep 1000"}, r, w, w) // with the supervisor's end it has one too
	}()
	t.Cleanup(func() { <-ended; r.Close(); w.Close() })
	if _, err := r.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
}

// strayInto starts a process in the network namespace of another one, without the lab's mark.
func strayInto(t *testing.T, pid int) {
	t.Helper()
	stray := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "env", "-i", "sleep", "1000")
	do(t, stray.Start())
	reaped := make(chan struct{})
	go func() { defer close(reaped); stray.Wait() }()
	t.Cleanup(func() { stray.Process.Kill(); <-reaped })
	await(t, "the stray is in", func() error {
		in, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", stray.Process.Pid))
		if want, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); in != want {
			return errors.New("it is not")
		}
		return nil
	})
}

func TestLabOfAnUnprivilegedUser(t *testing.T) {
	t.Parallel()
	needRoot(t) // to become nobody
	unprivileged(t, "12 of 12 connections work", "--policy", "none")
	unprivileged(t, "policy denies 12", "--policy", "required")
	_, err := exec.LookPath("nats-server")
	testkit.Require(t, "nats", err)
	unprivileged(t, "api.apps.internal", "--names")
}

func unprivileged(t *testing.T, want string, flags ...string) {
	t.Helper()
	base, err := os.MkdirTemp("", "silk-lab-nobody-")
	do(t, err)
	defer os.RemoveAll(base)
	do(t, os.Chown(base, 65534, 65534))
	silk := func(args ...string) ([]byte, error) {
		cmd := exec.Command(filepath.Join(programs, "silk"), append([]string{"lab", "--dir", filepath.Join(base, "lab")}, args...)...)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		return cmd.CombinedOutput()
	}
	probe := exec.Command("unshare", "--user", "--map-root-user", "--net", "--mount", "true")
	probe.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	testkit.Require(t, "userns", probe.Run())
	defer silk("down")
	out, err := silk(append([]string{"up", "--hosts", "2", "--wait", "30s"}, flags...)...)
	if err != nil || !strings.Contains(string(out), want) {
		t.Fatalf("up: %v\n%s", err, out)
	}
	for _, victim := range []string{"supervisor", "keeper", "host1/silk-daemon", "host2"} {
		if out, err := silk("kill", victim); err != nil {
			t.Errorf("kill %s: %v\n%s", victim, err, out)
		}
	}
	if out, err := silk("up", "--wait", "30s"); err != nil {
		t.Errorf("up again: %v\n%s", err, out)
	}
	if out, err := silk("down"); err != nil {
		t.Errorf("down: %v\n%s", err, out)
	}
	if left, _ := members(t, filepath.Join(base, "lab")); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	if entries, err := os.ReadDir(base); err != nil || len(entries) > 0 {
		t.Errorf("files are left: %v, %v", entries, err)
	}
}

func TestLabComesBackWhenEveryProcessOfItIsKilled(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 2, Containers: 1})
	s := whole(t, l)
	pids, _ := members(t, l.Dir())
	for range 3 { // what one of them has just restarted as well
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if pids, _ = members(t, l.Dir()); len(pids) == 0 {
			break
		}
	}
	again, err := lab.Up(context.WithoutCancel(t.Context()), lab.Options{Dir: l.Dir(), Programs: filepath.Join(filepath.Dir(l.Dir()), "bin")})
	do(t, err)
	after := whole(t, again)
	for i, h := range after.Hosts {
		if h.Lease != s.Hosts[i].Lease {
			t.Errorf("%s has lease %v, had %v", h.Name, h.Lease, s.Hosts[i].Lease)
		}
	}
}
