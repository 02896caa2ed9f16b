package lab_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
	"golang.org/x/sys/unix"
)

// programs is the directory of the real binaries, built once for all tests, or SILK_TEST_PROGRAMS.
var programs string

func TestMain(m *testing.M) {
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != "" // its workers are killed, and build no lab
	if !fuzzing && os.Getenv(reaped) == "" && unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == nil {
		os.Exit(reap())
	}
	os.Exit(func() int {
		if programs = os.Getenv("SILK_TEST_PROGRAMS"); programs != "" || fuzzing {
			return m.Run()
		}
		dir, remove, err := testkit.Programs()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer remove()
		programs = dir
		return m.Run()
	}())
}

// reaped says that there is a parent that reaps.
const reaped = "SILK_TEST_LAB_REAPED"

// reap runs the tests in a child and reaps what outlives its parents, as the first process of a machine does: some do so once a second, and a lab that is taken
// down waits for that.
func reap() int {
	goruntime.LockOSThread() // the child dies with the thread that started it
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Env, child.Stdin, child.Stdout, child.Stderr = append(os.Environ(), reaped+"=1"), os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := child.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, err)
			return 1
		case pid == child.Process.Pid && status.Exited():
			return status.ExitStatus()
		case pid == child.Process.Pid:
			fmt.Fprintln(os.Stderr, "the tests ended by a signal:", status.Signal())
			return 1
		}
	}
}

const patience = 30 * time.Second // what the network may take to be whole again

// needRoot skips tests that look into the lab's namespaces from outside.
func needRoot(t *testing.T) {
	t.Helper()
	var err error
	if os.Geteuid() != 0 {
		err = errors.New("not run by root")
	}
	testkit.Require(t, "root", err)
}

// up builds a lab, without policy unless told otherwise, and takes it down when the test ends. Programs of its own can be taken away from
// it (hide).
func up(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	needRoot(t)
	if o.Policy == "" {
		o.Policy = lab.PolicyNone
	}
	base := t.TempDir()
	o.Dir, o.Programs = filepath.Join(base, "lab"), filepath.Join(base, "bin")
	if err := os.Mkdir(o.Programs, 0o755); err != nil {
		t.Fatal(err)
	}
	all := []string{"silk", "silk-controller", "silk-daemon", "silk-cni", "silk-teardown", "policy-server", "vxlan-policy-agent"}
	if o.Names {
		all = append(all, "silk-dns", "silk-tls")
		nats, err := exec.LookPath("nats-server")
		do(t, err)
		do(t, os.Symlink(nats, filepath.Join(o.Programs, "nats-server"))) // where it is looked for first
	}
	for _, p := range all {
		do(t, os.Symlink(filepath.Join(programs, p), filepath.Join(o.Programs, p)))
	}
	l, err := lab.Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			dumpLogs(t, l)
		}
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

// dumpLogs prints the end of each log.
func dumpLogs(t *testing.T, l *lab.Lab) {
	files, _ := filepath.Glob(filepath.Join(l.Dir(), "log", "*.log"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && len(b) > 0 {
			t.Logf("%s:\n%s", filepath.Base(f), b[max(0, len(b)-3000):])
		}
	}
}

// hide takes a program away, so that it cannot be started again, until the returned function is called.
func hide(t *testing.T, l *lab.Lab, program string) (restore func()) {
	t.Helper()
	path := filepath.Join(filepath.Dir(l.Dir()), "bin", program)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	}
}

// whole waits until everybody reaches everybody.
func whole(t *testing.T, l *lab.Lab) lab.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := l.AwaitWhole(ctx)
	if err != nil {
		t.Fatalf("%v\n%s", err, table(s))
	}
	return s
}

func table(s lab.Status) string {
	var b strings.Builder
	s.Write(&b)
	return b.String()
}

// eventually waits for a status of which ok is true.
func eventually(t *testing.T, l *lab.Lab, what string, ok func(lab.Status) bool) lab.Status {
	t.Helper()
	var s lab.Status
	await(t, what, func() error {
		var err error
		if s, err = l.Status(t.Context()); err == nil && !ok(s) {
			err = errors.New(table(s))
		}
		return err
	})
	return s
}

// await polls until check is content, and reports what it said last if that takes too long.
func await(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: still not after %v: %v", what, patience, err)
		case <-tick.C:
		}
	}
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host returns a host's part of a status.
func host(t *testing.T, s lab.Status, name string) lab.Host {
	t.Helper()
	for _, h := range s.Hosts {
		if h.Name == name {
			return h
		}
	}
	t.Fatalf("no %s in the status", name)
	return lab.Host{}
}

func container(t *testing.T, s lab.Status, name string) lab.Container {
	t.Helper()
	for _, c := range s.Containers {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no %s in the status", name)
	return lab.Container{}
}

func program(t *testing.T, s lab.Status, name string) lab.Program {
	t.Helper()
	for _, p := range s.Programs {
		if p.Name == name {
			return p
		}
	}
	for _, h := range s.Hosts {
		for _, p := range []lab.Program{h.Daemon, h.Agent, h.Resolver, h.Proxy} {
			if p.Name == name {
				return p
			}
		}
	}
	for _, c := range s.Containers {
		if c.Responder.Name == name {
			return c.Responder
		}
	}
	t.Fatalf("no %s in the status", name)
	return lab.Program{}
}

// nsOf opens the network namespace of a process.
func nsOf(t *testing.T, pid int) *kernel.NS {
	t.Helper()
	ns, err := kernel.OpenNS(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// echo is a connection to a responder that lives through what a test does.
type echo struct {
	c net.Conn
	r *bufio.Reader
	n int
}

// dialEcho connects from one container to another one.
func dialEcho(t *testing.T, s lab.Status, from, to string) *echo {
	t.Helper()
	ns := nsOf(t, container(t, s, from).Responder.PID)
	var c net.Conn
	do(t, ns.Do(func() (err error) {
		d := net.Dialer{Timeout: 5 * time.Second}
		c, err = d.Dial("tcp", net.JoinHostPort(container(t, s, to).Address.String(), strconv.Itoa(lab.EchoPort)))
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return &echo{c: c, r: bufio.NewReader(c)}
}

// check sends a line and expects it back.
func (e *echo) check(t *testing.T, when string) {
	t.Helper()
	e.n++
	want := fmt.Sprintf("line %d\n", e.n)
	e.c.SetDeadline(time.Now().Add(patience))
	if _, err := e.c.Write([]byte(want)); err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if got, err := e.r.ReadString('\n'); err != nil || got != want {
		t.Fatalf("%s: read %q, %v, want %q", when, got, err, want)
	}
}

// shortly returns a context for what is expected not to happen.
func shortly(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), 3*time.Second)
}
