package testkit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a program of ours in a process of its own. It ends with the test, or with the test process whatever happens to that.
type Process struct {
	Cmd *exec.Cmd

	exited chan struct{} // closed when it has ended; then err says how
	err    error

	mu  sync.Mutex
	log bytes.Buffer
}

// Launch starts a program and waits until it logs that it serves. What it says there is read into serving as JSON. It is started from where within calls what it
// is given, such as from a namespace; nil is from here.
func Launch(t testing.TB, cmd *exec.Cmd, within func(func() error) error, serving any) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, exited: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = p
	if within == nil {
		within = func(f func() error) error { return f() }
	}
	started, serves := make(chan error, 1), make(chan error, 1)
	go func() {
		defer close(p.exited)
		runtime.LockOSThread() // the program dies with the thread that started it
		defer runtime.UnlockOSThread()
		p.err = within(func() error {
			err := cmd.Start()
			if started <- err; err != nil {
				return err
			}
			p.follow(out, serves, serving)
			return cmd.Wait()
		})
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("log of %q:\n%s", cmd.Args, p.Log())
		}
	})
	select {
	case err = <-serves:
	case <-p.exited:
		t.Fatalf("%q ended: %v", cmd.Args, p.err)
	case <-time.After(time.Minute):
		t.Fatalf("%q does not serve", cmd.Args)
	}
	if err != nil {
		t.Fatalf("%q: %v", cmd.Args, err)
	}
	return p
}

// follow keeps the log, and tells when the program serves.
func (p *Process) follow(out io.Reader, serves chan<- error, serving any) {
	var line struct{ Msg string }
	for r, told := bufio.NewReader(out), false; ; {
		b, err := r.ReadBytes('\n')
		p.Write(b)
		if !told && json.Unmarshal(b, &line) == nil && line.Msg == "serving" {
			told = true
			serves <- json.Unmarshal(b, serving)
		}
		if err != nil {
			return
		}
	}
}

// Write adds to the log. It is for the program's standard error.
func (p *Process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// Log returns what the program has said so far.
func (p *Process) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// Kill ends the program as the kernel would that has no memory left, and waits for that.
func (p *Process) Kill() {
	p.Cmd.Process.Kill()
	<-p.exited
}

// Wait returns how the program ended, when it has.
func (p *Process) Wait() error {
	<-p.exited
	return p.err
}

// End stops the program as a supervisor does, and expects it to end well.
func (p *Process) End(t testing.TB) {
	t.Helper()
	p.Cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		t.Fatalf("%q does not end", p.Cmd.Args)
	}
	if p.err != nil {
		t.Errorf("%q ended with %v", p.Cmd.Args, p.err)
	}
}
